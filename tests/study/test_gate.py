"""The gate lets in what reads late and by itself, and keeps out what does not."""

import json

import numpy as np
import pytest
import torch

from frugalvlm.benchmarks import BENCHMARKS
from frugalvlm.benchmarks.asking import Batches
from frugalvlm.loading import load_vlm
from frugalvlm.probes.controls import RandomCut
from frugalvlm.probes.gate import Places, Scored, gate, judge, none_behind, random_of
from frugalvlm.views import UnsupportedError

PLACES = Places(depth=12, patches=144)
N = 200
# Percent right: a model as LLaVA-1.5 is, floor 50.
GOOD = {
    "untouched": 90, "blank": 50, "oracle": 88, "cls": 82, "fastv": 80, "random cut": 70,
    none_behind(3): 55, none_behind(9): 90,
    **dict(zip(map(random_of, PLACES.budgets), (88, 84, 79, 75, 66, 60), strict=True)),
}  # fmt: skip


def _runs(scores: dict[str, float], salient: float = 0.5, benchmarks: int = 2) -> dict:
    """Runs in which the same questions are hard, so that the runs are nested."""
    rows = [{"image_id": str(i // 2), "category": "x"} for i in range(N)]
    hard = np.random.default_rng(0).permutation(N)
    about = np.arange(N) < salient * N
    return {
        key: {
            f"bench{b}": Scored(rows, (hard < round(score * N / 100)).astype(float), about)
            for b in range(benchmarks)
        }
        for key, score in scores.items()
    }


def _failed(**changes: float) -> set[str]:
    scores = GOOD | {key.replace("_", " "): value for key, value in changes.items()}
    found = judge(_runs(scores), PLACES, "dev", N)
    assert found.passed == all(c.passed for c in found.conditions)
    return {c.key for c in found.conditions if not c.passed}


def test_a_good_model_passes() -> None:
    assert _failed() == set()


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"untouched": 84, "none_behind_9": 84, "random_108": 82}, {"untouched"}),
        ({"blank": 72}, {"gap"}),
        ({"none_behind_3": 70}, {"early"}),
        ({"none_behind_9": 87}, {"late"}),
        ({"fastv": 69}, {"ranking"}),
        ({"cls": 70}, {"salience"}),
        ({"random_108": 66, "random_72": 65, "random_48": 64, "random_32": 63, "random_16": 62},
         {"smooth"}),
        ({"random_8": 72}, {"falling"}),
    ],
)  # fmt: skip
def test_every_condition_keeps_a_model_out(changes: dict[str, float], fails: set[str]) -> None:
    assert _failed(**changes) == fails


def test_shares_are_of_the_visual_gain_and_intervals_hold_their_values() -> None:
    found = judge(_runs(GOOD), PLACES, "dev", N)
    early = next(c for c in found.conditions if c.key == "early")
    assert early.value == pytest.approx(100 * (55 - 50) / (90 - 50))
    assert found.curve == {0: 0.0, 3: 12.5, 9: 100.0, 12: 100.0}
    for condition in found.conditions:
        assert condition.low <= condition.value <= condition.high


def test_a_bound_inside_the_interval_is_not_certain() -> None:
    close = judge(_runs(GOOD | {none_behind(3): 64}), PLACES, "dev", N)
    early = next(c for c in close.conditions if c.key == "early")
    assert not early.passed
    assert not early.certain
    assert next(c for c in close.conditions if c.key == "late").certain


def test_only_salient_questions_decide_about_salience() -> None:
    runs = _runs(GOOD)
    for scored in runs["cls"].values():  # wrong on everything that is not salient
        scored.correct[~scored.salient] = 0
    found = judge(runs, PLACES, "dev", N)
    assert next(c for c in found.conditions if c.key == "salience").passed
    for by in runs.values():  # nobody labelled the questions: all of them count
        for scored in by.values():
            scored.salient[:] = False
    found = judge(runs, PLACES, "dev", N)
    assert found.salient is None
    assert not next(c for c in found.conditions if c.key == "salience").passed


@pytest.mark.parametrize(("depth", "where"), [(32, (8, 24, 2)), (12, (3, 9, 1)), (4, (1, 3, 1))])
def test_places_scale_with_the_depth(depth: int, where: tuple[int, int, int]) -> None:
    places = Places(depth, 576)
    assert (places.early, places.late, places.cut) == where
    assert places.ninth == 64


def test_the_first_generation_is_measured_and_kept_out() -> None:
    """It has read its pictures in the first quarter of its layers."""
    model, processor = load_vlm("pocket-llava-base")
    found = gate(model, processor, {"pocket-gqa": BENCHMARKS["pocket-gqa"]}, 12)
    assert not found.passed
    early = next(c for c in found.conditions if c.key == "early")
    assert "behind layer 3 of 12" in early.says
    assert early.value > 60
    assert set(found.frame().index) == {c.key for c in found.conditions}
    assert json.loads(json.dumps(found.record()))["passed"] is False


def test_a_random_cut_keeps_its_number_behind_its_layer_and_the_same_ones_again() -> None:
    model, processor = load_vlm("pocket-llava-small")
    benchmark = BENCHMARKS["pocket-gqa"]
    batches = Batches(benchmark, processor, "dev", 3, "cpu")
    inputs = batches.batches[0][1]
    logits = []
    for seed in (0, 0, 1):
        with RandomCut(16, 2, seed).on(model) as trace, torch.inference_mode():
            logits.append(model(**inputs).logits[:, -1])
        assert list(trace.tokens_per_layer) == [144, 144, 16, 16, 16, 16]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    with pytest.raises(UnsupportedError, match="1 to 5, not 6"), RandomCut(16, 6).on(model):
        pass
    with pytest.raises(UnsupportedError, match="RandomCut"):
        RandomCut.for_budget(16)
