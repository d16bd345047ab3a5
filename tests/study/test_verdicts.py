"""Verdicts: the whole interval decides, and every status can be reached."""

import math
from dataclasses import replace

import pytest
from rich.console import Console

from frugalvlm.papers import KEYS, QUANTITY_KINDS, SCALES, Claim, load_paper
from frugalvlm.report.verdict_table import verdict_table
from frugalvlm.runs.records import MixedSettingError
from frugalvlm.verdicts.verdicts import STATUSES, Measured, decide, verdicts

WEAKER = {"relation": ">", "threshold": 75.0, "why": "printed"}


def claim(relation: str = ">=", threshold: float = 94.0, **more) -> Claim:
    return Claim(
        "c", "text", "Table 1", ("pocket",), relation=relation, threshold=threshold, **more
    )


def status(low: float, high: float, asked: Claim) -> str:
    return decide(Measured((low + high) / 2, low, high, 10), asked)


VISIONZIP = load_paper("visionzip")


def found(records, make, scale: str = "pocket"):
    made = verdicts(VISIONZIP, records, scale, benchmarks=make.benchmarks)
    return {v.claim.id: v for v in made}


# --- the rule ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "plain", "with_weaker"),
    [
        (94.0, 99.0, "reproduced", "reproduced"),
        (93.9, 99.0, "not significant", "same direction"),  # the value alone would do
        (80.0, 93.0, "contradicted", "same direction"),
        (75.0, 99.0, "not significant", "not significant"),  # > 75 fails at its lower end
        (70.0, 80.0, "contradicted", "not significant"),
        (60.0, 75.0, "contradicted", "contradicted"),
        (60.0, 99.0, "not significant", "not significant"),
    ],
)
def test_the_interval_decides(low: float, high: float, plain: str, with_weaker: str) -> None:
    assert status(low, high, claim()) == plain
    assert status(low, high, claim(weaker=WEAKER)) == with_weaker


@pytest.mark.parametrize(
    ("relation", "low", "high", "expected"),
    [
        (">", 1.0, 2.0, "not significant"),
        (">=", 1.0, 2.0, "reproduced"),
        (">", 1.1, 2.0, "reproduced"),
        (">", 0.0, 1.0, "contradicted"),
        ("<", 0.0, 1.0, "not significant"),
        ("<=", 0.0, 1.0, "reproduced"),
        ("<", 0.0, 0.9, "reproduced"),
        ("<=", 1.1, 2.0, "contradicted"),
        ("==", 1.0, 1.0, "reproduced"),
        ("==", 0.9, 1.1, "not significant"),
        ("==", 1.2, 1.4, "contradicted"),
    ],
)
def test_every_relation_at_its_threshold(relation, low, high, expected) -> None:
    assert status(low, high, claim(relation, 1.0)) == expected


def test_about_means_within_the_tolerance() -> None:
    about = claim("~", 1.0, tolerance=0.1)
    assert status(0.95, 1.05, about) == "reproduced"
    assert status(0.85, 1.05, about) == "not significant"
    assert status(1.2, 1.3, about) == "contradicted"


def test_a_ratio_of_counts_equals_its_decimal_fraction() -> None:
    exact = Measured(64 / 576, 64 / 576, 64 / 576)
    assert decide(exact, claim("==", 0.1111111, tolerance=1e-7)) == "reproduced"
    assert decide(exact, claim("==", 0.1111, tolerance=1e-7)) == "contradicted"


def test_without_an_interval_nothing_is_decided() -> None:
    assert decide(Measured(99.0, math.nan, math.nan, 10), claim()) == "not significant"


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
        "prefill-eightfold", "beats-fastervlm",
    )} == {
        "retention-third": "reproduced",
        "retention-two-ninths": "same direction",
        "retention-ninth": "contradicted",
        "beats-random": "not significant",
        "prefill-eightfold": "not testable here",
        "beats-fastervlm": "not measured",
    }  # fmt: skip
    assert {v.status for v in spread.values()} == set(STATUSES)


def test_a_verdict_carries_value_interval_n_and_the_papers_number(spread) -> None:
    v = spread["retention-third"]
    assert (v.value, v.low, v.high, v.n, v.of) == (100, 100, 100, 240, "questions")
    assert (v.reported, v.claim.reported_on_columns) == (98.5, 97.7)
    assert spread["retention-ninth"].value == pytest.approx(50, abs=3)
    assert spread["beats-fastv"].value == pytest.approx(10, abs=3)
    assert spread["beats-fastv"].low < spread["beats-fastv"].value < spread["beats-fastv"].high


def test_sentences_say_what_decides(spread) -> None:
    assert "of which" not in spread["retention-third"].sentence
    assert "the weaker > 83.5 (printed FastV average at this budget) holds" in (
        spread["retention-two-ninths"].sentence
    )
    assert "neither does the weaker > 75.6" in spread["retention-ninth"].sentence
    assert "which the interval does not decide" in spread["beats-random"].sentence
    assert "five crops" in spread["prefill-eightfold"].sentence
    assert "no accuracy record of fastervlm" in spread["beats-fastervlm"].sentence
    for v in spread.values():
        assert v.sentence.endswith(".")
        assert "\n" not in v.sentence


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
    assert v.status == "reproduced"


def test_costs_come_from_the_efficiency_record(spread) -> None:
    speed = spread["shorter-prefill"]
    assert (speed.status, speed.n, speed.of) == ("reproduced", 9, "rounds")
    gap = spread["faster-than-fastv"]
    assert gap.high - gap.low == pytest.approx(0.4)  # both intervals in full: never too sure
    assert spread["kv-cache"].status == "reproduced"
    assert spread["kv-cache"].value == pytest.approx(1 / 9)


def test_one_token_too_many_in_one_image_is_found(make) -> None:
    record = make.accuracy("visionzip", 16)
    base = [make.accuracy("vanilla", 144)]
    assert found([*base, record], make)["token-counts"].status == "reproduced"
    record["tokens"]["spread"][3] = [16, 17]
    v = found([*base, record], make)["token-counts"]
    assert (v.status, v.value) == ("contradicted", 1)


def test_attention_statistics(make) -> None:
    def of(mass, **more):
        made = found([make.attention(mass, **more)], make)
        return [made[f"attention-{x}"] for x in ("grows-with-depth", "peaks-second-last",
                                                 "relaxes-last")]  # fmt: skip

    grows, peak, relaxes = of([0.2, 0.3, 0.5, 0.4])
    assert grows.value == pytest.approx(0.8)
    assert peak.value == 2
    assert relaxes.value == pytest.approx(-0.1)
    assert {v.status for v in (grows, peak, relaxes)} == {"reproduced"}
    assert "no interval" in grows.of
    grows, peak, relaxes = of([0.5, 0.4, 0.3, 0.6])
    assert (peak.value, peak.status) == (1, "contradicted")
    assert relaxes.status == "contradicted"
    assert of([0.3, 0.3, 0.3])[0].status == "not significant"  # no order to correlate with
    per_image = [[0.2, 0.3, 0.5, 0.4], [0.2, 0.3, 0.4, 0.6]] * 5
    mean = [sum(column) / 10 for column in zip(*per_image, strict=True)]
    relaxes = of(mean, mass_per_image=per_image)[2]
    assert relaxes.low < relaxes.value < relaxes.high
    assert relaxes.status == "not significant"


def test_another_share_of_patches_is_not_taken(make) -> None:
    record = make.attention([0.2, 0.3, 0.5, 0.4]) | {"patches_fraction": 0.25}
    assert found([record], make)["attention-relaxes-last"].status == "not measured"


def test_blueprint_counts(make) -> None:
    made = found([make.blueprint()], make, "blueprint")
    assert made["flops-fall-llava15"].value == pytest.approx((60 + 576) / (60 + 64), rel=1e-6)
    assert made["flops-fall-llava15"].status == "reproduced"
    assert made["flops-explain-speedup"].value == pytest.approx(2940 / 220, rel=1e-6)
    assert made["kv-cache"].value == pytest.approx(1 / 9)
    assert made["token-counts-crops"].status == "reproduced"
    assert made["retention-third"].status == "not testable here"
    wrong = make.blueprint()
    next(r for r in wrong["rows"] if (r["method"], r["model"], r["budget"]) == (
        "visionzip", "LLaVA-NeXT-7B", 160))["tokens_mean"] += 4  # fmt: skip
    made = found([wrong], make, "blueprint")
    assert made["token-counts-crops"].status == "contradicted"
    assert made["token-counts"].status == "reproduced"  # that claim is about LLaVA-1.5


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
    assert v.status == "not significant"
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
    assert v.status == "reproduced"


@pytest.mark.parametrize("key", KEYS)
def test_every_claim_of_every_paper_gets_a_verdict(make, key: str) -> None:
    paper = load_paper(key)
    vanilla = [make.accuracy("vanilla", 144), make.efficiency(), make.attention([0.1, 0.2])]
    for scale in SCALES:
        for records in ([], vanilla if scale == "pocket" else [make.blueprint()]):
            made = verdicts(paper, records, scale, benchmarks=make.benchmarks)
            assert [v.claim.id for v in made] == [c.id for c in paper.claims]
            for v in made:
                testable = scale in v.claim.scales
                assert (v.status == "not testable here") == (not testable)
                assert v.sentence.endswith(".")


def test_the_vocabulary_is_covered() -> None:
    used = {c.quantity["kind"] for k in KEYS for c in load_paper(k).claims if c.quantity}
    assert used <= set(QUANTITY_KINDS)


# --- renderings ------------------------------------------------------------------------------


def test_the_table_shows_reasons_and_fits_the_terminal(spread) -> None:
    table = verdict_table(list(spread.values()))
    frame = table.to_frame().set_index("claim")
    assert list(frame.index) == list(spread)
    assert frame.loc["retention-third", "status"] == "reproduced"
    assert frame.loc["retention-third", "threshold"] == 98.5
    console = Console(width=120, color_system=None)
    with console.capture() as shown:
        console.print(table)
    text = shown.get()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert "five crops" in text  # the reason of what is not testable
    assert "98.5 (97.7)" in text
    assert "prefill-eightfold" not in "".join(r[0].short for b in table.blocks for r in b.rows)
    assert "(added by this kit)" in table.to_html()
    assert "| " in table.to_markdown()
