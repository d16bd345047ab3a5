"""Verdicts: the whole interval decides, and every status can be reached."""

import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from frugalvlm.papers import KEYS, QUANTITY_KINDS, SCALES, Claim, load_paper
from frugalvlm.pocket import installed
from frugalvlm.pocket.installed import seeds_of
from frugalvlm.report.verdict_table import verdict_table
from frugalvlm.runs.records import MixedSettingError
from frugalvlm.verdicts.decision import p_value, share_of
from frugalvlm.verdicts.verdicts import REPLICATION, STATUSES, Measured, decide, verdicts


def claim(relation: str = ">=", threshold: float = 94.0, **more) -> Claim:
    return Claim(
        "c", "text", "Table 1", ("pocket",), relation=relation, threshold=threshold, **more
    )


def status(low: float, high: float, asked: Claim) -> str:
    return decide(Measured((low + high) / 2, low, high, 10), asked)


VISIONZIP = load_paper("visionzip")


def found(records, make, scale: str = "pocket", **beside):
    made = verdicts(VISIONZIP, records, scale, benchmarks=make.benchmarks, beside=beside)
    return {v.claim.id: v for v in made}


# --- the rule ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (94.0, 99.0, "holds"),
        (91.0, 93.9, "holds"),  # less than the paper's, within the margin
        (90.9, 99.0, "undecided"),  # the value alone would do
        (80.0, 90.9, "refused"),
        (99.0, 104.0, "holds"),  # who keeps more keeps that as well
    ],
)
def test_a_level_holds_within_its_margin(low: float, high: float, expected: str) -> None:
    assert status(low, high, claim(margin=3)) == expected
    mirrored = claim("<=", -94.0, margin=3)
    assert status(-high, -low, mirrored) == expected


@pytest.mark.parametrize(
    ("low", "high", "sized", "unsized"),
    [
        (5.1, 15.0, "holds", "holds"),  # all of it beyond half of the paper's 10
        (4.9, 30.0, "holds in direction", "holds"),
        (0.1, 1.0, "holds in direction", "holds"),
        (0.0, 30.0, "undecided", "undecided"),
        (-1.0, 1.0, "undecided", "undecided"),
        (-9.0, 0.0, "refused", "refused"),
    ],
)
def test_a_comparison_asks_for_half_of_the_papers_effect(low, high, sized, unsized) -> None:
    assert status(low, high, claim(">", 0.0, reported=10.0)) == sized
    assert status(low, high, claim(">", 0.0, reported=99.0, reported_on_columns=10.0)) == sized
    assert status(low, high, claim(">", 0.0)) == unsized
    assert status(-high, -low, claim("<", 0.0, reported=-10.0)) == sized
    assert status(1 + low, 1 + high, claim(">", 1.0, reported=11.0)) == sized  # a speed-up


def test_the_share_of_the_effect_is_counted_from_where_both_sides_are_alike() -> None:
    assert share_of(4.0, claim(">", 1.0, reported=7.0)) == pytest.approx(0.5)
    assert share_of(-3.0, claim("<", 0.0, reported=-6.0)) == pytest.approx(0.5)
    assert share_of(4.0, claim(">", 1.0)) is None
    assert share_of(4.0, claim(">=", 1.0, reported=7.0)) is None


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.95, 1.05, "holds"),
        (0.85, 1.05, "undecided"),
        (0.5, 1.5, "undecided"),
        (1.2, 1.3, "refused"),
    ],
)
def test_a_number_is_met_within_its_margin(low: float, high: float, expected: str) -> None:
    assert status(low, high, claim("~", 1.0, margin=0.1)) == expected


def test_a_ratio_of_counts_equals_its_decimal_fraction() -> None:
    exact = Measured(64 / 576, 64 / 576, 64 / 576)
    assert decide(exact, claim("==", 0.1111111, margin=1e-7)) == "holds"
    assert decide(exact, claim("==", 0.1111, margin=1e-7)) == "refused"


def test_an_identity_is_met_by_construction_or_the_code_is_wrong() -> None:
    assert status(2, 2, claim("==", 2.0, origin="identity")) == "by construction"
    assert status(3, 3, claim("==", 2.0, origin="identity")) == "refused"


def test_without_an_interval_nothing_is_decided() -> None:
    assert decide(Measured(99.0, math.nan, math.nan, 10), claim()) == "undecided"


def test_p_is_that_of_the_line_that_decides() -> None:
    draws = np.random.default_rng(0).normal(5, 2, 2000)
    measured = Measured(5.0, 1.1, 8.9, 10, draws=draws)
    expected = 2 * (np.sum(draws <= 0) + 1) / 2001
    assert p_value(measured, claim(">", 0.0, reported=20.0)) == pytest.approx(expected)
    assert p_value(measured, claim(">=", 4.0, margin=4)) == pytest.approx(expected)
    assert p_value(replace(measured, draws=None), claim(">", 0.0)) == pytest.approx(0.012, abs=3e-3)
    assert p_value(measured, claim(">", 5.0)) > 0.9


# --- from records, status by status ----------------------------------------------------------


@pytest.fixture(scope="module")
def spread(make):
    """Records under which VisionZip is perfect at 48, good at 32, poor at 16 tokens."""
    share = {48: 1.0, 32: 0.9, 16: 0.5}
    records = []
    for record in make.table1({}):
        request = record["request"]
        method, budget = request["method"]["method"], request["budget"]
        right = share[budget] if method == "visionzip" else 0.4 if method == "fastv" else None
        if method != "vanilla" and right is not None:
            name = request["benchmark"]
            layers = [144.0] * 2 + [float(budget)] * 4 if method == "fastv" else None
            record = make.accuracy(method, budget, name, right, per_layer=layers)
        if method in ("vanilla", "visionzip", "fastv"):
            records.append(record)
    random_ = [i % 2 == 0 for i in range(40)]  # as many right as VisionZip's, other questions
    records += [
        make.accuracy("random", 16, name, random_) for name in make.benchmarks
    ]  # fmt: skip
    return found([*records, make.efficiency(), make.attention([0.2, 0.3, 0.5, 0.4])], make)


def test_every_status_is_reached(spread) -> None:
    assert {name: spread[name].status for name in (
        "retention-third", "retention-two-ninths", "retention-ninth", "beats-random",
        "faster-than-fastv", "kv-cache", "total-time-threefold", "beats-fastervlm",
    )} == {
        "retention-third": "holds",
        "retention-two-ninths": "undecided",
        "retention-ninth": "refused",
        "beats-random": "undecided",
        "faster-than-fastv": "holds in direction",
        "kv-cache": "by construction",
        "total-time-threefold": "not testable",
        "beats-fastervlm": "not measured",
    }  # fmt: skip
    assert {v.status for v in spread.values()} == set(STATUSES) - {"not comparable"}


def test_what_is_no_evidence_is_shown_and_decides_nothing(make) -> None:
    third = VISIONZIP.claim("retention-third")
    paper = replace(VISIONZIP, claims=(replace(third, not_comparable="another thing"),))
    (v,) = verdicts(paper, make.table1({"visionzip": 1.0}), "pocket", benchmarks=make.benchmarks)
    assert (v.status, v.value, v.p) == ("not comparable", 100, None)
    assert "not comparable: another thing" in v.sentence


def test_a_verdict_carries_value_interval_n_and_the_papers_number(spread) -> None:
    v = spread["retention-third"]
    assert (v.value, v.n, v.of, v.trainings, v.spread) == (100, 240, "questions", 1, "interval")
    assert 96 < v.low < 100 < v.high  # of 120 pictures none differs: not quite nothing
    assert (v.reported, v.claim.reported_on_columns) == (98.5, 97.7)
    assert spread["retention-ninth"].value == pytest.approx(50, abs=3)
    assert spread["faster-than-fastv"].share == pytest.approx(
        spread["faster-than-fastv"].value / 6.0
    )


def test_sentences_say_what_decides(spread) -> None:
    said = {name: v.sentence for name, v in spread.items()}
    assert said["retention-third"].startswith("Measured 100 [")
    assert (
        "one training; asked ≥ 97.7 − 3, which holds on the whole interval"
        in (said["retention-third"])
    )
    assert "which the whole interval excludes" in said["retention-ninth"]
    assert "which the interval does not decide" in said["beats-random"]
    assert "on 9 rounds of one process (a range, no interval)" in said["shorter-prefill"]
    assert "of the paper's 6, and not surely 50 % of it" in said["faster-than-fastv"]
    assert "loading" in said["total-time-threefold"]
    assert "no accuracy record of fastervlm" in said["beats-fastervlm"]
    for sentence in said.values():
        assert sentence.endswith(".")
        assert "\n" not in sentence


def test_no_evidence_where_no_score_differs(make) -> None:
    """Two methods with the very same answers: nothing is said about what sets them apart."""
    records = make.table1({"visionzip": 0.8, "fastervlm": 0.8, "random": 0.7})
    made = found(records, make)
    v = made["beats-fastervlm"]
    assert (v.value, v.status, v.p) == (0, "undecided", None)
    assert "not one of the 240 scores differs" in v.sentence
    assert not math.isnan(made["beats-random"].low)


def test_differences_between_benchmarks_are_drawn_apart(make) -> None:
    records = [make.accuracy("vanilla", 144, name) for name in make.benchmarks]
    records += [
        make.accuracy("visionzip", 16, "pocket-sqa", 1.0),
        make.accuracy("visionzip", 16, "pocket-pope", 0.5),
    ]
    v = found(records, make)["sqa-spared"]
    assert v.value == pytest.approx(50, abs=3)
    assert v.low < v.value < v.high
    assert v.n == 80
    assert v.status == "holds"
    assert v.share > 4


# --- fair pairs ------------------------------------------------------------------------------


def fastv(make, kept: int, right: float, layers: int = 12) -> list:
    mean = [144.0] * 2 + [float(kept)] * (layers - 2)
    return [make.accuracy("fastv", kept, n, right, per_layer=mean) for n in make.benchmarks]


def test_a_pair_is_taken_at_an_equal_mean(make) -> None:
    """VisionZip's 48 in every layer are FastV's 29 behind layer 2: that run, and not its 48."""
    base = [make.accuracy("vanilla", 144, n, per_layer=[144.0] * 12) for n in make.benchmarks]
    own = [make.accuracy("visionzip", 48, n, 0.9, per_layer=[48.0] * 12) for n in make.benchmarks]
    records = [*base, *own, *fastv(make, 48, 0.99), *fastv(make, 29, 0.6)]
    v = found(records, make)["beats-fastv-third"]
    assert v.value == pytest.approx(30, abs=4)
    assert (v.status, v.p < 0.05) == ("holds", True)
    v = found([*base, *own, *fastv(make, 48, 0.99)], make)["beats-fastv-third"]
    assert v.status == "not measured"
    assert "no record of fastv at a mean of 48 visual tokens" in v.sentence
    assert "it would keep 29" in v.sentence


def test_a_pair_that_cannot_be_had_is_not_testable(make) -> None:
    base = [make.accuracy("vanilla", 144, n, per_layer=[144.0] * 12) for n in make.benchmarks]
    own = [make.accuracy("visionzip", 16, n, 0.9, per_layer=[16.0] * 12) for n in make.benchmarks]
    v = found([*base, *own, *fastv(make, 16, 0.5)], make)["beats-fastv"]
    assert v.status == "not testable"
    assert "16 tokens on average are impossible" in v.sentence


def test_a_pair_is_taken_at_equal_flops(make) -> None:
    aim = load_paper("aim")
    asked = replace(aim, claims=(aim.claim("beats-fastv-mild"), aim.claim("beats-fastv")))
    base = [make.accuracy("vanilla", 144, n) for n in make.benchmarks]
    shares = {("aim", 63): 0.466, ("aim", 18): 0.2, ("fastv", 63): 0.65, ("fastv", 18): 0.473}
    rows = make.efficiency()
    rows["rows"] = [rows["rows"][0]] + [
        {**rows["rows"][1], "method": m, "budget": b, "flops": share * rows["rows"][0]["flops"]}
        for (m, b), share in shares.items()
    ]
    right = {("aim", 63): 0.8, ("aim", 18): 0.6, ("fastv", 63): 1.0, ("fastv", 18): 0.5}
    records = [make.accuracy(m, b, n, r) for (m, b), r in right.items() for n in make.benchmarks]
    mild, strong = verdicts(asked, [*base, *records, rows], "pocket", benchmarks=make.benchmarks)
    assert mild.value == pytest.approx(30, abs=4)  # against FastV's 18, which costs as much
    assert strong.status == "not testable"
    assert "fastv takes at least" in strong.sentence


# --- trainings, other questions, a page's family -----------------------------------------------


def test_trainings_of_other_seeds_are_found_by_their_names(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(installed, "models_dir", lambda: tmp_path)
    for name in ("m", "m-seed10", "m-seed2", "m-seeds", "m-small", "m-small-seed1"):
        (tmp_path / name).mkdir()
    assert seeds_of("m") == ("m", "m-seed2", "m-seed10")
    assert seeds_of("m-seed2") == seeds_of("m")
    assert seeds_of("m-small") == ("m-small", "m-small-seed1")
    assert seeds_of("absent") == ("absent",)


def test_a_verdict_is_over_the_trainings_that_have_records(make, monkeypatch) -> None:
    module = "frugalvlm.verdicts.verdicts.seeds_of"
    monkeypatch.setattr(module, lambda model: (model, f"{model}-seed1", f"{model}-seed2"))

    def trained(right: float) -> list:
        return make.table1({"visionzip": right})

    alone = found(trained(0.9), make)["retention-third"]
    seeds = {f"pocket-llava-base-seed{i}": trained(right) for i, right in ((1, 0.8), (2, 0.7))}
    v = found(trained(0.9), make, **seeds)["retention-third"]
    assert v.trainings == 3
    each = [found(trained(right), make)["retention-third"].value for right in (0.9, 0.8, 0.7)]
    assert v.value == pytest.approx(sum(each) / 3)
    assert v.high - v.low > 1.3 * (alone.high - alone.low)
    assert "3 trainings" in v.sentence
    del seeds["pocket-llava-base-seed2"]
    assert found(trained(0.9), make, **seeds)["retention-third"].trainings == 2
    others = {"pocket-llava-small": trained(0.1)}  # another model is no other training
    assert found(trained(0.9), make, **others)["retention-third"].value == alone.value


def test_other_questions_have_a_verdict_of_their_own(make) -> None:
    again = {REPLICATION: make.table1({"visionzip": 0.3})}
    v = found(make.table1({"visionzip": 1.0}), make, **again)["retention-third"]
    assert (v.status, v.value) == ("holds", 100)
    assert (v.replication.status, v.replication.value) == ("refused", pytest.approx(30, abs=3))
    table = verdict_table([v])
    assert table.headers[-1] == "other questions"
    assert "refused" in table.blocks[0].rows[0][-1].short
    assert found(make.table1({}), make)["retention-third"].replication is None


def test_a_page_is_corrected_as_one_family(make) -> None:
    """A difference that is just sure alone is undecided among sixty that are not."""
    records = make.table1({"visionzip": 0.8, "uniform": 0.6})
    base = VISIONZIP.claim("beats-uniform")

    def judged(*claims: Claim) -> list:
        paper = replace(VISIONZIP, claims=claims)
        return verdicts(paper, records, "pocket", benchmarks=make.benchmarks)

    (sure,) = judged(base)
    just = replace(base, threshold=sure.low - 0.2)
    hopeless = [replace(base, id=f"c{i}", threshold=sure.value) for i in range(60)]
    (alone,), family = judged(just), judged(just, *hopeless)[0]
    assert (alone.status, alone.corrected) == ("holds", alone.p)
    assert alone.p < 0.05
    assert (family.p, family.status) == (alone.p, "undecided")
    assert family.corrected == pytest.approx(min(1, 61 * alone.p))
    assert "which Holm's correction over the page leaves undecided" in family.sentence
    assert "undecided by it alone: beats-uniform" in " ".join(verdict_table([family]).caption)


def test_a_claim_that_is_younger_than_its_records_is_named(make) -> None:
    old = found(make.table1({"visionzip": 1.0}), make)["retention-third"]
    assert old.late == (old.claim.written > make.created[:16])
    for written, late in (("2020-01-01T00:00Z", False), ("2026-01-01T00:01Z", True)):
        third = replace(VISIONZIP.claim("retention-third"), written=written)
        paper = replace(VISIONZIP, claims=(third,))
        records = make.table1({"visionzip": 1.0})
        (v,) = verdicts(paper, records, "pocket", benchmarks=make.benchmarks)
        assert v.late == late
        assert ("not written in advance" in " ".join(verdict_table([v]).caption)) == late


# --- costs and attention -----------------------------------------------------------------------


def test_costs_come_from_the_efficiency_record(spread) -> None:
    speed = spread["shorter-prefill"]
    assert (speed.status, speed.n, speed.of, speed.spread) == ("holds", 9, "rounds", "range")
    assert speed.p is None  # a range is no interval, so there is nothing to correct
    gap = spread["faster-than-fastv"]
    assert gap.high - gap.low == pytest.approx(0.4)  # both intervals in full: never too sure
    assert spread["kv-cache"].status == "by construction"
    assert spread["kv-cache"].value == pytest.approx(1 / 9)


def test_one_token_too_many_in_one_image_is_found(make) -> None:
    record = make.accuracy("visionzip", 16)
    base = [make.accuracy("vanilla", 144)]
    assert found([*base, record], make)["token-counts"].status == "by construction"
    record["tokens"]["spread"][3] = [16, 17]
    v = found([*base, record], make)["token-counts"]
    assert (v.status, v.value) == ("refused", 1)


def test_attention_statistics(make) -> None:
    def of(mass, **more):
        made = found([make.attention(mass, **more)], make)
        return [made[f"attention-{x}"] for x in ("grows-with-depth", "peaks-second-last",
                                                 "relaxes-last")]  # fmt: skip

    def pictures(mean, spread=0.001):
        rng = np.random.default_rng(5)
        return (np.array(mean) + spread * rng.normal(size=(30, len(mean)))).tolist()

    rising = [0.2, 0.3, 0.5, 0.4]
    grows, peak, relaxes = of(rising, mass_per_image=pictures(rising))
    assert grows.value == pytest.approx(0.8)
    assert (grows.status, grows.of) == ("undecided", "layers")
    assert "4 layers of one tower, which give no interval" in grows.sentence
    assert (peak.value, peak.status) == (2, "holds")
    assert relaxes.value == pytest.approx(-0.1)
    assert relaxes.status == "holds"
    late = [0.5, 0.4, 0.3, 0.6]
    _, peak, relaxes = of(late, mass_per_image=pictures(late))
    assert (peak.value, peak.status) == (1, "refused")
    assert relaxes.status == "refused"
    assert of([0.3, 0.3, 0.3])[0].status == "undecided"  # no order to correlate with
    relaxes = of(rising)[2]  # a record of the mean alone
    assert (relaxes.value, relaxes.status) == (pytest.approx(-0.1), "undecided")
    per_image = [[0.2, 0.3, 0.5, 0.4], [0.2, 0.3, 0.4, 0.6]] * 5
    mean = [sum(column) / 10 for column in zip(*per_image, strict=True)]
    relaxes = of(mean, mass_per_image=per_image)[2]
    assert relaxes.low < relaxes.value < relaxes.high
    assert relaxes.status == "undecided"


def test_attention_counts_pictures_and_not_their_questions(make) -> None:
    rows = [[0.2, 0.3, 0.5, 0.4 + 0.01 * i] for i in range(12)]
    thrice = [row for row in rows for _ in range(3)]  # as records from before had them
    mean = np.mean(rows, axis=0).tolist()
    v = found([make.attention(mean, mass_per_image=thrice)], make)["attention-relaxes-last"]
    w = found([make.attention(mean, mass_per_image=rows)], make)["attention-relaxes-last"]
    assert v.n == w.n == 12
    assert (v.low, v.high) == (w.low, w.high)
    few = found([make.attention(mean, mass_per_image=rows[:9])], make)["attention-relaxes-last"]
    assert "fewer than 10 pictures" in few.sentence


def test_another_share_of_patches_is_not_taken(make) -> None:
    record = make.attention([0.2, 0.3, 0.5, 0.4]) | {"patches_fraction": 0.25}
    assert found([record], make)["attention-relaxes-last"].status == "not measured"


def test_blueprint_counts(make) -> None:
    made = found([make.blueprint()], make, "blueprint")
    assert made["flops-fall-llava15"].value == pytest.approx((60 + 576) / (60 + 64), rel=1e-6)
    assert made["flops-fall-llava15"].status == "by construction"
    assert made["flops-explain-speedup"].value == pytest.approx(2940 / 220, rel=1e-6)
    assert made["kv-cache"].value == pytest.approx(1 / 9)
    assert made["token-counts-crops"].status == "by construction"
    assert made["retention-third"].status == "not testable"
    wrong = make.blueprint()
    next(r for r in wrong["rows"] if (r["method"], r["model"], r["budget"]) == (
        "visionzip", "LLaVA-NeXT-7B", 160))["tokens_mean"] += 4  # fmt: skip
    made = found([wrong], make, "blueprint")
    assert made["token-counts-crops"].status == "refused"
    assert made["token-counts"].status == "by construction"  # that claim is about LLaVA-1.5


def test_pocket_records_say_nothing_about_another_scale(make) -> None:
    made = found(make.table1({"visionzip": 1.0}), make, "full")
    assert made["retention-third"].status == "not measured"


def test_partial_records_prove_nothing(make) -> None:
    records = [make.accuracy("vanilla", 144, name) for name in make.benchmarks]
    records += [make.accuracy("visionzip", 48, name, status="partial") for name in make.benchmarks]
    assert found(records, make)["retention-third"].status == "not measured"


def test_a_missing_benchmark_is_named(make) -> None:
    records = make.table1({"visionzip": 1.0})
    records = [r for r in records if (r["request"]["benchmark"], r["request"]["budget"]) != (
        "pocket-sqa", 48)]  # fmt: skip
    v = found(records, make)["retention-third"]
    assert v.status == "not measured"
    assert "visionzip at 48 tokens on pocket-sqa" in v.sentence


def test_an_undefined_retention_is_not_a_verdict(make) -> None:
    records = [make.accuracy("vanilla", 144, name, 0.0) for name in make.benchmarks]
    records += [make.accuracy("visionzip", 48, name) for name in make.benchmarks]
    v = found(records, make)["retention-third"]
    assert v.status == "undecided"
    assert "scores zero" in v.sentence


def test_mixed_settings_and_unknown_scales_are_refused(make) -> None:
    with pytest.raises(MixedSettingError, match="n: 20, 40"):
        found([make.accuracy("vanilla", 144), make.accuracy("visionzip", 48, n=20)], make)
    with pytest.raises(ValueError, match="Unknown scale 'poket'"):
        found([], make, "poket")


def test_hyper_parameters_in_a_claim_are_matched(make) -> None:
    base = VISIONZIP.claim("retention-third")
    wanted = replace(
        base, quantity={**base.quantity, "layer_fraction": "5/32", "over": "pocket-gqa"}
    )
    paper = replace(VISIONZIP, claims=(wanted,))
    records = [make.accuracy("vanilla", 144), make.accuracy("visionzip", 48)]
    (v,) = verdicts(paper, records, "pocket", benchmarks=make.benchmarks)
    assert v.status == "not measured"
    assert "layer_fraction 5/32" in v.sentence
    records[1] = make.accuracy("visionzip", 48, hyper={"layer_fraction": "5/32"})
    (v,) = verdicts(paper, records, "pocket", benchmarks=make.benchmarks)
    assert (v.value, v.status) == (100, "undecided")  # of 20 pictures, all right


@pytest.mark.parametrize("key", KEYS)
def test_every_claim_of_every_paper_gets_a_verdict(make, key: str) -> None:
    paper = load_paper(key)
    vanilla = [make.accuracy("vanilla", 144), make.efficiency(), make.attention([0.1, 0.2])]
    for scale in SCALES:
        for records in ([], vanilla if scale == "pocket" else [make.blueprint()]):
            made = verdicts(paper, records, scale, benchmarks=make.benchmarks)
            assert [v.claim.id for v in made] == [c.id for c in paper.claims]
            for v in made:
                if scale not in v.claim.scales:
                    assert v.status == "not testable"
                assert v.sentence.endswith(".")


def test_the_vocabulary_is_covered() -> None:
    used = {c.quantity["kind"] for k in KEYS for c in load_paper(k).claims if c.quantity}
    assert used <= set(QUANTITY_KINDS)


# --- renderings ------------------------------------------------------------------------------


def test_the_table_shows_reasons_and_fits_the_terminal(spread) -> None:
    table = verdict_table(list(spread.values()))
    frame = table.to_frame().set_index("claim")
    assert list(frame.index) == list(spread)
    assert frame.loc["retention-third", "status"] == "holds"
    assert frame.loc["retention-third", ["threshold", "margin"]].tolist() == [97.7, 3]
    assert frame.loc["faster-than-fastv", ["about", "origin"]].tolist() == ["time", "paper"]
    console = Console(width=120, color_system=None)
    with console.capture() as shown:
        console.print(table)
    text = shown.get()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert "image loading" in text  # the reason of what is not testable
    assert "98.5 (97.7)" in text
    assert "total-time-threefold" not in "".join(r[0].short for b in table.blocks for r in b.rows)
    origins = [(b.heading.split()[0], len(b.rows)) for b in table.blocks]
    assert [name for name, _ in origins] == ["claims", "controls", "true"]
    assert [line.split(":")[0] for line in table.caption[:3]] == [
        "Claims of the paper", "Controls that this kit adds", "True by construction",
    ]  # fmt: skip
    assert "| " in table.to_markdown()
