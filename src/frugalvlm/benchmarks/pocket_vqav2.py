"""pocket-vqav2: a yes/no, a number and an open question per picture; VQA accuracy, as VQAv2."""

from __future__ import annotations

import numpy as np

from frugalvlm.benchmarks.base import Asked, Benchmark, ask_for
from frugalvlm.benchmarks.pocket_textvqa import vqa_sheet
from frugalvlm.pocket.questions import FAMILIES
from frugalvlm.pocket.scenes import Scene

CATEGORIES = ("yes/no", "number", "other")  # VQAv2's answer types
YES_NO = ("kind_present", "color_check", "count_check")
OTHER = ("kind_of", "color_at", "kind_at", "color_of")
COUNTS = ("1", "2", "3", "4")  # left alone, more than half of the answers would be 1


def _ask(scene: Scene, number: int, rng: np.random.Generator) -> Asked | None:
    """One question of each answer type; families, counts, and yes and no take turns."""
    cycle, turn = divmod(number, len(YES_NO))
    round_, count = divmod(number, len(COUNTS))
    questions = (
        ask_for(FAMILIES[YES_NO[turn]], scene, rng, ("yes", "no")[cycle % 2]),
        ask_for(FAMILIES["count"], scene, rng, COUNTS[count]),
        ask_for(FAMILIES[OTHER[round_ % len(OTHER)]], scene, rng),
    )
    asked = [(c, q) for c, q in zip(CATEGORIES, questions, strict=True) if q is not None]
    return asked if len(asked) == len(CATEGORIES) else None


POCKET_VQAV2 = Benchmark(
    id="pocket-vqav2",
    stands_for="VQAv2",
    metric="VQA accuracy",
    headline_max=100.0,
    max_new_tokens=4,
    first_seed=6_000_000,
    per_image=len(CATEGORIES),
    ask=_ask,
    score=vqa_sheet,
)
