"""Measured quantities of one paper at one scale, from its records.

One small function per kind of quantity (`papers.QUANTITY_KINDS`), found in `QUANTITIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import numpy as np

from frugalvlm.benchmarks.stats import Estimate, over_trainings
from frugalvlm.papers import QUANTITY_KINDS
from frugalvlm.verdicts import from_analyses, from_answers, from_costs
from frugalvlm.verdicts.quantity import Evidence, Measure, Measured, MissingEvidence, Quantity

__all__ = ["QUANTITIES", "measure"]


def measure(evidence: Evidence, quantity: Quantity) -> Measured:
    """The value of a quantity; where a model was trained from several seeds, over all of them.

    Raises:
        MissingEvidence: when records lack it.
        Untestable: when no records could hold it.
        ValueError: for a kind that no paper may ask for.
    """
    found = _of_one(evidence, quantity)
    if found.draws is None:
        return found
    more = []
    for other in evidence.trainings:
        with suppress(MissingEvidence):
            more.append(_of_one(other, quantity))
    own = [m for m in (found, *more) if m.draws is not None]
    joined = over_trainings(
        [Estimate(m.value, m.low, m.high, m.n or 0, 0, m.reason, m.draws) for m in own]
    )
    return replace(
        found, value=joined.value, low=joined.low, high=joined.high, reason=joined.reason,
        draws=joined.draws, trainings=len(own),
    )  # fmt: skip


def _of_one(evidence: Evidence, quantity: Quantity) -> Measured:
    """Of one training, with the model that the quantity names."""
    kind = quantity["kind"]
    if kind not in QUANTITIES:
        raise ValueError(f"Unknown quantity '{kind}'. Known: {', '.join(QUANTITY_KINDS)}.")
    if evidence.scale == "pocket" and "pocket_model" in quantity:
        evidence = evidence.about(quantity["pocket_model"])
    return QUANTITIES[kind](evidence, quantity)


def difference(evidence: Evidence, q: Quantity) -> Measured:
    """Quantity `of` of side a minus that of side b; paired where it is one of answers.

    What stands in `each` holds for both sides.
    """
    kind = q.get("of", "retention")
    shared = {k: v for k, v in q.items() if k not in ("kind", "of", "a", "b", "each")}
    a, b = ({**shared, **q.get("each", {}), "kind": kind, **q[side]} for side in ("a", "b"))
    if kind in from_answers.PAIRED:
        return from_answers.paired_difference(evidence, kind, q, a, b)
    return _apart(_of_one(evidence, a), _of_one(evidence, b))


def _apart(a: Measured, b: Measured) -> Measured:
    """a minus b, paired by their draws; without draws from their intervals, so never too sure.

    What is made of a range of one run is a range.
    """
    n = min((x.n for x in (a, b) if x.n is not None), default=None)
    low, high, draws = a.low - b.high, a.high - b.low, None
    if a.draws is not None and b.draws is not None and a.draws.shape == b.draws.shape:
        draws = a.draws - b.draws
        low, high = (float(x) for x in np.nanquantile(draws, [0.025, 0.975]))
    kinds = {a.spread, b.spread} - {"exact"}
    spread = "exact" if not kinds else "range" if "range" in kinds else "interval"
    reason = a.reason or b.reason
    return Measured(a.value - b.value, low, high, n, a.of, reason, draws, spread=spread)


QUANTITIES: Mapping[str, Measure] = {
    "retention": from_answers.retention,
    "score": from_answers.score,
    "difference": difference,
    "prefill_speedup": from_costs.prefill_speedup,
    "flops_ratio": from_costs.flops_ratio,
    "kv_ratio": from_costs.kv_ratio,
    "token_count": from_costs.token_count,
    "mean_keep_rate": from_costs.mean_keep_rate,
    "memory_ratio": from_costs.memory_ratio,
    "attention_concentration": from_analyses.attention_concentration,
    "attention_shift": from_analyses.attention_shift,
    "rank_agreement": from_analyses.rank_agreement,
    "last_layer_share": from_analyses.last_layer_share,
    "largest_rise": from_analyses.largest_rise,
    "finding": from_analyses.finding,
}
