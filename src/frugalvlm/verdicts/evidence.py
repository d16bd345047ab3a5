"""Measured quantities of one paper at one scale, from its records.

One small function per kind of quantity (`papers.QUANTITY_KINDS`), found in `QUANTITIES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from frugalvlm.papers import QUANTITY_KINDS
from frugalvlm.verdicts import from_analyses, from_answers, from_costs
from frugalvlm.verdicts.quantity import Evidence, Measure, Measured, Quantity

__all__ = ["QUANTITIES", "measure"]


def measure(evidence: Evidence, quantity: Quantity) -> Measured:
    """The value of a quantity.

    Raises:
        MissingEvidence: when records lack it.
        ValueError: for a kind that no paper may ask for.
    """
    kind = quantity["kind"]
    if kind not in QUANTITIES:
        raise ValueError(f"Unknown quantity '{kind}'. Known: {', '.join(QUANTITY_KINDS)}.")
    return QUANTITIES[kind](evidence, quantity)


def difference(evidence: Evidence, q: Quantity) -> Measured:
    """Quantity `of` of side a minus that of side b; paired where it is one of answers."""
    kind = q.get("of", "retention")
    shared = {k: v for k, v in q.items() if k not in ("kind", "of", "a", "b")}
    a, b = ({**shared, "kind": kind, **q[side]} for side in ("a", "b"))
    if kind in from_answers.PAIRED:
        return from_answers.paired_difference(evidence, kind, a, b)
    return _apart(measure(evidence, a), measure(evidence, b))


def _apart(a: Measured, b: Measured) -> Measured:
    """a minus b from their intervals alone: wider than a paired interval, so never too sure."""
    n = min((x.n for x in (a, b) if x.n is not None), default=None)
    low, high = a.low - b.high, a.high - b.low
    return Measured(a.value - b.value, low, high, n, a.of, a.reason or b.reason)


QUANTITIES: Mapping[str, Measure] = {
    "retention": from_answers.retention,
    "score": from_answers.score,
    "difference": difference,
    "prefill_speedup": from_costs.prefill_speedup,
    "flops_ratio": from_costs.flops_ratio,
    "kv_ratio": from_costs.kv_ratio,
    "token_count": from_costs.token_count,
    "mean_keep_rate": from_costs.mean_keep_rate,
    "attention_concentration": from_analyses.attention_concentration,
    "attention_shift": from_analyses.attention_shift,
    "rank_agreement": from_analyses.rank_agreement,
    "last_layer_share": from_analyses.last_layer_share,
    "finding": from_analyses.finding,
}
