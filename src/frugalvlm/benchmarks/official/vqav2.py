"""VQAv2, validation: VQA accuracy over ten people's answers.

Papers print the score of test-dev, whose answers only the challenge's server has. Validation is
scored here, so the two numbers are about other questions of the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugalvlm.benchmarks.base import Row
from frugalvlm.benchmarks.metrics import vqa_accuracy
from frugalvlm.benchmarks.official.base import SHORT, Official, scored
from frugalvlm.benchmarks.official.data import Source


def _read(row: Row, number: int) -> Mapping[str, Any]:
    return {
        "question_id": str(row["question_id"]),
        "image_id": str(row["image_id"]),
        "question": row["question"] + SHORT,
        "answer": row["multiple_choice_answer"],
        "answers": [given["answer"] for given in row["answers"]],
        "category": row["answer_type"],
    }


VQAV2 = Official(
    id="vqav2",
    stands_for="VQAv2",
    metric="VQA accuracy",
    headline_max=100.0,
    max_new_tokens=16,
    source=Source("lmms-lab/VQAv2", "main", "validation",
                  columns=("question_id", "image_id", "question", "answers", "answer_type",
                           "multiple_choice_answer", "image")),
    read=_read,
    score=scored(lambda answer, row: vqa_accuracy(answer, row["answers"])),
    differs="Validation; the papers' test-dev is scored by a server and has other questions.",
)  # fmt: skip
