"""ChartQA, test: relaxed accuracy, numbers within five percent; as lmms-eval and Qwen-VL score it.

Papers give the mean over its human and its machine-made questions, of which there are as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugalvlm.benchmarks.base import Row
from frugalvlm.benchmarks.official.base import Official, scored
from frugalvlm.benchmarks.official.data import Source

WORD = "\nAnswer the question with a single word."
TOLERANCE = 0.05


def _read(row: Row, number: int) -> Mapping[str, Any]:
    return {
        "question_id": str(number),
        "image_id": str(number),  # the rows do not say which of them share a chart
        "question": row["question"] + WORD,
        "answer": row["answer"],
        "category": str(row["type"]),
    }


def relaxed(answer: str, truth: str) -> float:
    """1.0 for a number within five percent of the true one, or for the same text."""
    said, true = _number(answer), _number(truth)
    if said is not None and true:
        return float(abs(said - true) / abs(true) <= TOLERANCE)
    return float(answer.lower() == truth.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


CHARTQA = Official(
    id="chartqa",
    stands_for="ChartQA",
    metric="relaxed accuracy",
    headline_max=100.0,
    max_new_tokens=16,
    source=Source("lmms-lab/ChartQA", "main", "test",
                  columns=("question", "answer", "type", "image")),
    read=_read,
    score=scored(lambda answer, row: relaxed(answer, row["answer"])),
)  # fmt: skip
