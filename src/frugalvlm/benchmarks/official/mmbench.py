"""MMBench, dev, English and Chinese: a question counts when it is right in every order of choices.

That is the circular evaluation of the official server. The server asks ChatGPT what an answer means
that no rule reads; here such an answer is wrong, as in lmms-eval's `mmbench_en_dev_static`. The
prompt is LLaVA's, which has no line "There are several options:".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from frugalvlm.benchmarks.base import Row, Sheet, category_accuracy, sum_per_image
from frugalvlm.benchmarks.official.base import LETTER, Official, options
from frugalvlm.benchmarks.official.data import Source

CHINESE = "\n请直接回答选项字母。"
CIRCLE = 1_000_000  # copies with turned choices have the index of the first one, plus millions
NOTHING = ("", "nan", "none")


def letter_of(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names: one letter that stands free, or one choice's own text."""
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    words = answer.split()
    free = re.compile(r"[(:]?([A-Z])(?:[.,:)]|\)\.)?")
    named = {found[1] for word in words if (found := free.fullmatch(word))} & set(letters)
    # "A" in a sentence is a word.
    if len(named) == 1 and not (named == {"A"} and "A" in words and len(words) > 3):
        return named.pop()
    inside = [
        letter for letter, text in zip(letters, choices, strict=True)
        if text.lower() in answer.lower()
    ]  # fmt: skip
    return inside[0] if len(inside) == 1 else None


def _reader(told: str) -> Callable[[Row, int], Mapping[str, Any]]:
    def read(row: Row, number: int) -> Mapping[str, Any]:
        hint = _text(row["hint"])
        choices = [text for letter in "ABCD" if (text := _text(row[letter]))]
        first = int(row["index"]) % CIRCLE  # a number, or a text of digits in an older revision
        return {
            "question_id": str(row["index"]),
            "image_id": str(first),
            "question": (f"{hint}\n" if hint else "") + row["question"] + options(choices) + told,
            "answer": row["answer"],
            "choices": choices,
            "category": str(row["category"]),
        }

    return read


def _text(value: Any) -> str:
    return "" if str(value).strip().lower() in NOTHING else str(value)


def _score(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    right = np.array(
        [a is not None and letter_of(a, row["choices"]) == row["answer"]
         for row, a in zip(rows, answers, strict=True)], dtype=np.float64,
    )  # fmt: skip
    ids, sums = sum_per_image(rows, np.stack([right, np.ones_like(right)], axis=1))
    whole = np.stack([sums[:, 0] == sums[:, 1], np.ones(len(sums))], axis=1).astype(float)
    details = {**category_accuracy(rows, right), "one_pass": 100 * float(right.mean())}
    return Sheet(ids, whole, right, _percent, details=details)


def _percent(totals: np.ndarray) -> np.ndarray:
    return 100 * totals[..., 0] / totals[..., 1]


def _mmbench(name: str, stands_for: str, config: str, told: str) -> Official:
    return Official(
        id=name,
        stands_for=stands_for,
        metric="accuracy, all orders of choices right",
        headline_max=100.0,
        max_new_tokens=16,
        source=Source("lmms-lab/MMBench", "56ba1af8954932c4804bd3f522e05ed96e63b654", "dev", config,
                      ("index", "question", "hint", "answer", "A", "B", "C", "D", "category",
                       "image")),
        read=_reader(told),
        score=_score,
        group="image_id",
        differs="Dev, scored by rules; the papers' number is the official server's, which asks "
                "ChatGPT about answers that no rule reads.",
    )  # fmt: skip


MMBENCH = _mmbench("mmbench", "MMBench", "en", LETTER)
MMBENCH_CN = _mmbench("mmbench-cn", "MMBench-CN", "cn", CHINESE)
