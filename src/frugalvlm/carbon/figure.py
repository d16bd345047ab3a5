"""A figure with its interval, and arithmetic that never makes one too narrow.

Sums and ratios of two figures take the worst corners of their intervals. That is wider than an
interval of paired draws would be, so what is decided from it is never too sure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np

from frugalvlm.benchmarks.stats import Estimate, mean_interval
from frugalvlm.errors import FrugalError
from frugalvlm.measure import EnergyResult

__all__ = [
    "Amount",
    "CarbonError",
    "Figure",
    "difference",
    "figure_of",
    "product_of",
    "ratio",
    "total",
]


class CarbonError(FrugalError, ValueError):
    """What no emission can be computed from; the message names the remedy."""


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval.

    Attributes:
        value: None where it is undefined, never infinity.
        low: lower end; None where the interval has none.
        high: upper end; None where the interval has none.
        reason: why something is None; "" if nothing is.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    @staticmethod
    def exact(value: float) -> Figure:
        """A counted number: its interval is a point."""
        return Figure(value, value, value)

    @staticmethod
    def undefined(reason: str) -> Figure:
        """No number at all."""
        return Figure(None, None, None, reason)

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends; an end that is missing is infinite, so that comparisons work."""
        return (
            -math.inf if self.low is None else self.low,
            math.inf if self.high is None else self.high,
        )

    def __str__(self) -> str:
        if self.value is None and self.low is None and self.high is None:
            return "undefined"
        value = "undefined" if self.value is None else f"{self.value:.3g}"
        if self.low is not None and self.low == self.high:
            return value
        low = "no end" if self.low is None else f"{self.low:.3g}"
        return f"{value} [{low}, {'no end' if self.high is None else f'{self.high:.3g}'}]"


Amount: TypeAlias = float | Sequence[float] | Figure | Estimate | EnergyResult


def figure_of(amount: Amount, name: str = "the amount") -> Figure:
    """What a user hands over, as a figure.

    Args:
        amount: a number (exact); repeated measurements of one (their mean, with a bootstrap
            interval over them); an estimate of `benchmarks.stats`; an energy measurement (joules
            per call); a figure.
        name: of the amount, for the message.

    Raises:
        CarbonError: no finite number, or no measurement at all.
    """
    if isinstance(amount, Figure):
        return amount
    if isinstance(amount, Estimate):
        value, low, high = (
            None if math.isnan(v) else v for v in (amount.value, amount.low, amount.high)
        )
        return Figure(value, low, high, amount.reason)
    if isinstance(amount, EnergyResult):
        amount = amount.joules_per_call
    values = numbers_of(amount, name).ravel()
    if len(values) == 1:
        return Figure.exact(float(values[0]))
    mean, low, high = (float(v) for v in mean_interval(values))
    return Figure(mean, low, high)


def numbers_of(amount: Any, name: str) -> np.ndarray:
    """Finite numbers as an array.

    Raises:
        CarbonError: for anything else, an empty list among it.
    """
    try:
        values = np.asarray(amount, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.array([])
    if not values.size or not np.isfinite(values).all():
        shown = " ".join(repr(amount).split())
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise CarbonError(
            f"Give {name} as a finite number, or as a list of repeated measurements; got {shown}."
        )
    return values


def difference(a: Figure, b: Figure) -> Figure:
    """a - b."""
    if a.value is None or b.value is None:
        return Figure.undefined(a.reason or b.reason)
    low, high = a.ends[0] - b.ends[1], a.ends[1] - b.ends[0]
    return Figure(a.value - b.value, _finite(low), _finite(high), a.reason or b.reason)


def total(a: Figure, b: Figure) -> Figure:
    """a + b."""
    if a.value is None or b.value is None:
        return Figure.undefined(a.reason or b.reason)
    low, high = a.ends[0] + b.ends[0], a.ends[1] + b.ends[1]
    return Figure(a.value + b.value, _finite(low), _finite(high), a.reason or b.reason)


def product_of(a: Figure, factor: float) -> Figure:
    """A figure times an exact number, which is not negative."""
    value, low, high = (None if v is None else v * factor for v in (a.value, a.low, a.high))
    return Figure(value, low, high, a.reason)


def ratio(top: Figure, bottom: Figure, nothing: str) -> Figure:
    """top / bottom, where only a positive bottom means anything.

    Args:
        top: of either sign.
        bottom: at or below zero: undefined. Where only its interval reaches zero, the value stands
            and the ends that would be infinite are missing.
        nothing: the sentence for a bottom that is not positive.
    """
    if top.value is None or bottom.value is None:
        return Figure.undefined(top.reason or bottom.reason)
    if bottom.value <= 0:
        return Figure.undefined(nothing)
    value = top.value / bottom.value
    tops, bottoms = top.ends, bottom.ends
    if bottoms[0] <= 0:  # ever smaller bottoms: one end or both leave for infinity
        low = tops[0] / bottoms[1] if tops[0] >= 0 else None
        high = tops[1] / bottoms[1] if tops[1] <= 0 else None
        return Figure(value, low, high, f"the interval reaches the case where {_inside(nothing)}")
    with np.errstate(invalid="ignore"):
        corners = [float(np.divide(t, b)) for t, b in product(tops, bottoms)]
    known = [c for c in corners if not math.isnan(c)] or [math.nan]  # no interval, no corner
    return Figure(value, _finite(min(known)), _finite(max(known)), top.reason or bottom.reason)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _inside(sentence: str) -> str:
    """A sentence as it stands inside another one."""
    return sentence[:1].lower() + sentence[1:].rstrip(".")
