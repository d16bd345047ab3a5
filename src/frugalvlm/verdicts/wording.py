"""Verdicts in words: what was measured, what was asked, and whether it holds."""

from __future__ import annotations

import math

from frugalvlm.formats import NONE_PRINTED
from frugalvlm.papers import Claim
from frugalvlm.verdicts.decision import SHARE, Verdict

__all__ = ["asked", "said", "sentence", "with_interval"]


def sentence(v: Verdict, reason: str) -> str:
    """The verdict in one plain sentence; `reason` says why there is no interval, if there is none.

    What is added behind a semicolon are the verdict's limits: one training, a range of one run, a
    claim that is younger than its record.
    """
    if v.value is None:
        return f"{reason[:1].upper()}{reason[1:]}."
    measured = f"Measured {with_interval(v)} {v.claim.unit}".rstrip()
    return f"{measured}{_basis(v)}; asked {asked(v.claim)}, {_finding(v, reason)}."


def _basis(v: Verdict) -> str:
    """What a value rests on."""
    if v.n is None:
        return ""
    basis = f" on {v.n:,} {v.of}"
    if v.spread == "range":
        return f"{basis} of one process (a range, no interval)"
    if v.of == "questions":
        return f"{basis}, {v.trainings} trainings" if v.trainings > 1 else f"{basis}, one training"
    return basis


def _finding(v: Verdict, reason: str) -> str:
    if v.status == "not comparable":
        return f"which is not comparable: {v.claim.not_comparable}"
    if v.low is None or v.high is None or math.isnan(v.low):
        return f"which cannot be decided: {reason or 'there is no interval'}"
    if v.corrected is not None and v.p is not None and v.status == "undecided" and v.p < 0.05:
        return f"which Holm's correction over the page leaves undecided (p = {v.corrected:.2g})"
    whole = "" if v.low == v.high else f" on the whole {v.spread}"
    ending = {
        "holds": f"which holds{whole}",
        "by construction": "which is so by construction",
        "holds in direction": f"which holds{whole}",
        "refused": f"which the whole {v.spread} excludes" if whole else "which does not hold",
        "undecided": f"which the {v.spread} does not decide",
    }[v.status]
    return ending + _size(v)


def _size(v: Verdict) -> str:
    """How much of the paper's effect is there."""
    effect = v.claim.effect
    if effect is None or v.share is None or v.status not in ("holds", "holds in direction"):
        return _too_small(v) if v.status == "undecided" else ""
    seen = f"{100 * v.share:.0f} % of the paper's {_short(effect)}"
    if v.status == "holds":
        return f", at least {100 * SHARE:.0f} % of the paper's effect with it (measured {seen})"
    return f"; that is {seen}, and not surely {100 * SHARE:.0f} % of it"


def _too_small(v: Verdict) -> str:
    """Of an undecided comparison whether at least the paper's size is excluded."""
    effect, zero = v.claim.effect, v.claim.threshold
    if effect is None or zero is None or v.low is None or v.high is None:
        return ""
    farthest = max((v.low - zero) / effect, (v.high - zero) / effect)
    excluded = f", but half of the paper's {_short(effect)} is excluded"
    return excluded if farthest < SHARE else ""


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


def said(v: Verdict) -> str:
    """The verdict in as few words as a cell has: of a direction with the share of the effect."""
    if v.status == "holds in direction" and v.share is not None:
        return f"{v.status} ({100 * v.share:.0f} %)"
    return v.status


def _short(x: float) -> str:
    digits = 1 if abs(x) >= 10 else 2 if abs(x) >= 1 else 3
    return f"{x:.{digits}f}" if x != round(x) else f"{x:.0f}"


def asked(claim: Claim) -> str:
    """Relation, threshold and margin of a claim; empty where it has none."""
    if claim.relation is None or claim.threshold is None:
        return ""
    sign = {">=": "≥", "<=": "≤", "==": "=", "~": "≈"}.get(claim.relation, claim.relation)
    around = {
        ">=": f" − {claim.margin:g}",
        "<=": f" + {claim.margin:g}",
        "~": f" ±{claim.margin:g}",
    }
    margin = around.get(claim.relation, "") if claim.margin else ""
    return f"{sign} {claim.threshold:.4g}{margin}"
