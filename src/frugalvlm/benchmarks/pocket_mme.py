"""pocket-mme: a yes and a no question per picture and category; accuracy plus accuracy+, as MME.

Five categories stand for MME's existence, count, position, color and OCR. MME's perception score
has ten (at most 2,000); this one is at most 1,000.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frugalvlm.benchmarks.base import (
    Asked,
    Benchmark,
    Row,
    Sheet,
    category_accuracy,
    sum_per_image,
)
from frugalvlm.benchmarks.metrics import mme_label, mme_score
from frugalvlm.pocket.questions import (
    RELATIONS,
    Question,
    color_check,
    count_check,
    countables,
    kind_presence,
    number_check,
    relation_check,
    unique_kinds,
    wrong_color,
    wrong_count,
    wrong_number,
)
from frugalvlm.pocket.scenes import KINDS, MAX_THINGS, Scene

CATEGORIES = ("existence", "count", "position", "color", "ocr")
Pair = tuple[Question, Question]  # the answer to the first is yes, to the second no


def _ask(scene: Scene, number: int, rng: np.random.Generator) -> Asked | None:
    """All five pairs, about scenes with a plate and two things that can be named by kind."""
    if scene.plate is None or len(unique_kinds(scene)) < 2:
        return None
    pairs = (
        _existence(scene, rng), _count(scene, rng), _position(scene, rng), _color(scene, rng),
        _ocr(scene.plate.number, scene, rng),
    )  # fmt: skip
    return [(c, question) for c, pair in zip(CATEGORIES, pairs, strict=True) for question in pair]


def _existence(scene: Scene, rng: np.random.Generator) -> Pair:
    present = sorted({t.kind for t in scene.things})
    absent = [kind for kind in KINDS if kind not in present]
    return (
        kind_presence(scene, str(rng.choice(present))),
        kind_presence(scene, str(rng.choice(absent))),
    )


def _count(scene: Scene, rng: np.random.Generator) -> Pair:
    what = str(rng.choice(countables(scene)))
    checks = [count_check(scene, what, number) for number in range(MAX_THINGS + 1)]
    true = [check.answer for check in checks].index("yes")
    return checks[true], count_check(scene, what, wrong_count(true, rng))


def _position(scene: Scene, rng: np.random.Generator) -> Pair:
    named = unique_kinds(scene)
    i, j = rng.choice(len(named), 2, replace=False)
    a, b = named[i], named[j]
    word = str(rng.choice([word for word, holds in RELATIONS.items() if holds(a, b)]))
    return relation_check(a, b, word), relation_check(b, a, word)


def _color(scene: Scene, rng: np.random.Generator) -> Pair:
    named = unique_kinds(scene)
    thing = named[int(rng.integers(len(named)))]
    wrong = wrong_color(scene, thing, rng)
    return color_check(scene, thing, thing.color), color_check(scene, thing, wrong)


def _ocr(number: str, scene: Scene, rng: np.random.Generator) -> Pair:
    return number_check(scene, number), number_check(scene, wrong_number(number, rng))


def _score(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    """Pairs are the two rows with one picture and one category.

    Raises:
        ValueError: when a pair is incomplete.
    """
    correct = np.array(
        [
            a is not None and mme_label(a) == row["answer"]
            for row, a in zip(rows, answers, strict=True)
        ],
        dtype=np.float64,
    )
    pairs: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        pairs.setdefault((row["image_id"], row["category"]), []).append(i)
    # Columns per category: right, both right, pairs; a pair is entered in its first row.
    counts = np.zeros((len(rows), len(CATEGORIES), 3))
    for (image_id, category), members in pairs.items():
        if len(members) != 2:
            raise ValueError(
                f"MME is scored in pairs, but {image_id} has {len(members)} {category} rows; "
                "cut the data set between pictures."
            )
        right = correct[members].sum()
        counts[members[0], CATEGORIES.index(category)] = right, right == 2, 1
    ids, stats = sum_per_image(rows, counts.reshape(len(rows), -1))
    details = category_accuracy(rows, correct)
    both = stats.sum(0).reshape(len(CATEGORIES), 3)
    details |= {
        f"accuracy+/{category}": float(100 * both_right / n)
        for category, (_, both_right, n) in zip(CATEGORIES, both, strict=True)
        if n
    }
    details["percent"] = 100 * float(_total(stats.sum(0))) / POCKET_MME.headline_max
    return Sheet(ids, stats, correct, _total, details=details)


def _total(totals: np.ndarray) -> np.ndarray:
    """Sum over the categories of accuracy plus accuracy+, 0 to 1,000."""
    counts = totals.reshape(*totals.shape[:-1], len(CATEGORIES), 3)
    return mme_score(counts[..., 0], counts[..., 1], counts[..., 2]).sum(-1)


POCKET_MME = Benchmark(
    id="pocket-mme",
    stands_for="MME",
    metric="accuracy plus accuracy+, summed over categories",
    headline_max=200.0 * len(CATEGORIES),
    max_new_tokens=3,
    first_seed=3_000_000,
    per_image=2 * len(CATEGORIES),
    ask=_ask,
    score=_score,
)
