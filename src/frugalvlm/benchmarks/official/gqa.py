"""GQA, test-dev balanced: attributes, places and relations; exact match.

The score is lmms-eval's: equal after lower-casing and without punctuation, as the official script
scores the short answers of the balanced questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frugalvlm.benchmarks.base import Row
from frugalvlm.benchmarks.metrics import exact_match
from frugalvlm.benchmarks.official.base import SHORT, Official, scored
from frugalvlm.benchmarks.official.data import Source

_REVISION = "a6e72d6e1b912da88af8b2f9eba05d5ea8ec2dd8"


def _read(row: Row, number: int) -> Mapping[str, Any]:
    kinds = row.get("types") or {}
    return {
        "question_id": str(row["id"]),
        "image_id": str(row["imageId"]),
        "question": row["question"] + SHORT,
        "answer": row["answer"],
        "category": str(kinds.get("structural") or "all"),
    }


GQA = Official(
    id="gqa",
    stands_for="GQA",
    metric="exact match",
    headline_max=100.0,
    max_new_tokens=16,
    source=Source(
        "lmms-lab/GQA",
        _REVISION,
        "testdev",
        "testdev_balanced_instructions",
        ("id", "imageId", "question", "answer"),
    ),
    pictures=Source(
        "lmms-lab/GQA", _REVISION, "testdev", "testdev_balanced_images", ("id", "image")
    ),
    read=_read,
    score=scored(lambda answer, row: exact_match(answer, row["answer"])),
)
