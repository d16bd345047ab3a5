"""One call compares methods, budgets and data of anybody's; records are used again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

import frugalvlm
from frugalvlm import methods
from frugalvlm.benchmarks import asking, stats
from frugalvlm.benchmarks.own import own_benchmark
from frugalvlm.door import ComparisonResult, RequestError
from frugalvlm.methods import FastV, Uniform, VisionZip
from frugalvlm.runs import records
from frugalvlm.runs.identity import code_of
from frugalvlm.verdicts.scored import Scored
from frugalvlm.views import Reduced

mpl.use("Agg")
QUIET = {"costs": False, "progress": False}


@dataclass(frozen=True)
class Corner(methods.EncoderReducer):
    """The first patches, as a user's script would define it."""

    key: ClassVar[str] = "corner"
    kept_tokens: int

    @classmethod
    def for_budget(cls, kept_tokens, total_tokens=576):
        methods.base.check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens)

    def reduce(self, view):
        source = torch.arange(self.kept_tokens).expand(view.crops, -1)
        return Reduced(view.patches[:, : self.kept_tokens], source)


def _length(answer, answers):
    """A score that random weights do not always fail."""
    return float(len(answer) % 2)


def test_the_front_door_is_at_the_front():
    assert frugalvlm.compare.__module__ == "frugalvlm.door.comparing"
    assert {"compare", "evaluate"} <= set(dir(frugalvlm))


def test_keys_classes_and_objects_at_budgets(tiny, own):
    result = frugalvlm.compare(
        tiny, ["vanilla", "uniform", Corner, VisionZip(10, 2)], own, [24, "1/9"], 6,
        score=_length, **QUIET,
    )  # fmt: skip
    rows = [(line.method, line.budget) for line in result.frame.itertuples()]
    assert rows == [
        ("vanilla", 144), ("uniform", 24), ("corner", 24), ("uniform", 16), ("corner", 16),
        ("visionzip", 12),
    ]  # fmt: skip
    assert list(result.frame["label"])[-1] == "VisionZip (dominant=10, contextual=2)"
    assert list(result.frame["tokens_mean"]) == [144, 24, 24, 16, 16, 12]
    assert set(result.frame["n"]) == {6}
    assert set(result.frame["images"]) == {3}
    assert len(result.records) == 6
    assert all(r["counts"]["failed"] == 0 for r in result.records)
    assert not result.skipped


def test_numbers_are_those_of_the_kits_statistics(tiny, own):
    result = frugalvlm.compare(tiny, "uniform,fastv", own, [12], 6, score=_length, **QUIET)
    (benchmark,) = [q.benchmark for q in result.data.values()]
    rows = result.data["own"].rows
    sheets = {}
    for record in result.records:
        answers = [answer for _, answer in record["answers"]]
        scores = [_length(a, ()) for a in answers]
        sheets[records.method_key(record)] = benchmark.sheet(rows, answers)
        row = result.frame[result.frame["method"] == records.method_key(record)].iloc[0]
        assert row["score"] == pytest.approx(100 * np.mean(scores))
    for method in ("uniform", "fastv"):
        row = result.frame[result.frame["method"] == method].iloc[0]
        kept = stats.paired_retention(sheets[method], sheets["vanilla"])
        got = row[["retention", "retention_low", "retention_high"]].astype(float)
        assert np.allclose(got, [kept.value, kept.low, kept.high], equal_nan=True)


def test_the_same_call_again_runs_nothing_and_forced_runs_all(tiny, own, monkeypatch):
    def ask():
        return frugalvlm.compare(tiny, [Uniform, Corner], own, [16], 6, **QUIET)

    first = ask()
    calls = []
    true = asking.answer
    monkeypatch.setattr(asking, "answer", lambda *a: calls.append(1) or true(*a))
    again = ask()
    assert not calls
    assert [r["provenance"] for r in again.records] == [r["provenance"] for r in first.records]
    pd.testing.assert_frame_equal(again.frame, first.frame)
    frugalvlm.compare(tiny, [Uniform, Corner], own, [16], 6, force=True, **QUIET)
    assert len(calls) == 3


def test_a_killed_comparison_goes_on(tiny, picture, monkeypatch):
    data = [(picture(i), "what is it?", "a circle") for i in range(40)]  # two batches of 32
    whole = frugalvlm.compare(tiny, ["uniform"], data, [16], 40, folder="whole", **QUIET)
    true, calls = asking.answer, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 4:  # in the second batch of the second row
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(asking, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        frugalvlm.compare(tiny, ["uniform"], data, [16], 40, folder="killed", **QUIET)
    calls.clear()
    monkeypatch.setattr(asking, "answer", lambda *a: calls.append(1) or true(*a))
    resumed = frugalvlm.compare(tiny, ["uniform"], data, [16], 40, folder="killed", **QUIET)
    assert len(calls) == 1, "only the batch that was missing"
    assert [r["answers"] for r in resumed.records] == [r["answers"] for r in whole.records]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_two_data_sets_of_one_name_never_share_records(tiny, own, picture):
    other = [(picture(9), question, answers) for _, question, answers in own]
    one = frugalvlm.compare(tiny, "uniform", own, [16], 6, **QUIET)
    two = frugalvlm.compare(tiny, "uniform", other, [16], 6, **QUIET)
    assert not {i for r in one.records for i, _ in r["answers"]} & {
        i for r in two.records for i, _ in r["answers"]
    }
    assert one.folder == two.folder
    assert len(list(one.folder.glob("*.json"))) == 4


def test_other_code_of_ones_own_class_is_another_run(tmp_path):
    source = (
        "from dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from frugalvlm.methods import Uniform\n\n@dataclass(frozen=True)\n"
        "class Mine(Uniform):\n    key: ClassVar[str] = 'mine'\n"
        "    def reduce(self, view):\n        return {}\n"
    )
    codes = []
    for i, body in enumerate(("super().reduce(view)", "super().reduce(view.patches)")):
        import importlib.util

        path = tmp_path / f"mine{i}.py"
        path.write_text(source.format(body))
        spec = importlib.util.spec_from_file_location(f"mine{i}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        codes.append(code_of(module.Mine(4)))
    assert codes[0] != codes[1]
    assert code_of(Uniform(4)) not in codes


def test_impossible_rows_are_rows_with_their_sentence(no_cls, own):
    result = frugalvlm.compare(no_cls, ["fastervlm", "uniform"], own, [16, 400], 6, **QUIET)
    reasons = {(line.key, line.budget): line.reason for line in result.skipped}
    assert set(reasons) == {("fastervlm", 400), ("uniform", 400), ("fastervlm", 16)}
    assert "no [CLS]" in reasons["fastervlm", 16]
    assert "400 visual tokens is impossible" in reasons["uniform", 400]
    shown = result.table.to_html()
    assert "no [CLS]" in shown
    assert "not possible" in result.table.to_markdown()
    frame = result.frame[result.frame["reason"].str.contains("CLS")]
    assert frame["score"].isna().all()
    assert len(result.records) == 2, "the untouched model and uniform at 16"


def test_what_is_refused_on_the_model_alone_is_known_before_anything_runs(tiny, own, monkeypatch):
    monkeypatch.setattr(asking, "answer", lambda *a: pytest.fail("ran"))
    with pytest.raises(RequestError, match=r"None of the rows can run: .*both reduce tokens"):
        frugalvlm.compare(tiny, Uniform(9) | Uniform(8), own, [], 6, **QUIET)


def test_composed_methods_take_part(tiny, own):
    both = VisionZip(30, 2) | FastV(8, k=4)
    result = frugalvlm.compare(tiny, [both, FastV(8, k=4)], own, [16], 6, **QUIET)
    row = result.frame[result.frame["method"] == "visionzip+fastv"].iloc[0]
    assert row["tokens_mean"] == (4 * 32 + 4 * 8) / 8 == 20
    assert row["budget"] == 20, "what it asks for: its mean over layers"
    assert row["label"] == "VisionZip (dominant=30, contextual=2) + FastV (kept_tokens=8, k=4)"
    told = next(r for r in result.records if records.method_key(r) == "visionzip+fastv")
    assert told["request"]["method"]["parts"] == [p.describe() for p in both.parts]


def test_costs_are_measured_and_shrink_with_n(tiny, own):
    result = frugalvlm.compare(
        tiny, ["fastv", FastV(16, k=4), FastV(16, k=6)], own, [16], 6, repeats=2,
        energy_window_s=0.01, batch=2, progress=False,
    )  # fmt: skip
    (cost,) = records.select(result.records, "efficiency")
    assert cost["request"]["repeats"] == 2
    assert cost["request"]["questions_of"].startswith("own@")
    flops = result.frame.set_index("label")["flops_share"]
    assert 0 < flops["FastV"] < flops["FastV (kept_tokens=16, k=4)"] < 100
    assert flops["FastV (kept_tokens=16, k=4)"] < flops["FastV (kept_tokens=16, k=6)"]
    assert set(result.frame["energy"].dropna()) <= {"modelled", "measured"}
    for column in ("prefill_ms", "decode_ms", "speedup", "joules"):
        assert (result.frame[column] > 0).all(), column
    assert "2 rounds" in result.table.to_html()
    costs = result.costs
    assert [row[0].short for block in costs.blocks for row in block.rows] == list(
        result.frame["label"]
    )
    assert costs.headers[-2:] == ("J per\nquestion", "g CO2e per\n1000 questions")
    assert all(
        ("modelled" in row[-2].short) == (energy == "modelled")
        for row, energy in zip(
            [row for block in costs.blocks for row in block.rows], result.frame["energy"],
            strict=True,
        )
    )  # fmt: skip
    for kind in ("tokens", "flops", "time"):
        ax = result.plot(kind, value="score")
        assert len(ax.containers) == 3
    with pytest.raises(RequestError, match="tokens, flops, time"):
        result.plot("money")


@pytest.mark.parametrize(("n", "rounds", "window"), [(6, 3, 0.2), (100, 5, 0.5), (200, 9, 1.0)])
def test_rounds_by_number_of_questions(tiny, own, monkeypatch, n, rounds, window):
    from frugalvlm.door import comparing

    class Seen(Exception):
        pass

    def efficiency_run(*arguments, **told):
        raise Seen(told)

    monkeypatch.setattr(comparing, "efficiency_run", efficiency_run)
    with pytest.raises(Seen) as seen:
        frugalvlm.compare(tiny, "uniform", own, [16], n, progress=False)
    (told,) = seen.value.args
    assert (told["repeats"], told["energy_window_s"], told["batch"]) == (rounds, window, 8)


def test_several_data_sets_have_a_mean(tiny, own, picture):
    other = [(picture(i), "what color is it?", "red") for i in range(4)]
    result = frugalvlm.compare(
        tiny, "uniform", {"mine": own, "other": other, "kit": "pocket-gqa"}, [16], 6,
        score=_length, **QUIET,
    )  # fmt: skip
    assert list(result.frame["benchmark"]) == ["mine", "other", "kit", "mean"] * 2
    means = result.frame[result.frame["benchmark"] == "mean"]
    assert set(means["n"]) <= {0, 16}
    assert [h.splitlines()[0] for h in result.table.headers] == [
        "method", "tokens", "mine", "other", "kit", "mean",
    ]  # fmt: skip


def test_a_benchmark_object_and_kit_ids(tiny, own):
    bench = own_benchmark(own, "pets", score="vqa_accuracy")
    result = frugalvlm.compare(tiny, "uniform", [bench, "pocket-pope"], [16], 6, **QUIET)
    assert list(dict.fromkeys(result.frame["benchmark"])) == ["pets", "pocket-pope", "mean"]
    assert result.frame["metric"].iloc[0] == "vqa accuracy"


def test_evaluate_is_one_method_beside_the_untouched_model(tiny, own):
    result = frugalvlm.evaluate("uniform", tiny, data=own, budgets=0.25, n=6, **QUIET)
    assert list(result.frame["budget"]) == [144, 36]
    assert "untouched model was added" in " ".join(result.table.caption)
    told = frugalvlm.compare(tiny, ["vanilla", "uniform"], own, [36], 6, **QUIET)
    assert "untouched model was added" not in " ".join(told.table.caption)


def test_any_number_of_patches(folder_of_64, own):
    result = frugalvlm.compare(folder_of_64, ["uniform", "fastv"], own, ["1/4", 7], 6, **QUIET)
    assert list(result.frame["budget"]) == [64, 16, 16, 7, 7]
    assert list(result.frame["tokens_mean"])[:2] == [64, 16]


def test_results_for_documents(tiny, own, tmp_path):
    result = frugalvlm.compare(tiny, ["uniform"], own, [16], 6, score=_length, **QUIET)
    assert isinstance(result, ComparisonResult)
    read = pd.read_csv(result.to_csv(tmp_path / "new" / "out.csv"))
    assert list(read["method"]) == ["vanilla", "uniform"]
    assert read["score"].equals(result.frame["score"].astype(float))
    tex = result.to_latex()
    inside = tex[tex.index("\\midrule") : tex.index("\\bottomrule")]
    assert inside.count("\\\\") >= 2, "a line for the untouched model, and one for the other"
    assert "even grid" in inside
    assert "11.1 \\%" in tex
    assert "even grid & 16/16" in tex
    assert "even grid" in str(result)
    assert "<table>" in result._repr_html_()
    assert "2 rows" in repr(result)


def test_a_loaded_pair_stays_as_it_was(tiny, own):
    model, processor = tiny
    processor.tokenizer.padding_side = "right"
    try:
        frugalvlm.compare(tiny, ["uniform"], own, [16], 6, **QUIET)
        assert processor.tokenizer.padding_side == "right"
    finally:
        processor.tokenizer.padding_side = "left"
    other = type(model)(model.config).eval()
    one = frugalvlm.compare(tiny, ["uniform"], own, [16], 6, **QUIET)
    two = frugalvlm.compare((other, processor), ["uniform"], own, [16], 6, **QUIET)
    assert one.folder != two.folder, "other weights, other records"


def test_progress_counts_every_question_once(tiny, own):
    class Counted:
        steps, begun = 0, 0

        def start(self, description, total):
            self.begun += total

        def advance(self, steps):
            self.steps += steps

    seen = Counted()
    frugalvlm.compare(tiny, ["uniform", "fastv"], own, [16, 8], 6, costs=False, progress=seen)
    assert seen.steps == seen.begun == 5 * 6


def test_a_bar_is_shown_when_asked_for(tiny, own, capsys):
    frugalvlm.compare(tiny, ["uniform"], own, [16], 6, costs=False, progress=True)
    assert "own@" in capsys.readouterr().err
    frugalvlm.compare(tiny, ["uniform"], own, [16], 6, costs=False)
    assert not capsys.readouterr().err, "nobody sees it here"


def test_a_guided_method_takes_a_small_model(tiny, own):
    small = type(tiny[0])(tiny[0].config).eval(), tiny[1]
    result = frugalvlm.compare(tiny, ["sgl"], own, [16], 6, guide=small, **QUIET)
    told = next(r for r in result.records if records.method_key(r) == "sgl")
    assert told["request"]["method"]["guide"].split("@")[0] == "LlavaForConditionalGeneration"


def test_a_score_of_zero_is_said_to_have_no_retention(tiny, own):
    result = frugalvlm.compare(tiny, "uniform", own, [16], 6, score=lambda a, b: 0.0, **QUIET)
    row = result.frame.iloc[1]
    assert row["score"] == 0
    assert math.isnan(row["retention"])
    assert "scores zero" in row["reason"]
    assert "undefined" in result.table.to_markdown()


def test_scored_knows_the_same_questions(tiny, own):
    result = frugalvlm.compare(tiny, "uniform", own, [16], 6, **QUIET)
    by_id = {q.benchmark.id: q for q in result.data.values()}
    scored = Scored(result.records, benchmarks=by_id)
    assert scored.total == 144


def test_visual_gain_stands_beside_retention_where_blank_pictures_were_asked(tiny, own):
    result = frugalvlm.compare(
        tiny, ["blank", "no_image", "uniform"], own, [24, 16], 6, score=_length, **QUIET
    )
    rows = [(line.method, line.budget) for line in result.frame.itertuples()]
    assert rows == [("vanilla", 144), ("blank", 144), ("uniform", 24), ("uniform", 16),
                    ("no_image", 1)], "once each: no budget matters"  # fmt: skip
    score = result.frame.set_index(["method", "budget"])["score"]
    whole, blank = score["vanilla", 144], score["blank", 144]
    kept = result.frame.set_index(["method", "budget"])["gain"]
    for at in kept.index:
        expected = 100 * (score[at] - blank) / (whole - blank) if whole > blank else math.nan
        assert kept[at] == pytest.approx(expected, nan_ok=True)
    assert "visual" in " ".join(result.table.headers) or kept.isna().all()
    alone = frugalvlm.compare(tiny, ["uniform"], own, [24], 6, score=_length, **QUIET)
    assert alone.frame["gain"].isna().all()
    assert "add 'blank'" in " ".join(alone.table.caption)
