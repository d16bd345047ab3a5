"""OCRBench: does the answer contain the right text? The number of right answers among 1,000."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugalvlm.benchmarks.base import Row
from frugalvlm.benchmarks.official.base import Official, scored
from frugalvlm.benchmarks.official.data import Source


def _read(row: Row, number: int) -> Mapping[str, Any]:
    truths = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return {
        "question_id": str(number),
        "image_id": str(number),
        "question": row["question"].strip(),
        "answer": truths[0],
        "answers": truths,
        "category": row["question_type"],
        "part": row["dataset"],
    }


def contains(answer: str, row: Row) -> float:
    """1.0 where a right text is in the answer.

    Of formulas spaces do not count, of other texts case does not.
    """
    formula = row["part"] == "HME100k"
    plain = _formula if formula else _text
    return float(any(plain(truth) in plain(answer) for truth in row["answers"]))


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _text(text: str) -> str:
    folded = "".join(
        chr(ord(c) - 0xFEE0) if 0xFF01 <= ord(c) <= 0xFF5E else " " if c == "\u3000" else c
        for c in text
    )
    return folded.lower().strip().replace("\n", " ")


OCRBENCH = Official(
    id="ocrbench",
    stands_for="OCRBench",
    metric="share of right answers",
    headline_max=100.0,
    max_new_tokens=128,
    source=Source("echo840/OCRBench", "92a54bd1384387c178d5a07140a2d85e0a3d12e1", "test",
                  columns=("question", "answer", "question_type", "dataset", "image"), owners=()),
    read=_read,
    score=scored(contains),
    differs="In percent; papers print the number of right answers among 1,000.",
)  # fmt: skip
