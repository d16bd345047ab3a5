"""Fair pairs: the run of a second method that is like the first by the paper's own accounting.

A comparison of two methods says something about choosing tokens only where both have as many: kept
at the end, on average over decoder layers, or by FLOPs, as the paper counts (`papers.EQUALS`). A
pair that no budget of the second method could make is not testable at this depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from frugalvlm.methods import method_class
from frugalvlm.methods.schedules import at_mean
from frugalvlm.runs.records import Record, select
from frugalvlm.verdicts.quantity import (
    Evidence,
    MissingEvidence,
    Quantity,
    Untestable,
    hyper_of,
)
from frugalvlm.views import BudgetError

__all__ = ["FLOPS_SLACK", "MEAN_SLACK", "fair_side"]

MEAN_SLACK, FLOPS_SLACK = 0.02, 0.05  # by how much, as a share, a pair may differ


def fair_side(evidence: Evidence, q: Quantity, a: Quantity, budget: int, b: Quantity) -> Quantity:
    """Side b of a difference, at the budget at which it is like side a.

    Args:
        evidence: the records.
        q: the difference; `equal` says by what its sides are alike.
        a: the first side.
        budget: of side a, visual tokens per crop.
        b: the other side.

    Raises:
        MissingEvidence: no run of side b is like it.
        Untestable: none could be.
    """
    if q.get("equal") == "mean tokens":
        return {**b, "tokens": _at_equal_mean(evidence, a, budget, b)}
    if q.get("equal") == "FLOPs":
        return {**b, "tokens": _at_equal_flops(evidence, a, budget, b)}
    return b


def _at_equal_mean(evidence: Evidence, a: Quantity, budget: int, b: Quantity) -> int:
    target = _mean(_runs(evidence, a, budget)[0])
    means = {int(r["request"]["budget"]): _mean(r) for r in _runs(evidence, b)}
    found = _nearest(means, target, MEAN_SLACK)
    if found is not None:
        return found
    crops = _mean(_runs(evidence, {"method": evidence.scored.baseline})[0])
    total = evidence.scored.total or 0
    layers = len(_runs(evidence, a, budget)[0]["tokens"]["per_layer"])
    try:
        wanted = at_mean(method_class(b["method"]), round(target * total / crops), total, layers)
    except BudgetError as error:
        raise Untestable(str(error).rstrip(".")) from error
    kept = wanted.describe().get("kept_tokens", round(target))
    raise MissingEvidence(
        f"no record of {b['method']} at a mean of {target:.4g} visual tokens, that of "
        f"{a['method']} at {budget} (it would keep {kept})"
    )


def _at_equal_flops(evidence: Evidence, a: Quantity, budget: int, b: Quantity) -> int:
    whole = _flops(evidence, evidence.scored.baseline)
    own, other = _flops(evidence, a["method"]), _flops(evidence, b["method"])
    if budget not in own or not other or not whole:
        raise MissingEvidence(f"no cost record of {a['method']} at {budget} and {b['method']}")
    target, full = own[budget], max(whole.values())
    asked = {int(r["request"]["budget"]) for r in _runs(evidence, b)}
    found = _nearest({k: v for k, v in other.items() if k in asked}, target, FLOPS_SLACK)
    if found is not None:
        return found
    if len(other) > 1:  # nearly a straight line in the tokens kept
        slope, base = np.polyfit(list(other), list(other.values()), 1)
        if base + slope > target * (1 + FLOPS_SLACK):
            raise Untestable(
                f"{b['method']} takes at least {100 * (base + slope) / full:.0f} % of the "
                f"untouched model's FLOPs at this depth, {a['method']} {100 * target / full:.0f} %"
            )
    raise MissingEvidence(
        f"no record of {b['method']} at {100 * target / full:.0f} % of the untouched model's "
        f"FLOPs, those of {a['method']} at {budget}"
    )


def _runs(evidence: Evidence, q: Quantity, budget: int | None = None) -> list[Record]:
    """The accuracy records of a side."""
    found = [
        r
        for r in select(evidence.scored.records, method=q["method"])
        if budget in (None, r["request"]["budget"])
        and all(r["request"]["method"].get(k) == v for k, v in hyper_of(q).items())
    ]
    if not found and budget is not None:
        raise MissingEvidence(f"no accuracy record of {q['method']} at {budget} tokens")
    return found


def _mean(record: Record) -> float:
    """Visual tokens, mean over decoder layers."""
    return float(np.mean(record["tokens"]["per_layer"]))


def _flops(evidence: Evidence, method: str) -> dict[int, float]:
    rows: Iterable[Mapping] = (r for r in evidence.rows if r["method"] == method)
    return {int(r["budget"]): float(r["flops"]) for r in rows if r.get("flops") is not None}


def _nearest(known: Mapping[int, float], target: float, slack: float) -> int | None:
    """The budget whose figure is nearest to the target, if it is near enough."""
    best = min(known, key=lambda budget: abs(known[budget] - target), default=None)
    if best is None or abs(known[best] - target) > slack * target:
        return None
    return best
