"""TextVQA, validation: VQA accuracy over ten people's answers, with and without OCR tokens.

The number that papers print for LLaVA-1.5 (58.2) was had with the tokens of an OCR engine in the
prompt; without them it is about 46. lmms-eval leaves them out by default and lower-cases questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from frugalvlm.benchmarks.base import Row
from frugalvlm.benchmarks.metrics import vqa_accuracy
from frugalvlm.benchmarks.official.base import SHORT, Official, scored
from frugalvlm.benchmarks.official.data import Source


def _reader(tokens: bool) -> Callable[[Row, int], Mapping[str, Any]]:
    def read(row: Row, number: int) -> Mapping[str, Any]:
        seen = f"\nReference OCR token: {', '.join(row['ocr_tokens'])}" if tokens else ""
        return {
            "question_id": str(row["question_id"]),
            "image_id": str(row["image_id"]),
            "question": row["question"] + seen + SHORT,
            "answer": row["answers"][0],
            "answers": list(row["answers"]),
        }

    return read


def _textvqa(name: str, stands_for: str, tokens: bool, differs: str) -> Official:
    return Official(
        id=name,
        stands_for=stands_for,
        metric="VQA accuracy",
        headline_max=100.0,
        max_new_tokens=16,
        source=Source("lmms-lab/textvqa", "main", "validation",
                      columns=("question_id", "image_id", "question", "answers", "ocr_tokens",
                               "image")),
        read=_reader(tokens),
        score=scored(lambda answer, row: vqa_accuracy(answer, row["answers"])),
        differs=differs,
    )  # fmt: skip


TEXTVQA = _textvqa("textvqa", "TextVQA", True, "With OCR tokens, as LLaVA's files have it.")
TEXTVQA_PLAIN = _textvqa(
    "textvqa-plain", "TextVQA without OCR tokens", False, "Without OCR tokens, as lmms-eval asks."
)
