"""POPE: is the thing in the picture? F1 of "yes", the mean of three ways to choose absent things.

Answers are read as LLaVA reads them, and papers after it: no or not in the first sentence is no,
anything else is yes. lmms-eval counts an answer only if it is "yes" or "no" and nothing else, and
takes F1 over all rows together; that value is a detail of the sheet, with the number of answers
that the two read differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from frugalvlm.benchmarks.base import Row, Sheet, category_accuracy, sum_per_image
from frugalvlm.benchmarks.metrics import f1, pope_label
from frugalvlm.benchmarks.official.base import SHORT, Official
from frugalvlm.benchmarks.official.data import Source

CATEGORIES = ("random", "popular", "adversarial")


def _read(row: Row, number: int) -> Mapping[str, Any]:
    category = str(row["category"]).lower()
    return {
        "question_id": f"{category}-{row['question_id']}",  # a number comes up in every category
        "image_id": str(row["image_source"]),
        "question": row["question"].strip() + SHORT,
        "answer": str(row["answer"]).strip().lower(),
        "category": category,
    }


def _score(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    truth = np.array([row["answer"] == "yes" for row in rows])
    said = [None if a is None else pope_label(a) for a in answers]
    right = np.array([s == row["answer"] for s, row in zip(said, rows, strict=True)])
    # A failed answer is wrong whatever the truth, so it lands among the wrong ones.
    outcome = np.stack([truth & right, ~truth & ~right, truth & ~right], axis=1)
    counts = np.zeros((len(rows), len(CATEGORIES), 4))
    places = [CATEGORIES.index(row["category"]) for row in rows]
    counts[np.arange(len(rows)), places, :3] = outcome
    counts[np.arange(len(rows)), places, 3] = 1
    ids, sums = sum_per_image(rows, counts.reshape(len(rows), -1))
    each = _by_category(sums.sum(0))
    details = category_accuracy(rows, right.astype(float))
    details |= {f"f1/{c}": float(v) for c, v in zip(CATEGORIES, each, strict=True) if v == v}
    details["yes_ratio"] = 100 * said.count("yes") / len(said)
    details |= _as_lmms_eval(truth, answers, said)
    return Sheet(ids, sums, right.astype(float), _mean, details=details)


def _as_lmms_eval(truth: np.ndarray, answers: Sequence[str | None], said: Sequence[str | None]
                  ) -> dict[str, float]:  # fmt: skip
    whole = ["" if a is None else a.lower().strip() for a in answers]
    yes, no = (np.array([w == word for w in whole]) for word in ("yes", "no"))
    together = f1((truth & yes).sum(), (~truth & yes).sum(), (truth & no).sum())
    differ = sum(w != (s or "") for w, s in zip(whole, said, strict=True))
    return {"lmms_eval": 100 * float(together), "rules_differ": float(differ)}


def _by_category(totals: np.ndarray) -> np.ndarray:
    """F1 in percent, [..., 3]; NaN for a category without questions."""
    counts = totals.reshape(*totals.shape[:-1], len(CATEGORIES), 4)
    values = 100 * f1(counts[..., 0], counts[..., 1], counts[..., 2])
    return np.where(counts[..., 3] > 0, values, np.nan)


def _mean(totals: np.ndarray) -> np.ndarray:
    values = _by_category(totals)
    asked = ~np.isnan(values)
    return np.where(asked, values, 0).sum(-1) / np.maximum(asked.sum(-1), 1)


POPE = Official(
    id="pope",
    stands_for="POPE",
    metric="F1, mean of three categories",
    headline_max=100.0,
    max_new_tokens=16,
    source=Source(
        "lmms-lab/POPE",
        "4db1276663dfa5eb8ad16a52d24c31a09e470896",
        "test",
        columns=("question_id", "question", "answer", "image_source", "category", "image"),
    ),
    read=_read,
    score=_score,
    strata=True,
    differs="lmms-eval's F1 is over all rows together and counts only answers that are yes or no.",
)
