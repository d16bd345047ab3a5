"""pocket-pope: is a coloured kind in the picture? The mean of three categories' F1, as for POPE.

Six questions per picture, three about pairs that it shows and three about pairs that it does not.
POPE asks every picture in each of its three categories and so repeats the three positive questions;
here pictures take the categories in turn, and no question is asked twice.
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
from frugalvlm.benchmarks.metrics import f1, pope_label
from frugalvlm.pocket.questions import absent_pair, presence, present_pairs
from frugalvlm.pocket.scenes import Scene

CATEGORIES = ("random", "popular", "adversarial")  # how absent pairs are chosen
OF_EACH = 3  # present and absent pairs per picture


def _ask(scene: Scene, number: int, rng: np.random.Generator) -> Asked | None:
    """Three present and three absent pairs. All categories draw from the same kind of scenes."""
    present = present_pairs(scene)
    colors, kinds = {c for c, _ in present}, {k for _, k in present}
    if len(present) < OF_EACH or len(colors) * len(kinds) - len(present) < OF_EACH:
        return None
    category = CATEGORIES[number % len(CATEGORIES)]
    shown = [present[i] for i in rng.choice(len(present), OF_EACH, replace=False)]
    absent: list[tuple[str, str]] = []
    while len(absent) < OF_EACH:
        pair = absent_pair(scene, rng, category)
        if pair is not None and pair not in absent:
            absent.append(pair)
    return [(category, presence(scene, pair)) for pair in (*shown, *absent)]


def _score(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    truth = np.array([row["answer"] == "yes" for row in rows])
    said = [None if a is None else pope_label(a) for a in answers]
    correct = np.array([s == r["answer"] for s, r in zip(said, rows, strict=True)])
    # One column each for right on yes, wrong on no, wrong on yes, right on no. A failed answer is
    # wrong whatever the truth, so it lands among the wrong ones.
    outcome = np.stack(
        [truth & correct, ~truth & ~correct, truth & ~correct, ~truth & correct], axis=1
    )
    counts = np.zeros((len(rows), len(CATEGORIES), 4))
    counts[np.arange(len(rows)), [CATEGORIES.index(r["category"]) for r in rows]] = outcome
    ids, stats = sum_per_image(rows, counts.reshape(len(rows), -1))
    details = category_accuracy(rows, correct.astype(float))
    by_category = _f1_by_category(stats.sum(0))
    details |= {f"f1/{c}": float(v) for c, v in zip(CATEGORIES, by_category, strict=True)}
    details["yes_ratio"] = 100 * said.count("yes") / len(said)
    return Sheet(ids, stats, correct.astype(float), _mean_f1, details=details)


def _f1_by_category(totals: np.ndarray) -> np.ndarray:
    """F1 in percent [..., 3]; NaN for a category without questions."""
    counts = totals.reshape(*totals.shape[:-1], len(CATEGORIES), 4)
    values = 100 * f1(counts[..., 0], counts[..., 1], counts[..., 2])
    return np.where(counts.sum(-1) > 0, values, np.nan)


def _mean_f1(totals: np.ndarray) -> np.ndarray:
    """Mean over the categories that have questions."""
    values = _f1_by_category(totals)
    asked = ~np.isnan(values)
    return np.where(asked, values, 0).sum(-1) / np.maximum(asked.sum(-1), 1)


POCKET_POPE = Benchmark(
    id="pocket-pope",
    stands_for="POPE",
    metric="F1, mean of three categories",
    headline_max=100.0,
    max_new_tokens=3,
    first_seed=2_000_000,
    per_image=2 * OF_EACH,
    ask=_ask,
    score=_score,
)
