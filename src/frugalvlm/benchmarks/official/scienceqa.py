"""ScienceQA, the questions with a picture (test): letter accuracy.

The letter is read as LLaVA reads it: alone, "B. ..." or "The answer is B". lmms-eval takes a letter
alone or a capital before a period, "B." among them; its value is a detail of the sheet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugalvlm.benchmarks.base import Row
from frugalvlm.benchmarks.metrics import option_letter
from frugalvlm.benchmarks.official.base import LETTER, Official, options, scored
from frugalvlm.benchmarks.official.data import Source

LETTERS = "ABCDE"  # as many as a question has choices


def _read(row: Row, number: int) -> Mapping[str, Any]:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return {
        "question_id": str(number),
        "image_id": str(number),
        "question": context + row["question"] + options(row["choices"]) + LETTER,
        "answer": LETTERS[int(row["answer"])],
        "category": str(row.get("subject") or "all"),
    }


def _lmms_eval(answer: str, row: Row) -> float:
    text = answer.strip()
    if text.upper() == row["answer"]:
        return 1.0
    return float(text[1:2] == "." and text[:1] == row["answer"])


SCIENCEQA = Official(
    id="scienceqa",
    stands_for="ScienceQA-IMG",
    metric="accuracy",
    headline_max=100.0,
    max_new_tokens=16,
    source=Source("lmms-lab/ScienceQA", "69dd4d6b67373d38f96a5badd5d24d0eb5bcdc50", "test",
                  "ScienceQA-IMG", ("question", "choices", "answer", "hint", "image")),
    read=_read,
    score=scored(lambda answer, row: float(option_letter(answer, LETTERS) == row["answer"]),
                 _lmms_eval),
    differs="lmms-eval reads letters in fewer forms; see the details of the record.",
)  # fmt: skip
