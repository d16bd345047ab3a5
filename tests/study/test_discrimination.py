"""The oracle keeps what a question is about, in any batch; sentences follow from the numbers."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from frugalvlm.benchmarks import BENCHMARKS, asking, load_benchmark
from frugalvlm.engine.tower_once import tower_once
from frugalvlm.methods import Blank, Downsample, FasterVLM, NoImageAfter, Random, Vanilla
from frugalvlm.pocket.scenes import Plate, Scene, Thing, make_scene
from frugalvlm.probes import discrimination as study
from frugalvlm.probes.controls import (
    Chosen,
    blanked,
    coverage,
    oracle_for,
    ranked_patches,
)
from frugalvlm.views import UnsupportedError

GRID = (12, 12)


@pytest.fixture(scope="module")
def batches(tiny):
    return asking.Batches(load_benchmark("pocket-gqa"), tiny[1], "test", 12, "cpu")


def _cells_of(patches):
    """The 3x3 cell (row, column) of each patch of a 12x12 grid."""
    return {(p // 12 // 4, p % 12 // 4) for p in patches}


# A red thing at the top right, a blue one at the bottom middle, a plate in the left middle.
SCENE = Scene(
    "test", 0,
    (Thing("circle", "red", 0, 2, x=66, y=4, size=20),
     Thing("square", "blue", 2, 1, x=40, y=72, size=16)),
    Plate("123", 1, 0, x=4, y=36, scans=(0, 1, 2)),
)  # fmt: skip


# -- which patches -------------------------------------------------------------------------------


def test_coverage_is_that_of_the_boxes():
    covered = coverage(SCENE, GRID)
    assert covered[9:11, 5:7].tolist() == [[1.0, 1.0], [1.0, 1.0]]  # x 40..56, y 72..88
    assert covered[0, 8:11].tolist() == [0.375, 0.5, 0.375]  # x 66..86, y 4..8
    assert covered.sum() * 64 == 20 * 20 + 16 * 16 + 54 * 22


def test_the_asked_cell_comes_first_and_its_covered_patches_before_the_rest():
    ranked = ranked_patches(SCENE, [(0, 2)], GRID)
    assert sorted(ranked) == list(range(144))
    assert _cells_of(ranked[:16]) == {(0, 2)}
    # x 66..86 and y 4..24 touch columns 8 to 10 and rows 0 to 2; the middle is covered whole.
    touched = {r * 12 + c for r in (0, 1, 2) for c in (8, 9, 10)}
    assert set(ranked[:9]) == touched
    assert ranked[0] in {1 * 12 + 9, 2 * 12 + 9}
    # Then what other things touch, the plate among them, then the ground.
    others = {p for p in range(144) if coverage(SCENE, GRID).flat[p]} - touched
    assert set(ranked[16 : 16 + len(others)]) == others


def test_a_transposed_grid_or_cell_is_told_apart():
    """The wrong twin: columns taken for rows keeps another corner."""
    wrong = [p % 12 * 12 + p // 12 for p in ranked_patches(SCENE, [(0, 2)], GRID)[:16]]
    assert _cells_of(wrong) == {(2, 0)}
    assert _cells_of(ranked_patches(SCENE, [(2, 0)], GRID)[:16]) == {(2, 0)}


def test_cells_take_turns_under_a_small_budget():
    ranked = ranked_patches(SCENE, [(0, 2), (2, 1)], GRID)
    for budget in (2, 4, 6, 8):
        cells = [next(iter(_cells_of([p]))) for p in ranked[:budget]]
        assert cells.count((0, 2)) == cells.count((2, 1)) == budget // 2
    assert set(ranked[:8]) >= {9 * 12 + 5, 9 * 12 + 6, 10 * 12 + 5, 10 * 12 + 6}
    assert _cells_of(ranked[:32]) == {(0, 2), (2, 1)}


def test_questions_about_nothing_get_the_things():
    covered = coverage(SCENE, GRID).ravel() > 0
    ranked = ranked_patches(SCENE, [], GRID)
    assert covered[ranked[: covered.sum()]].all()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_scenes_are_rebuilt_as_they_were_asked_about(name):
    data = load_benchmark(name).dataset("test", 20)
    for row in data:
        scene = make_scene("test", row["scene_seed"])
        assert np.array_equal(np.asarray(row["image"]), np.asarray(scene.image()))
        things = {(t.row, t.col) for t in scene.things} | set(scene.plate.cells if scene.plate
                                                              else ())  # fmt: skip
        assert {(r, c) for r, c in row["about"]} <= things


# -- on a model ----------------------------------------------------------------------------------


def test_the_oracle_keeps_the_asked_cells_in_a_batch(tiny, batches):
    oracle = oracle_for(batches, "test", GRID, 48)
    ids, inputs = batches.batches[0]
    rows = {row["question_id"]: row for row in batches.rows}
    with oracle(ids).on(tiny[0]) as trace, torch.no_grad():
        tiny[0](**inputs)
        kept = [set(k) for k in trace.kept]
    assert len(kept) == len(ids)
    assert trace.tokens_per_layer == [48.0] * 8
    shown = set()
    for own, i in zip(kept, ids, strict=True):
        asked = {tuple(cell) for cell in rows[i]["about"]}
        assert len(asked) <= 3, "a budget of 48 holds three cells"
        assert {p for p in range(144) if _cells_of([p]) <= asked} <= own
        shown.add(frozenset(own))
    assert len(shown) > len({rows[i]["image_id"] for i in ids}), "it depends on the question"


def test_a_batch_equals_its_prompts_one_by_one(tiny, batches):
    model, processor = tiny
    oracle = oracle_for(batches, "test", GRID, 16)
    ids, inputs = batches.batches[0]
    with oracle(ids).on(model), torch.no_grad():
        together = model(**inputs).logits[:, -1]
    data = load_benchmark("pocket-gqa").dataset("test", 12)
    place = {row["question_id"]: i for i, row in enumerate(batches.rows)}
    for row, i in enumerate(ids[:4]):
        one = data[place[i]]
        alone = asking.prepare(processor, [one["image"]], [one["question"]], "cpu")
        with oracle([i]).on(model), torch.no_grad():
            logits = model(**alone).logits[0, -1]
        torch.testing.assert_close(together[row], logits, rtol=1e-4, atol=1e-5)


def test_patches_that_do_not_fit_the_batch_are_refused(tiny, batches):
    inputs = batches.batches[0][1]
    with (
        pytest.raises(UnsupportedError, match=r"1 crops and the batch has 12"),
        Chosen(((0, 1),)).on(tiny[0]),
        torch.no_grad(),
    ):
        tiny[0](**inputs)
    for patches in (((0, 1), (2,)), ((0, 0),), ((0, 144),)):
        with pytest.raises(UnsupportedError), Chosen(patches).on(tiny[0]):
            pass
    with pytest.raises(UnsupportedError):
        Chosen.for_budget(16, 144)


def test_blank_pictures_are_all_alike(batches):
    blank = blanked(batches)
    assert blank.ids == batches.ids
    assert not any(inputs["pixel_values"].any() for _, inputs in blank.batches)
    assert all(inputs["pixel_values"].any() for _, inputs in batches.batches), "untouched"
    assert Blank().describe() == {"method": "blank"}


@pytest.mark.parametrize("method", [Vanilla(), Random(16), FasterVLM(16), Downsample(16),
                                    NoImageAfter(3)], ids=lambda m: m.key)  # fmt: skip
def test_a_tower_that_runs_once_changes_no_answer(method, tiny, batches):
    model, inputs = tiny[0], batches.batches[0][1]
    with torch.no_grad(), method.on(model):
        expected = model(**inputs).logits
    with torch.no_grad(), tower_once(model):
        model(**{**inputs, "pixel_values": -inputs["pixel_values"]})  # other pictures, same shape
        model(**inputs)
        with method.on(model):
            again = model(**inputs).logits
    assert torch.equal(again, expected)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_tower_is_restored_after_an_error(tiny):
    with pytest.raises(RuntimeError, match="stop"), tower_once(tiny[0]):
        raise RuntimeError("stop")
    assert not any("forward" in module.__dict__ for module in tiny[0].modules())


# -- records and what they say -------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRUGALVLM_RESULTS", str(results))
        run = lambda: study.run(str(folder), 12, benchmarks=["pocket-gqa"], budgets=[16, 8])  # noqa: E731
        first = run()
        patch.setattr(asking, "answer", None)  # a second run asks nothing
        assert [r["answers"] for r in run()] == [r["answers"] for r in first]
    assert len(list((results / "pocket/benchmarks/records").glob("*.json"))) == 2 + 2 * 4
    return first


def test_every_control_leaves_a_record_at_its_budget(made):
    keys = [(r["request"]["method"]["method"], r["request"]["budget"]) for r in made]
    assert keys[:2] == [("vanilla", 144), ("blank", 144)]
    assert set(keys[2:]) == {
        (key, b) for key in ("random", "uniform", "downsample", "oracle") for b in (16, 8)
    }
    for record in made:
        assert record["counts"]["failed"] == 0
        assert record["tokens"]["per_layer"][-1] <= record["request"]["budget"]
    oracle = next(r for r in made if r["request"]["method"]["method"] == "oracle")
    assert oracle["request"]["method"] == {"method": "oracle", "kept_tokens": 16}


def test_tables_show_every_choice_and_the_difference(made):
    frame = study.accuracies(made)
    shown = study.discrimination_table(made, frame).to_markdown()
    for text in ("oracle − random", "untouched − random", "16 of 144", "downsampled image", "gqa"):
        assert text in shown
    at = frame.set_index(["method", "budget"])
    gap = at.loc[("oracle", 16), "accuracy"] - at.loc[("random", 16), "accuracy"]
    assert at.loc[("oracle", 16), "over_random"] == pytest.approx(gap)
    assert "pocket-gqa" in study.blank_table(made, frame).to_markdown()


def test_records_about_other_questions_are_refused(made):
    record = {**made[0], "provenance": {**made[0]["provenance"], "data_hash": "other"}}
    with pytest.raises(study.RecordError, match="run it again"):
        study.accuracy_sheet(record)


@dataclass(frozen=True)
class _Suite:
    """Made-up records: shares of right answers by method and benchmark."""

    make: object

    def frame(self, shares, n=200):
        names = list(self.make.benchmarks)
        records = []
        for name in names:
            for key, share in shares.items():
                budget = 144 if key in ("vanilla", "blank") else 16
                right = share[names.index(name)] if isinstance(share, list) else share
                records.append(self.make.accuracy(key, budget, name, right, n=n))
        sheet = lambda r: self.make.benchmarks[r["request"]["benchmark"]].sheet(  # noqa: E731
            self.make.benchmarks[r["request"]["benchmark"]].dataset("test", n),
            [a for _, a in r["answers"]],
        )
        return study.accuracies(records, sheet)


def test_goals_are_judged_by_the_numbers(make):
    suite = _Suite(make)
    met = suite.frame({"vanilla": 0.95, "random": 0.4, "oracle": [0.9] * 4 + [0.45] * 2})
    oracle, vanilla = study.goals(met)
    assert oracle.startswith("Reached: at 16 tokens the oracle")
    assert "on 4 of 6 benchmarks" in oracle
    assert "whole 95 % interval on 4" in oracle
    assert vanilla.startswith("Reached")
    missed = suite.frame({"vanilla": 0.54, "random": 0.4, "oracle": [0.9] * 3 + [0.58] * 3})
    oracle, vanilla = study.goals(missed)
    assert oracle.startswith("Not reached")
    assert "on 3 of 6" in oracle
    assert vanilla.startswith("Not reached")
    assert "on 0 of 6" in vanilla


def test_unmeasured_goals_say_so(make):
    frame = _Suite(make).frame({"vanilla": 0.9, "random": 0.5})
    assert study.goals(frame)[0].startswith("Not measured")
    higher = replace(study.GOALS[1], tokens=8)
    assert study.goals(frame, [higher])[0].startswith("Not measured")
