"""A benchmark that needs no picture enters no mean, and is named where the mean is shown."""

import json
import math

import pytest
import torch

from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.loading import model_hash
from frugalvlm.papers import load_paper
from frugalvlm.pocket.installed import save_vlm, write_hashes
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.probes import training as train
from frugalvlm.report.tables import accuracy_table
from frugalvlm.report.verdict_table import verdict_table
from frugalvlm.verdicts.guard import Guard, guard_of
from frugalvlm.verdicts.scored import Scored
from frugalvlm.verdicts.verdicts import verdicts

VISIONZIP = load_paper("visionzip")
COLUMNS = [column.id for column in VISIONZIP.table("table1").columns]


def worth(value: float, low: float, high: float = 99.0) -> Estimate:
    return Estimate(value, low, high, 600, 200)


SEEING = {name: worth(60.0, 50.0) for name in COLUMNS}
BLIND = Guard({**SEEING, "pocket-pope": worth(3.2, -1.0, 7.0), "pocket-mme": worth(7.3, 4.0, 9.0)})


@pytest.mark.parametrize(
    ("value", "low", "enters"),
    [
        (10.0, 0.1, True),
        (9.9, 5.0, False),  # surely something, but too little
        (30.0, 0.0, False),  # a lot, but perhaps nothing
        (30.0, math.nan, False),
        (-40.0, -50.0, False),
    ],
)
def test_the_rule(value: float, low: float, enters: bool) -> None:
    guard = Guard({"a": worth(value, low), "b": worth(60.0, 50.0)})
    assert guard.admits("a") is enters
    assert guard.admitted(["a", "b"]) == (["a", "b"] if enters else ["b"])
    assert guard.admitted(["a"]) == ["a"], "one benchmark is no mean"
    assert guard.admits("never scored")
    assert ("Not in the mean: a (" in " ".join(guard.notes(["a", "b"]))) is not enters


def records(make):
    """VisionZip keeps half of what is right, but all of it where nothing needs the pictures."""
    made = [make.accuracy("vanilla", 144, name) for name in COLUMNS]
    for name in COLUMNS:
        made.append(
            make.accuracy("visionzip", 48, name, 1.0 if BLIND.admits(name) is False else 0.5)
        )
    return made


def test_a_mean_leaves_out_what_needs_no_picture(make) -> None:
    guarded = Scored(records(make), benchmarks=make.benchmarks, guard=BLIND)
    free = Scored(records(make), benchmarks=make.benchmarks, guard=Guard(SEEING))
    inside = [name for name in COLUMNS if name not in ("pocket-pope", "pocket-mme")]
    mean = guarded.retention("visionzip", 48, COLUMNS)
    assert mean == free.retention("visionzip", 48, inside)
    assert mean.value == pytest.approx(50, abs=3)
    assert mean.n_questions == 4 * 40
    assert free.retention("visionzip", 48, COLUMNS).value == pytest.approx(
        4 / 6 * 50 + 2 / 6 * 100, abs=3
    )
    alone = guarded.retention("visionzip", 48, ["pocket-pope"])
    assert alone.value == 100, "its own column stays"
    nothing = Guard({name: worth(0.0, -1.0) for name in COLUMNS})
    assert Scored(records(make), benchmarks=make.benchmarks, guard=nothing).retention(
        "visionzip", 48, COLUMNS) is None  # fmt: skip


def test_the_table_names_what_it_leaves_out(make) -> None:
    def table(guard):
        return accuracy_table(
            VISIONZIP, "table1", records(make), benchmarks=make.benchmarks, guard=guard
        )

    def mean(shown):
        frame = shown.data
        rows = frame[(frame["benchmark"] == "mean") & (frame["method"] == "visionzip")]
        return rows[rows["budget"] == 48].iloc[0]

    guarded, free = table(BLIND), table(Guard(SEEING))
    (note,) = [line for line in guarded.caption if line.startswith("Not in the mean")]
    assert "pocket-pope (3.2 [-1.0, 7.0]), pocket-mme (7.3 [4.0, 9.0])" in note
    assert "pocket-gqa" not in note
    assert note in guarded.to_markdown()
    assert not any(line.startswith("Not in the mean") for line in free.caption)
    assert mean(guarded)["retention"] < 55 < mean(free)["retention"]
    frame = guarded.data
    own = frame[(frame["method"] == "visionzip") & (frame["budget"] == 48)].set_index("benchmark")
    assert own.loc["pocket-pope", "retention"] == 100
    beside = own.loc[[n for n in COLUMNS if BLIND.admits(n)], "paper_retention"]
    assert mean(guarded)["paper_retention"] == pytest.approx(beside.mean())
    assert mean(guarded)["paper_retention"] != pytest.approx(mean(free)["paper_retention"])
    unknown = [line for line in table(Guard()).caption if "blank pictures" in line]
    assert len(unknown) == 1
    assert "any benchmark" in unknown[0]


def test_verdicts_rest_on_the_same_mean(make) -> None:
    def third(guard):
        found = verdicts(
            VISIONZIP, records(make), "pocket", benchmarks=make.benchmarks, guard=guard
        )
        return next(v for v in found if v.claim.id == "retention-third"), verdict_table(found)

    verdict, shown = third(BLIND)
    assert verdict.value == pytest.approx(50, abs=3)
    assert verdict.left_out == ("pocket-pope", "pocket-mme")
    (note,) = [line for line in shown.caption if line.startswith("Not in the means")]
    assert "retention-third" in note
    assert "pocket-pope, pocket-mme; the untouched model" in note
    verdict, shown = third(Guard(SEEING))
    assert verdict.value > 60
    assert verdict.left_out == ()
    assert not any(line.startswith("Not in") for line in shown.caption)
    verdict, _ = third(Guard({name: worth(0.0, -1.0) for name in COLUMNS}))
    assert verdict.status == "not measured"
    assert "as well from blank pictures" in verdict.sentence


# ---- where the scores come from


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A model whose picture is worth nothing, with its scores, in a data folder of its own."""
    monkeypatch.setenv("FRUGALVLM_DATA", str(tmp_path))
    monkeypatch.setattr(train, "CARD_QUESTIONS", 12)
    torch.manual_seed(0)
    model, processor = build_model("pocket-llava-tiny").eval(), build_processor()
    folder = tmp_path / "models" / "pocket-llava-tiny"
    save_vlm(model, processor, folder)
    scores = {b: train.score(model, processor, b) for b in ("pocket-mme", "pocket-caption")}
    (folder / "scores.json").write_text(json.dumps(scores))
    write_hashes(folder)
    return scores


def test_the_installed_scores_make_the_guard(installed) -> None:
    for score in installed.values():
        points = score["seeing_accuracy"] - score["blank_accuracy"]
        assert score["difference"]["value"] == pytest.approx(points)
        assert score["difference"]["n_questions"] == score["n"] >= 12
    setting = {"model": "pocket-llava-tiny", "model_hash": model_hash("pocket-llava-tiny")}
    guard = guard_of(setting)
    assert set(guard.worth) == set(installed)
    stored = Estimate(**installed["pocket-mme"]["difference"])
    assert repr(guard.worth["pocket-mme"]) == repr(stored), "not-a-number equals itself"
    assert guard.admitted(["pocket-mme", "pocket-caption"]) == [], "untrained, it sees nothing"
    for other in ({"model_hash": "x"}, {"model": "pocket-llava-base"}, {"model": "a/hub-model"}):
        assert guard_of({**setting, **other}) == Guard(), "nothing is known of other weights"
    assert guard_of({}) == Guard()
