"""Quantities from attention records and from a paper's own analyses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from frugalvlm.benchmarks.stats import from_sums, share
from frugalvlm.runs.records import Record, select
from frugalvlm.verdicts.quantity import (
    Evidence,
    Measured,
    MissingEvidence,
    Quantity,
    from_estimate,
    number,
)


def attention_concentration(evidence: Evidence, q: Quantity) -> Measured:
    """A statistic of the attention on the top patches, over the layers of the encoder."""
    top = float(Fraction(q["patches_fraction"]))
    fitting = [
        r
        for r in evidence.attention
        if abs(float(r["patches_fraction"]) - top) < 1e-3 and q.get("by", "cls") == "cls"
    ]
    statistic = _ATTENTION.get(q.get("statistic", ""))
    if not fitting or statistic is None:
        raise MissingEvidence(f"no attention record with the top {top:.1%} of the patches")
    record = fitting[-1]
    mass = np.asarray(record["mass_per_layer"], dtype=float)
    if len(mass) < 2:
        raise MissingEvidence("an encoder of one layer has no depth")
    value = statistic(mass)
    low, high = _attention_interval(record, statistic, value)
    of = "images" if record.get("mass_per_image") else "images, no interval"
    return Measured(value, low, high, int(record["images"]), of, "all layers are alike")


def finding(evidence: Evidence, q: Quantity) -> Measured:
    """A figure and its interval, at a dotted path in the newest record of an analysis."""
    found: Any = _analysis(evidence, q["analysis"])
    for name in q["figure"].split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is None:
        raise MissingEvidence(f"no record of the analysis holds {q['figure']}")
    value, low, high = (number(found[k]) for k in ("value", "low", "high"))
    return Measured(value, low, high, found["n"], "prompts", "there is no such token")


def attention_shift(evidence: Evidence, q: Quantity) -> Measured:
    """Rank correlation of the attention that visual tokens get with their index."""
    return finding(evidence, {"analysis": "attention", "figure": f"shift.{q['by']}"})


def last_layer_share(evidence: Evidence, q: Quantity) -> Measured:
    """From the number of tokens per prompt and oracle exit."""
    source = _analysis(evidence, "depth")["sources"][q.get("source", "captions")]
    counts = np.asarray(source[q.get("statistic", "first_match")]["per_item"], dtype=float)
    layers = counts.shape[1]
    last = q.get("last_layers") or round(Fraction(q["last_layers_fraction"]) * layers)
    sums = np.stack([100 * counts[:, layers - last :].sum(1), counts.sum(1)], 1)
    return replace(from_estimate(from_sums(share, sums)), of="prompts")


def rank_agreement(evidence: Evidence, q: Quantity) -> Measured:
    """From Kendall's tau per prompt and pair of neighbouring layers, bootstrapped over prompts.

    The least of the pairs' means, without the first `skip_first` pairs.
    """
    if q.get("statistic") != "min_over_layers":
        raise MissingEvidence(f"no record of {q.get('statistic')} of the rankings")
    tau = np.asarray(_analysis(evidence, "ranking")["neighbours"], dtype=float)
    tau = tau[:, q.get("skip_first", 0) :]
    if not tau.shape[1]:
        raise MissingEvidence("a decoder of so few layers has no such pair of neighbours")
    drawn = np.random.default_rng(0).integers(len(tau), size=(1000, len(tau)))
    low, high = np.quantile(tau[drawn].mean(1).min(-1), [0.025, 0.975])
    return Measured(float(tau.mean(0).min()), float(low), float(high), len(tau), "prompts")


def _analysis(evidence: Evidence, name: str) -> Record:
    found = select(evidence.analyses, analysis=name)
    if not found:
        raise MissingEvidence(f"no record of the analysis '{name}'")
    return found[-1]


def _rank_correlation(mass: np.ndarray) -> float:
    """Spearman's with the layer number; NaN where all layers are alike."""
    if np.ptp(mass) == 0:
        return math.nan
    return float(spearmanr(mass, np.arange(len(mass))).statistic)


_ATTENTION: dict[str, Callable[[np.ndarray], float]] = {
    "rank_correlation_with_depth": _rank_correlation,
    "argmax_layer_from_end": lambda m: float(len(m) - int(np.argmax(m))),
    "last_minus_second_last": lambda m: float(m[-1] - m[-2]),
}


def _attention_interval(
    record: Record, statistic: Callable[[np.ndarray], float], value: float
) -> tuple[float, float]:
    """Bootstrap over pictures where the record has them apart; otherwise the mean alone."""
    per_image = record.get("mass_per_image")
    if not per_image:
        return value, value
    masses = np.asarray(per_image, dtype=float)
    rng = np.random.default_rng(0)
    draws = rng.integers(len(masses), size=(1000, len(masses)))
    values = [statistic(masses[drawn].mean(0)) for drawn in draws]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
