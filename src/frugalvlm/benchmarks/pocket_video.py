"""pocket-video: motion, order of appearance and first or last frame of clips; exact match.

For models that take videos. Rows hold eight `frames` instead of an `image`. A frame alone does not
answer: see `frugalvlm.pocket.clips`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Features, Image, List

from frugalvlm.benchmarks.base import (
    FEATURES,
    Asked,
    Benchmark,
    Row,
    Scans,
    Sheet,
    ask_for,
    mean_sheet,
    png,
)
from frugalvlm.benchmarks.metrics import exact_match
from frugalvlm.pocket.clips import CLIP_FAMILIES, ENDS, STEPS, Clip, make_clip, motion, order, place

CATEGORIES = tuple(CLIP_FAMILIES)


@dataclass(frozen=True)
class VideoBenchmark(Benchmark):
    """A benchmark about clips: its rows hold `frames`, a list of pictures, and no `image`."""

    features: ClassVar[Features] = Features(
        {"frames" if k == "image" else k: List(Image()) if k == "image" else v
         for k, v in FEATURES.items()}
    )  # fmt: skip

    def make(self, split: Scans, seed: int) -> Clip:
        """The clip of a seed."""
        return make_clip(split, seed)

    def _pictures(self, scene: Clip) -> dict[str, Any]:
        return {"frames": [png(frame) for frame in scene.frames()]}


def _ask(clip: Clip, number: int, rng: np.random.Generator) -> Asked | None:
    """One question of each family; steps, and first and last, take turns."""
    ends, steps = list(ENDS), list(STEPS)
    questions = (
        ask_for(motion, clip, rng, steps[number % len(steps)]),
        order(clip, rng, ends[number % 2]),
        place(clip, rng, ends[number // 2 % 2]),
    )
    asked = [(q.family, q) for q in questions if q is not None]
    return asked if len(asked) == len(CATEGORIES) else None


def _score(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    pairs = zip(rows, answers, strict=True)
    return mean_sheet(rows, [0.0 if a is None else exact_match(a, r["answer"]) for r, a in pairs])


POCKET_VIDEO = VideoBenchmark(
    id="pocket-video",
    stands_for="MVBench",
    metric="exact match",
    headline_max=100.0,
    max_new_tokens=3,
    first_seed=8_000_000,
    per_image=len(CATEGORIES),
    ask=_ask,
    score=_score,
)
