"""SEED-Bench, the questions about pictures: letter accuracy.

The letter is the first character of the answer, as in lmms-eval; LLaVA reads the same letter where
an answer is one of A to D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugalvlm.benchmarks.base import Row
from frugalvlm.benchmarks.official.base import LETTER, Official, options, scored
from frugalvlm.benchmarks.official.data import Source


def _read(row: Row, number: int) -> Mapping[str, Any] | None:
    if row["data_type"] != "image":
        return None
    choices = [row[f"choice_{letter}"] for letter in "abcd"]
    return {
        "question_id": f"{row['question_id']}#{number}",
        "image_id": str(row.get("data_id") or row["question_id"]),
        "question": row["question"] + options(choices) + LETTER,
        "answer": row["answer"],
        "category": str(row.get("question_type_id") or "all"),
    }


SEED = Official(
    id="seed",
    stands_for="SEED-Bench (pictures)",
    metric="accuracy",
    headline_max=100.0,
    max_new_tokens=16,
    source=Source("lmms-lab/SEED-Bench", "74c4ea0cee96786739e4ccb97d227818a05ae752", "test",
                  columns=("question_id", "question", "answer", "data_type", "choice_a", "choice_b",
                           "choice_c", "choice_d", "image"),
                  licence="CC-BY-NC-4.0: not for commercial use"),
    read=_read,
    score=scored(lambda answer, row: float(answer.strip()[:1].upper() == row["answer"].upper())),
)  # fmt: skip
