"""Quantities from attention records and from a paper's own analyses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from frugalvlm.benchmarks.stats import FEWEST, TOO_FEW, from_sums, share
from frugalvlm.runs.records import Record, select
from frugalvlm.verdicts.quantity import (
    Evidence,
    Measured,
    MissingEvidence,
    Quantity,
    exact,
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
    if q["statistic"] in _OVER_LAYERS:
        reason = f"its sample are the {len(mass)} layers of one tower, which give no interval"
        return Measured(value, math.nan, math.nan, len(mass), "layers", reason)
    masses = _per_picture(record)
    if masses is None or len(masses) < FEWEST:
        reason = "the record has no pictures apart" if masses is None else TOO_FEW
        return Measured(value, math.nan, math.nan, int(record["images"]), "images", reason)
    rng = np.random.default_rng(0)
    rows = rng.integers(len(masses), size=(2000, len(masses)))
    draws = np.array([statistic(masses[drawn].mean(0)) for drawn in rows])
    low, high = (float(x) for x in np.nanquantile(draws, [0.025, 0.975]))
    return Measured(value, low, high, len(masses), "images", "all layers are alike", draws)


def _per_picture(record: Record) -> np.ndarray | None:
    """Attention mass, [pictures, layers]; None where the record holds the mean alone.

    Old records have a row per question, so each picture stands there several times in a row.
    """
    if not record.get("mass_per_image"):
        return None
    rows = np.asarray(record["mass_per_image"], dtype=float)
    new = np.abs(np.diff(rows, axis=0)).max(1) > 1e-6
    return rows[np.concatenate([[True], new])]


def largest_rise(evidence: Evidence, q: Quantity) -> Measured:
    """The largest step upwards from one entry of a list to the next; counted, so exact."""
    values = np.asarray(_at(_analysis(evidence, q["analysis"]), q["figure"]), dtype=float)
    return exact(float(np.diff(values).max()))


def finding(evidence: Evidence, q: Quantity) -> Measured:
    """A figure and its interval, at a dotted path in the newest record of an analysis.

    With `divided_by` the ratio of two plain numbers, say of two times of one run.
    """
    record = _analysis(evidence, q["analysis"])
    found = _at(record, q["figure"])
    if not isinstance(found, Mapping):
        ratio = number(found) / number(_at(record, q["divided_by"]))
        return Measured(ratio, ratio, ratio, None, "", spread="range")
    value, low, high = (number(found[k]) for k in ("value", "low", "high"))
    n = found["n"]
    if low == high == value and n == 1:
        return exact(value)
    if n is not None and n < FEWEST:
        return Measured(value, math.nan, math.nan, n, "prompts", TOO_FEW)
    return Measured(value, low, high, n, "prompts", "there is no such token")


def _at(record: Record, path: str) -> Any:
    found: Any = record
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is None:
        raise MissingEvidence(f"no record of the analysis holds {path}")
    return found


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
    return replace(from_estimate(from_sums(share, sums, top=100)), of="prompts")


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
    draws = tau[drawn].mean(1).min(-1)
    low, high = np.quantile(draws, [0.025, 0.975])
    value = float(tau.mean(0).min())
    return Measured(value, float(low), float(high), len(tau), "prompts", "", draws)


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


_OVER_LAYERS = {"rank_correlation_with_depth"}  # statistics whose sample are the layers
_ATTENTION: dict[str, Callable[[np.ndarray], float]] = {
    "rank_correlation_with_depth": _rank_correlation,
    "argmax_layer_from_end": lambda m: float(len(m) - int(np.argmax(m))),
    "last_minus_second_last": lambda m: float(m[-1] - m[-2]),
}
