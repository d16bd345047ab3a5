"""VizWiz-VQA, val: blind people's photographs and questions; VQA accuracy.

A score that can rise as visual tokens fall, for "unanswerable" becomes the more frequent answer, so
no ranking should rest on it. Papers print the server's test score; val is scored here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugalvlm.benchmarks.base import Row
from frugalvlm.benchmarks.metrics import vqa_accuracy
from frugalvlm.benchmarks.official.base import SHORT, Official, scored
from frugalvlm.benchmarks.official.data import Source

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def _read(row: Row, number: int) -> Mapping[str, Any]:
    return {
        "question_id": str(row["question_id"]),
        "image_id": str(row["question_id"]),
        "question": row["question"] + UNANSWERABLE + SHORT,
        "answer": row["answers"][0],
        "answers": list(row["answers"]),
        "category": str(row.get("category") or "all"),
    }


VIZWIZ = Official(
    id="vizwiz",
    stands_for="VizWiz",
    metric="VQA accuracy",
    headline_max=100.0,
    max_new_tokens=16,
    source=Source("lmms-lab/VizWiz-VQA", "d428a2dae984f79cf1b9d99467dfa883e0c30686", "val",
                  columns=("question_id", "question", "answers", "image")),
    read=_read,
    score=scored(lambda answer, row: vqa_accuracy(answer, row["answers"])),
    differs="Val; the papers' test score comes from a server.",
)  # fmt: skip
