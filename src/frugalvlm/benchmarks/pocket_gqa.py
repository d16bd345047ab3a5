"""pocket-gqa: attributes, places and relations of things, as GQA asks; exact match."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frugalvlm.benchmarks.base import Asked, Benchmark, Row, Sheet, ask_for, mean_sheet
from frugalvlm.benchmarks.metrics import exact_match
from frugalvlm.pocket.questions import FAMILIES
from frugalvlm.pocket.scenes import Scene

CATEGORIES = (
    "color_of", "relation_holds", "place_of", "kind_at", "neighbour", "kind_of", "color_at",
)  # fmt: skip
PER_IMAGE = 3


def _ask(scene: Scene, number: int, rng: np.random.Generator) -> Asked | None:
    """Three families in turn; relations that hold and relations that do not alternate."""
    asked: Asked = []
    for turn in range(PER_IMAGE * number, PER_IMAGE * (number + 1)):
        cycle, place = divmod(turn, len(CATEGORIES))
        category = CATEGORIES[place]
        want = ("yes", "no")[cycle % 2] if category == "relation_holds" else None
        question = ask_for(FAMILIES[category], scene, rng, want)
        if question is None:
            return None
        asked.append((category, question))
    return asked


def _score(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    pairs = zip(rows, answers, strict=True)
    return mean_sheet(rows, [0.0 if a is None else exact_match(a, r["answer"]) for r, a in pairs])


POCKET_GQA = Benchmark(
    id="pocket-gqa",
    stands_for="GQA",
    metric="exact match",
    headline_max=100.0,
    max_new_tokens=4,
    first_seed=1_000_000,
    per_image=PER_IMAGE,
    ask=_ask,
    score=_score,
)
