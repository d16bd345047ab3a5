"""The decision on one claim, by the interval of what was measured.

A verdict is made by the whole 95 % interval, never by the value alone. Which lines the interval is
held against is said by the claim's relation (`papers.Claim`):

| claim                   | holds: all of it lies            | refused: all of it lies   |
| ----------------------- | -------------------------------- | ------------------------- |
| level, "at least 94 %"  | above 94 less the margin         | below that line           |
| comparison, "is better" | above half of the paper's effect | at 0 or on the other side |
| number, "is 11.5 x"     | within the margin around 11.5    | outside of it             |

A comparison whose interval lies on the claim's side of 0, but not wholly beyond half of the paper's
effect, *holds in direction*; the measured share of the effect stands beside it. A paper that prints
no size of its effect has claimed a direction, and that holds. Everything else is *undecided*.
Levels are tested from one side: whoever keeps more than the paper's number keeps that as well.

Four more words decide nothing: *by construction* (an identity that is met, as it has to be), *not
comparable* (measured, but another thing than the paper's), *not testable* (the claim names the
reason, or no fair pair exists at this depth) and *not measured* (a record is missing).

Counted quantities (tokens, FLOPs, bytes) are exact: their interval is a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from frugalvlm.papers import Claim
from frugalvlm.verdicts.quantity import Measured

__all__ = ["DECIDED", "SHARE", "STATUSES", "UNTESTED", "Verdict", "decide", "p_value", "share_of"]

STATUSES = (
    "holds", "holds in direction", "undecided", "refused", "not comparable", "by construction",
    "not testable", "not measured",
)  # fmt: skip
DECIDED = STATUSES[:4]  # what an interval can say
UNTESTED = STATUSES[-2:]  # nothing was measured
SHARE = 0.5  # of the paper's effect: what is smaller is the same direction, not the same finding


@dataclass(frozen=True)
class Verdict:
    """What the records say about one claim at one scale.

    Attributes:
        paper: the paper's key.
        claim: the claim.
        scale: where it was tested.
        status: one of STATUSES.
        sentence: the verdict in one plain sentence.
        value: the measured quantity, None when there is none, with `low` and `high`.
        n: what it rests on (`of`: questions, rounds, images); None for counted quantities.
        spread: what `low` and `high` are: "interval", "range", "exact" or "" for neither.
        trainings: models of other seeds that the quantity is a mean over.
        share: measured share of the paper's effect; None where it prints none.
        p: of the line that decides, as measured; `corrected` by Holm's method over the page.
        reported: the paper's number (`claim.reported_on_columns`: over our benchmarks only).
        left_out: benchmarks that the guard kept out of the quantity's mean.
        late: whether the claim was last changed after the first of its records was made.
        replication: the verdict of a second set of test questions, where it was asked.
    """

    paper: str
    claim: Claim
    scale: str
    status: str
    sentence: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    of: str = ""
    spread: str = ""
    trainings: int = 1
    share: float | None = None
    p: float | None = None
    corrected: float | None = None
    reported: float | None = None
    left_out: tuple[str, ...] = ()
    late: bool = False
    replication: Verdict | None = None


def decide(measured: Measured, claim: Claim) -> str:
    """The status that a measured interval gives a claim, see the module's table.

    Raises:
        ValueError: for a claim without relation and threshold.
    """
    if claim.relation is None or claim.threshold is None:
        raise ValueError(f"claim {claim.id} has no relation to decide.")
    if math.isnan(measured.low) or math.isnan(measured.high):
        return "undecided"
    lines = [_met(measured, claim, line) for line in _lines(claim)]
    if lines[0] is True:  # the whole demand
        return "by construction" if claim.origin == "identity" else "holds"
    if lines[-1] is True:  # the direction alone
        return "holds in direction"
    return "refused" if lines[-1] is False else "undecided"


def share_of(value: float, claim: Claim) -> float | None:
    """The measured share of the paper's effect; None where it prints none."""
    if claim.effect is None or claim.threshold is None:
        return None
    return (value - claim.threshold) / claim.effect


def p_value(measured: Measured, claim: Claim) -> float:
    """Two-sided p-value of the line that decides, by the bootstrap's draws; never 0.

    Of a comparison it is that of no difference: the size of an effect is asked only where its
    direction is sure, so one p stands for both. Where there are no draws, the interval is taken as
    that of a normal distribution.
    """
    draws = measured.draws
    if draws is None or (np.nanmin(draws) == np.nanmax(draws) and measured.low < measured.high):
        error = (measured.high - measured.low) / (2 * norm.ppf(0.975))
        draws = measured.value + error * norm.ppf((np.arange(2000) + 0.5) / 2000)
    met = _meets(draws[~np.isnan(draws)], claim, _lines(claim)[-1])
    side = min(met.sum(), (~met).sum())
    return float(min(1.0, 2 * (side + 1) / (len(met) + 1)))


def _lines(claim: Claim) -> Sequence[float]:
    """The line of the whole demand and, of a comparison, that of its direction."""
    threshold = float(claim.threshold or 0)
    if claim.relation == ">=":
        return [threshold - claim.margin]
    if claim.relation == "<=":
        return [threshold + claim.margin]
    if claim.effect is not None:
        return [threshold + SHARE * claim.effect, threshold]
    return [threshold]


def _met(measured: Measured, claim: Claim, line: float) -> bool | None:
    """Whether a line is met on the whole interval (True), nowhere (False), or in part (None)."""
    ends = np.array([measured.low, measured.high])
    met = _meets(ends, claim, line)
    if met.all():
        return True
    around = claim.relation in ("==", "~") and measured.low < line < measured.high
    return None if met.any() or around else False


def _meets(values: np.ndarray, claim: Claim, line: float) -> np.ndarray:
    # A hair of slack: a ratio of two counts is rarely its decimal fraction to the last bit.
    hair = 1e-9 * max(1.0, abs(line))
    if claim.relation == ">":
        return values > line
    if claim.relation == "<":
        return values < line
    if claim.relation == ">=":
        return values >= line - hair
    if claim.relation == "<=":
        return values <= line + hair
    return np.abs(values - line) <= claim.margin + hair
