"""DocVQA, validation: ANLS, the edit-distance similarity to the nearest of the right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frugalvlm.benchmarks.base import Row
from frugalvlm.benchmarks.official.base import SHORT, Official, scored
from frugalvlm.benchmarks.official.data import Source

THRESHOLD = 0.5  # what is less alike counts as wrong


def _read(row: Row, number: int) -> Mapping[str, Any]:
    return {
        "question_id": str(row["questionId"]),
        "image_id": f"{row.get('docId', row['questionId'])}-{row.get('ucsf_document_page_no', 0)}",
        "question": row["question"] + SHORT,
        "answer": row["answers"][0],
        "answers": list(row["answers"]),
    }


def anls(answer: str, truths: Sequence[str]) -> float:
    """One minus the edit distance over the longer length, to the nearest truth; 0 below a half."""
    best = max(_alike(_plain(answer), _plain(truth)) for truth in truths)
    return best if best >= THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _alike(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    return 1.0 - _distance(a, b) / longest if longest else 1.0


def _distance(a: str, b: str) -> int:
    """Levenshtein's, row by row."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
        before = row
    return before[-1]


DOCVQA = Official(
    id="docvqa",
    stands_for="DocVQA",
    metric="ANLS",
    headline_max=100.0,
    max_new_tokens=32,
    source=Source("lmms-lab/DocVQA", "539088ef8a8ada01ac8e2e6d4e372586748a265e", "validation",
                  "DocVQA", ("questionId", "question", "answers", "image")),
    read=_read,
    score=scored(lambda answer, row: anls(answer, row["answers"])),
    differs="Validation; papers often print the server's test score.",
)  # fmt: skip
