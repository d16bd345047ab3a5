"""The second generation's benchmarks ask what they promise, half of it about what stands out."""

from collections import Counter

import numpy as np
import pytest

from frugalvlm.benchmarks import ALL_BENCHMARKS
from frugalvlm.benchmarks.base import SEEDS_PER_SPLIT, without_pictures
from frugalvlm.benchmarks.second import SECOND_BENCHMARKS, SECOND_EXTRAS
from frugalvlm.probes.controls import ranked_patches

N = 48
SECOND = (*SECOND_BENCHMARKS.values(), *SECOND_EXTRAS.values())


@pytest.fixture(scope="module", params=list(SECOND_BENCHMARKS))
def benchmark_and_rows(request):
    benchmark = SECOND_BENCHMARKS[request.param]
    return benchmark, list(without_pictures(benchmark.dataset("dev", N)))


def test_a_right_sheet_is_perfect_and_a_silent_one_is_not(benchmark_and_rows) -> None:
    benchmark, rows = benchmark_and_rows
    assert benchmark.sheet(rows, [r["answer"] for r in rows]).headline == 100.0
    assert benchmark.sheet(rows, [None] * len(rows)).headline == 0.0


def test_half_of_the_questions_are_about_what_stands_out(benchmark_and_rows) -> None:
    benchmark, rows = benchmark_and_rows
    share = np.mean([r["category"].startswith("salient/") for r in rows])
    assert share == (1.0 if benchmark.printed else 0.5)
    for row in rows:
        scene = benchmark.make("dev", row["scene_seed"])
        main = scene.salient
        alone = main is not None and row["about"] == [[main.row, main.col]]
        assert row["category"].startswith("salient/") == (alone or benchmark.printed)


def test_print_is_asked_about_in_its_own_benchmark_only(benchmark_and_rows) -> None:
    benchmark, rows = benchmark_and_rows
    for row in rows:
        printed = benchmark.make("dev", row["scene_seed"]).plate is not None
        assert printed == (benchmark.id == "pocket-textvqa-2")


def test_wanted_answers_take_turns(benchmark_and_rows) -> None:
    _, rows = benchmark_and_rows
    answers = Counter(r["answer"] for r in rows)
    if set(answers) <= {"yes", "no"}:
        assert abs(answers["yes"] - answers["no"]) <= 4
    if set(answers) <= set("ABCD"):
        assert max(answers.values()) - min(answers.values()) <= 8


def test_half_of_the_hints_are_right() -> None:
    rows = without_pictures(SECOND_BENCHMARKS["pocket-textvqa-2"].dataset("dev", N))
    right = [r["question"].endswith(r["answer"]) for r in rows]
    assert np.mean(right) == 0.5
    wrong = [r for r, good in zip(rows, right, strict=True) if not good]
    for row in wrong:
        pairs = zip(row["question"][-3:], row["answer"], strict=True)
        assert sum(a != b for a, b in pairs) == 1


def test_a_dialogue_and_a_caption_are_scored() -> None:
    for benchmark in SECOND_EXTRAS.values():
        rows = list(without_pictures(benchmark.dataset("dev", 12)))
        assert benchmark.sheet(rows, [r["answer"] for r in rows]).headline == 100.0
        assert benchmark.sheet(rows, ["a red"] * len(rows)).headline < 50
    dialogue = SECOND_EXTRAS["pocket-dialogue-2"].dataset("dev", 12)
    assert all("</s>USER: " in q for q in dialogue["question"])


def test_seeds_meet_no_other_benchmark() -> None:
    firsts = sorted(b.first_seed for b in (*ALL_BENCHMARKS.values(), *SECOND))
    assert min(np.diff(firsts)) >= 2 * SEEDS_PER_SPLIT or len(set(firsts)) == len(firsts)
    second = [b.first_seed for b in SECOND]
    assert min(second) > max(b.first_seed for b in ALL_BENCHMARKS.values()) + 2 * SEEDS_PER_SPLIT
    assert max(second) + 2 * SEEDS_PER_SPLIT <= 100_000_000  # where training begins


def test_a_ninth_of_the_patches_holds_all_that_is_asked_about(benchmark_and_rows) -> None:
    benchmark, rows = benchmark_and_rows
    for row in rows[:12]:
        scene = benchmark.make("dev", row["scene_seed"])
        kept = set(ranked_patches(scene, [tuple(c) for c in row["about"]], (12, 12))[:16])
        boxes = [(t.x, t.y, t.size, t.size) for t in scene.things
                 if [t.row, t.col] in row["about"]]  # fmt: skip
        if scene.plate is not None:
            boxes.append((scene.plate.x, scene.plate.y, *scene.plate.size))
        touched = {
            y // 8 * 12 + x // 8
            for left, top, width, height in boxes
            for x in range(left, left + width)
            for y in range(top, top + height)
        }
        assert touched <= kept
