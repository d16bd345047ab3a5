"""The decision on one claim, by the interval of what was measured.

A claim asks whether a quantity stands in a relation to a threshold, and may name a weaker demand.
The decision is made by the whole 95 % interval, never by the value alone:

| interval                                             | verdict         |
| ---------------------------------------------------- | --------------- |
| all of it meets the claim                            | reproduced      |
| all of it meets the weaker demand, not all the claim | same direction  |
| none of it meets the claim nor the weaker demand     | contradicted    |
| anything else: the records do not decide             | not significant |

So an interval that contains the threshold never reproduces a claim, and without a weaker demand it
is not significant, on whichever side of the threshold the value lies. Counted quantities (tokens,
FLOPs, cache bytes) are exact: their interval is a point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from frugalvlm.papers import Claim
from frugalvlm.verdicts.quantity import Measured

__all__ = ["STATUSES", "Verdict", "decide", "holds"]

STATUSES = (
    "reproduced", "same direction", "contradicted", "not significant", "not testable here",
    "not measured",
)  # fmt: skip


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
        reported: the paper's number (`claim.reported_on_columns`: over our benchmarks only).
        left_out: benchmarks that the guard kept out of the quantity's mean.
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
    reported: float | None = None
    left_out: tuple[str, ...] = ()


def decide(measured: Measured, claim: Claim) -> str:
    """The status that a measured interval gives a claim, see the module's table."""
    ends = (measured.low, measured.high)
    if claim.relation is None or claim.threshold is None:
        raise ValueError(f"claim {claim.id} has no relation to decide.")
    if any(math.isnan(x) for x in ends):
        return "not significant"
    strong = holds(ends, claim.relation, claim.threshold, claim.tolerance)
    weak = strong
    if claim.weaker:
        weak = holds(ends, claim.weaker["relation"], float(claim.weaker["threshold"]), 0.0)
    if strong is True:
        return "reproduced"
    if claim.weaker and weak is True:
        return "same direction"
    if strong is False and weak is False:
        return "contradicted"
    return "not significant"


def holds(
    ends: tuple[float, float], relation: str, threshold: float, tolerance: float
) -> bool | None:
    """Whether a relation holds on the whole interval (True), nowhere (False), or in part (None)."""
    low, high = ends
    if relation in ("==", "~"):
        # A hair of slack: a ratio of two counts is rarely its decimal fraction to the last bit.
        slack = tolerance + 1e-9 * max(1.0, abs(threshold))
        if threshold - slack <= low and high <= threshold + slack:
            return True
        return False if high < threshold - slack or low > threshold + slack else None
    tests: dict[str, Callable[[float], bool]] = {
        ">": lambda x: x > threshold,
        ">=": lambda x: x >= threshold,
        "<": lambda x: x < threshold,
        "<=": lambda x: x <= threshold,
    }
    found = {tests[relation](low), tests[relation](high)}
    return found.pop() if len(found) == 1 else None
