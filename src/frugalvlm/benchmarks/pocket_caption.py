"""pocket-caption: every thing with colour, kind and place, and the number on the plate; object F1.

The long answers of the suite. The headline is exact: a thing counts when colour, kind and place are
all right, a number when all its digits are; there is no partial credit, and what is said twice
counts once for each time it is there. F1 is taken over the things of all captions together.
Captioning is officially scored by CIDEr, which rewards the wording of people; here the wording is
fixed and there is one right caption, so only what it names can differ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from frugalvlm.benchmarks.base import (
    Asked,
    Benchmark,
    Row,
    Sheet,
    category_accuracy,
    sum_per_image,
)
from frugalvlm.benchmarks.metrics import f1
from frugalvlm.pocket.questions import describe
from frugalvlm.pocket.scenes import COLORS, KINDS, PLACES, Scene

Claim = tuple[str, ...]  # (colour, kind, place), ("number", digits), or what could not be read

_CLAIM = re.compile(
    rf"\b({'|'.join(COLORS)}) ({'|'.join(KINDS)})\b(?: at the ({'|'.join(PLACES)})\b)?"
    r"|\b(number) (\d+)\b"
)


def claims(caption: str) -> Counter[Claim]:
    """What a caption says, and how often.

    Phrases lie between commas, periods or "and". One in which nothing can be read is a claim too,
    a wrong one, so that talking on costs precision. A thing without a place has "" for it.
    """
    found: Counter[Claim] = Counter()
    for phrase in re.split(r"[,.]|\band\b", " ".join(caption.lower().split())):
        if read := [match.groups("") for match in _CLAIM.finditer(phrase)]:
            found.update(groups[3:] if groups[3] else groups[:3] for groups in read)
        elif phrase.strip():
            found[phrase.strip(),] += 1
    return found


def _ask(scene: Scene, number: int, rng: np.random.Generator) -> Asked | None:
    """The one question; its category is how many things there are."""
    question = describe(scene, rng)
    return None if question is None else [(f"{len(scene.things)} things", question)]


def _counts(said: Counter[Claim], true: Counter[Claim]) -> tuple[int, int, int]:
    """Claims that are right, claims that are wrong, and things that are missing."""
    right = (said & true).total()
    return right, said.total() - right, true.total() - right


def _unplaced(found: Counter[Claim]) -> Counter[Claim]:
    """The same without places."""
    return Counter(claim[:2] for claim in found.elements())


def _score(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    truths = [claims(row["answer"]) for row in rows]
    said = [claims(answer or "") for answer in answers]
    pairs = list(zip(said, truths, strict=True))
    counts = np.array([_counts(*pair) for pair in pairs], dtype=np.float64)
    named = np.array([_counts(*map(_unplaced, pair)) for pair in pairs], dtype=np.float64)
    correct = f1(*counts.T)
    ids, stats = sum_per_image(rows, counts)
    right, wrong, missed = stats.sum(0)
    details = category_accuracy(rows, correct)
    details["precision"] = 100 * float(right / max(right + wrong, 1))
    details["recall"] = 100 * float(right / (right + missed))
    details["f1/color_and_kind"] = float(_f1(named.sum(0)))
    plates = [(s, number) for s, true in pairs for number in true if number[0] == "number"]
    if plates:
        details["accuracy/number"] = 100 * sum(n in s for s, n in plates) / len(plates)
    return Sheet(ids, stats, correct, _f1, details=details)


def _f1(totals: np.ndarray) -> np.ndarray:
    """F1 in percent from right, wrong and missing ones [..., 3]."""
    return 100 * f1(totals[..., 0], totals[..., 1], totals[..., 2])


POCKET_CAPTION = Benchmark(
    id="pocket-caption",
    stands_for="NoCaps (captions)",
    metric="F1 of objects",
    headline_max=100.0,
    max_new_tokens=52,
    first_seed=7_000_000,
    per_image=1,
    ask=_ask,
    score=_score,
)
