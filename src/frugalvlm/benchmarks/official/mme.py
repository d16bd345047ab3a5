"""MME: two questions a picture; accuracy plus accuracy+ of every category, summed.

Papers print one of two numbers under this name: the perception score of ten categories (about 1,510
for LLaVA-1.5-7B) or the total with cognition's four (about 1,862). Each is a benchmark here. The
score is that of the authors' tool, which lmms-eval repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from frugalvlm.benchmarks.base import Row, Scorer, Sheet, category_accuracy, sum_per_image
from frugalvlm.benchmarks.metrics import mme_label, mme_score
from frugalvlm.benchmarks.official.base import SHORT, Official
from frugalvlm.benchmarks.official.data import Source

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")  # fmt: skip
TOLD = " Please answer yes or no."


def _reader(categories: Sequence[str]) -> Callable[[Row, int], Mapping[str, Any] | None]:
    def read(row: Row, number: int) -> Mapping[str, Any] | None:
        if row["category"] not in categories:
            return None
        return {
            "question_id": f"{row['question_id']}#{number}",  # both of a pair carry one id
            "pair": f"{row['category']} {row['question_id']}",
            "image_id": f"{row['category']} {row['question_id']}",
            "question": row["question"].strip().replace(TOLD, "") + SHORT,
            "answer": row["answer"].strip().lower(),
            "category": row["category"],
        }

    return read


def _scorer(categories: Sequence[str]) -> Scorer:
    def total(sums: np.ndarray) -> np.ndarray:
        counts = sums.reshape(*sums.shape[:-1], len(categories), 3)
        return mme_score(counts[..., 0], counts[..., 1], counts[..., 2]).sum(-1)

    def score(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
        right = np.array(
            [a is not None and mme_label(a) == row["answer"]
             for row, a in zip(rows, answers, strict=True)], dtype=np.float64,
        )  # fmt: skip
        pairs: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            pairs.setdefault(row["pair"], []).append(i)
        counts = np.zeros((len(rows), len(categories), 3))
        for name, members in pairs.items():
            if len(members) != 2:
                raise ValueError(f"MME is scored in pairs, but {name} has {len(members)} rows.")
            place = categories.index(rows[members[0]]["category"])
            own = right[members].sum()
            counts[members[0], place] = own, own == 2, 1
        ids, sums = sum_per_image(rows, counts.reshape(len(rows), -1))
        each = sums.sum(0).reshape(len(categories), 3)
        points = mme_score(each[:, 0], each[:, 1], each[:, 2])
        details = category_accuracy(rows, right)
        details |= {f"points/{c}": float(p) for c, p in zip(categories, points, strict=True)}
        for name, part in (("perception", PERCEPTION), ("cognition", COGNITION)):
            inside = [p for c, p in zip(categories, points, strict=True) if c in part]
            if inside:
                details[f"points/{name}"] = float(sum(inside))
        return Sheet(ids, sums, right, total, details=details)

    return score


def _mme(name: str, stands_for: str, categories: Sequence[str]) -> Official:
    return Official(
        id=name,
        stands_for=stands_for,
        metric="accuracy plus accuracy+, summed over categories",
        headline_max=200.0 * len(categories),
        max_new_tokens=16,
        source=Source("lmms-lab/MME", "d6c9023f017b564f7b3ccccf5348166bce8fdbcd", "test",
                      columns=("question_id", "question", "answer", "category", "image")),
        read=_reader(categories),
        score=_scorer(categories),
        group="pair",
        strata=True,
    )  # fmt: skip


MME = _mme("mme", "MME (perception and cognition)", (*PERCEPTION, *COGNITION))
MME_PERCEPTION = _mme("mme-perception", "MME (perception)", PERCEPTION)
