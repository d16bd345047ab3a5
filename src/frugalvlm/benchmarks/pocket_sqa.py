"""pocket-sqa: multiple choice among four; letter accuracy, as ScienceQA."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frugalvlm.benchmarks.base import Asked, Benchmark, Row, Sheet, ask_for, mean_sheet
from frugalvlm.benchmarks.metrics import option_letter
from frugalvlm.pocket.questions import FAMILIES, LETTERS
from frugalvlm.pocket.scenes import Scene

CATEGORIES = ("choice_present", "choice_place", "choice_color")


def _ask(scene: Scene, number: int, rng: np.random.Generator) -> Asked | None:
    """One question of each family; over four pictures a family has each letter once."""
    asked: Asked = []
    for i, category in enumerate(CATEGORIES):
        letter = LETTERS[(number + i) % len(LETTERS)]
        question = ask_for(FAMILIES[category], scene, rng, letter)
        if question is None:
            return None
        asked.append((category, question))
    return asked


def _score(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    letters = [None if a is None else option_letter(a) for a in answers]
    pairs = zip(letters, rows, strict=True)
    return mean_sheet(rows, [float(letter == row["answer"]) for letter, row in pairs])


POCKET_SQA = Benchmark(
    id="pocket-sqa",
    stands_for="ScienceQA (image part)",
    metric="accuracy",
    headline_max=100.0,
    max_new_tokens=3,
    first_seed=5_000_000,
    per_image=len(CATEGORIES),
    ask=_ask,
    score=_score,
)
