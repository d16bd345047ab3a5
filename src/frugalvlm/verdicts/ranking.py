"""Which runs can be told apart: paired differences, Holm's correction, letters.

The p-values of all pairs are corrected by Holm's step-down method; runs that share a letter are
not told apart.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from statsmodels.stats.multitest import multipletests

__all__ = ["LEVEL", "RESAMPLES", "SHOWN", "Ranking", "holm", "letters", "rank", "two_sided"]

LEVEL = 0.05  # of all pairs together
RESAMPLES = 10_000  # for p-values; intervals use the first 2000 draws, as all tables do
SHOWN = 2000


@dataclass(frozen=True)
class Ranking:
    """Pairs of runs, compared.

    Attributes:
        draws: by run (0 is the best) its values on resampled pictures.
        p: of each pair, corrected by Holm's method.
        significant: whether a pair is told apart.
        letters: by run; two runs share one exactly when they are not told apart.
    """

    draws: Mapping[int, np.ndarray]
    p: Mapping[tuple[int, int], float]
    significant: Mapping[tuple[int, int], bool]
    letters: Mapping[int, str]

    def against(self, a: int, b: int) -> tuple[tuple[float, float], float]:
        """Interval of the difference a - b, and its corrected p; of a run and itself: 0 and 1."""
        if a == b:
            return (0.0, 0.0), 1.0
        low, high = np.quantile((self.draws[a] - self.draws[b])[:SHOWN], [0.025, 0.975])
        return (float(low), float(high)), self.p[min(a, b), max(a, b)]


def rank(draws: Mapping[int, np.ndarray]) -> Ranking:
    """Compare all pairs of runs by paired draws of the same pictures."""
    raw = {(a, b): two_sided(draws[a] - draws[b]) for a, b in combinations(draws, 2)}
    p = holm(raw)
    significant = {pair: value < LEVEL for pair, value in p.items()}
    return Ranking(draws, p, significant, letters(list(draws), significant))


def two_sided(differences: np.ndarray) -> float:
    """Two-sided p-value of no difference from bootstrap draws of one; never 0."""
    draws = differences[~np.isnan(differences)]
    side = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (side + 1) / (len(draws) + 1)))


def holm(p: Mapping[Any, float]) -> dict[Any, float]:
    """p-values corrected by Holm's step-down method (Holm 1979)."""
    if not p:
        return {}
    corrected = multipletests(list(p.values()), LEVEL, "holm")[1]
    return dict(zip(p, corrected.tolist(), strict=True))


def letters(names: Sequence[int], significant: Mapping[tuple[int, int], bool]) -> dict[int, str]:
    """A compact letter display (Piepho 2004, insert and absorb).

    Two of `names` share a letter exactly when they are not significantly different.
    """
    groups = [frozenset(names)]
    for (a, b), differ in significant.items():
        if not differ:
            continue
        split = [g - {x} for g in groups if {a, b} <= g for x in (a, b)]
        candidates = dict.fromkeys([g for g in groups if not {a, b} <= g] + split)
        groups = [g for g in candidates if not any(g < other for other in candidates)]
    groups.sort(key=lambda g: min(names.index(x) for x in g))
    marks = string.ascii_lowercase + string.ascii_uppercase
    return {x: "".join(marks[i] for i, g in enumerate(groups) if x in g) for x in names}
