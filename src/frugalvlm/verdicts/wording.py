"""Verdicts in words: what was measured, what was asked, and whether it holds."""

from __future__ import annotations

import math

from frugalvlm.formats import NONE_PRINTED
from frugalvlm.papers import Claim
from frugalvlm.verdicts.decision import Verdict, holds

__all__ = ["asked", "sentence", "with_interval"]


def sentence(v: Verdict, why_no_interval: str) -> str:
    """The verdict in one plain sentence."""
    measured = f"Measured {with_interval(v)} {v.claim.unit}".rstrip()
    basis = "" if v.n is None else f" on {v.n} {v.of}"
    return f"{measured}{basis}; asked {asked(v.claim)}, {_finding(v, why_no_interval)}."


def _finding(v: Verdict, why_no_interval: str) -> str:
    if v.low is None or v.high is None or math.isnan(v.low):
        return f"which cannot be decided: {why_no_interval or 'there is no interval'}"
    point = v.low == v.high
    if v.status == "reproduced":
        return "which holds" if point else "which holds on the whole interval"
    claim = v.claim
    fails = "which does not hold" if point else "which holds nowhere on the interval"
    if claim.weaker is None:
        return fails if v.status == "contradicted" else "which the interval does not decide"
    why = f" ({claim.weaker['why']})" if "why" in claim.weaker else ""
    weaker = f"the weaker {claim.weaker['relation']} {claim.weaker['threshold']:g}{why}"
    ends, threshold = (v.low, v.high), float(claim.threshold or 0)
    if holds(ends, claim.relation or "", threshold, claim.tolerance) is not False:
        fails = "which the interval does not decide"
    ending = {
        "same direction": f"but {weaker} holds",
        "contradicted": f"and neither does {weaker}",
        "not significant": f"and {weaker} is not decided",
    }
    return f"{fails}; {ending[v.status]}"


def with_interval(v: Verdict) -> str:
    """The measured value with its interval; a dash where nothing was measured."""
    if v.low is None or v.high is None or v.value is None:
        return NONE_PRINTED
    value = _short(v.value)
    if v.low == v.high == v.value:
        return value
    if math.isnan(v.low):
        return f"{value} [no interval]"
    return f"{value} [{_short(v.low)}, {_short(v.high)}]"


def _short(x: float) -> str:
    digits = 1 if abs(x) >= 10 else 2 if abs(x) >= 1 else 3
    return f"{x:.{digits}f}" if x != round(x) else f"{x:.0f}"


def asked(claim: Claim) -> str:
    """Relation and threshold of a claim; empty where it has none."""
    if claim.relation is None or claim.threshold is None:
        return ""
    around = f" ±{claim.tolerance:g}" if claim.relation == "~" and claim.tolerance else ""
    sign = {">=": "≥", "<=": "≤", "==": "=", "~": "≈"}.get(claim.relation, claim.relation)
    return f"{sign} {claim.threshold:.4g}{around}"
