"""pocket-textvqa: the handwritten number on a plate; VQA accuracy, as TextVQA.

TextVQA has ten people's answers per question. Here the truth is known, so the ten references
agree, unless a row brings its own under `answers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frugalvlm.benchmarks.base import Asked, Benchmark, Row, Sheet, mean_sheet
from frugalvlm.benchmarks.metrics import vqa_accuracy
from frugalvlm.pocket.questions import read_number
from frugalvlm.pocket.scenes import Scene

REFERENCES = 10


def _ask(scene: Scene, number: int, rng: np.random.Generator) -> Asked | None:
    question = read_number(scene, rng)
    return None if question is None else [("read_number", question)]


def vqa_sheet(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    """Score with VQA accuracy over ten references."""
    scores = [
        0.0 if a is None else vqa_accuracy(a, row.get("answers") or [row["answer"]] * REFERENCES)
        for row, a in zip(rows, answers, strict=True)
    ]
    return mean_sheet(rows, scores)


POCKET_TEXTVQA = Benchmark(
    id="pocket-textvqa",
    stands_for="TextVQA",
    metric="VQA accuracy",
    headline_max=100.0,
    max_new_tokens=7,
    first_seed=4_000_000,
    per_image=1,
    ask=_ask,
    score=vqa_sheet,
)
