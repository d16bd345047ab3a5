"""How numbers are written."""

from __future__ import annotations

import math

NOT_MEASURED = "not measured"
NONE_PRINTED = "–"


def plus_minus(value: float, low: float | None, high: float | None, digits: int) -> str:
    """A value with half the width of its interval, if it has one.

    Where that would reach below 0 and the interval does not, the interval itself.
    """
    if _missing(value):
        return "undefined"
    if low is None or high is None or _missing(low) or _missing(high):
        return f"{value:.{digits}f}"
    half = (high - low) / 2
    if value - half < 0 <= low:
        return f"{value:.{digits}f} {between(low, high, digits)}"
    return f"{value:.{digits}f} ±{half:.{digits}f}"


def between(low: float | None, high: float | None, digits: int) -> str:
    """An interval in brackets."""
    if low is None or high is None or _missing(low) or _missing(high):
        return "[no interval]"
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def percent(value: float | None, digits: int = 0) -> str:
    """A percentage; a dash where there is none."""
    if value is None:
        return NONE_PRINTED
    return "undefined" if math.isnan(value) else f"{value:.{digits}f} %"


def bare(value: float | None) -> str:
    """A rounded number; a dash where there is none."""
    return NONE_PRINTED if value is None else f"{value:.0f}"


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
