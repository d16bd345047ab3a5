"""Quantities from cost records: times, FLOPs, cache bytes, tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from frugalvlm.runs.records import select
from frugalvlm.verdicts.quantity import (
    Evidence,
    Measured,
    MissingEvidence,
    Quantity,
    exact,
    hyper_of,
    number,
    wanted,
)

PROCESSES = 3  # that a time needs for an interval
_FLOPS_PARTS = {"vision tower": "tower", "tower": "tower", "projector": "projector",
                "decoder": "decoder", "language model": "decoder",
                "visual tokens": "visual"}  # fmt: skip


def prefill_speedup(evidence: Evidence, q: Quantity) -> Measured:
    """Prefill time of the untouched model over that with the method, paired by round.

    What the rounds of one run span is a range: another run on another hour lies outside of it more
    often than an interval may say. With runs of three processes and more it is an interval.
    """
    speedup = _cost_row(evidence, q, "prefill_speedup")["prefill_speedup"]
    median, low, high = (number(speedup[k]) for k in ("median", "low", "high"))
    spread = "interval" if speedup.get("processes", 1) >= PROCESSES else "range"
    return Measured(median, low, high, speedup.get("n"), "rounds", spread=spread)


def memory_ratio(evidence: Evidence, q: Quantity) -> Measured:
    """Peak memory with the method over that of the untouched model."""
    row, base = _cost_row(evidence, q, "peak_mib"), _base_row(evidence, q)
    return exact(row["peak_mib"] / base["peak_mib"])


def flops_ratio(evidence: Evidence, q: Quantity) -> Measured:
    """Prefill FLOPs of the untouched model over those with the method, of a part if named."""
    row, base = _cost_row(evidence, q, "flops"), _base_row(evidence, q)
    return exact(_flops(base, q.get("part")) / _flops(row, q.get("part")))


def kv_ratio(evidence: Evidence, q: Quantity) -> Measured:
    """Bytes that visual tokens take in the cache, with the method over untouched."""
    row, base = _cost_row(evidence, q, "kv_visual_bytes"), _base_row(evidence, q)
    return exact(row["kv_visual_bytes"] / base["kv_visual_bytes"])


def mean_keep_rate(evidence: Evidence, q: Quantity) -> Measured:
    """Share of the visual tokens present, mean over decoder layers."""
    row, base = _cost_row(evidence, q, "tokens_mean"), _base_row(evidence, q)
    return exact(row["tokens_mean"] / base["tokens_mean"])


def token_count(evidence: Evidence, q: Quantity) -> Measured:
    """Mean tokens; or the largest difference of asked and actual, over budgets, layers, images."""
    if q.get("statistic") != "max_abs_error":
        return exact(_cost_row(evidence, q, "tokens_mean")["tokens_mean"])
    errors = [
        abs(row[name] - row["budget"])
        for row in _rows_of(evidence, q)
        if row["method"] == q["method"]
        for name in ("tokens_mean", "tokens_after")
    ]
    crops = q.get("crops", 1) if evidence.scale == "pocket" else 1
    for record in select(evidence.scored.records, method=q["method"]):
        tokens, asked = record["tokens"], crops * record["request"]["budget"]
        ends = [x for pair in tokens.get("spread") or [] for x in pair]
        errors += [abs(x - asked) for x in (*tokens["per_layer"], *ends)]
    if not errors:
        raise MissingEvidence(f"no record of {q['method']}{wanted(q)}")
    return exact(max(errors))


def _rows_of(evidence: Evidence, q: Quantity) -> list[Mapping[str, Any]]:
    """The cost rows of the claim's model (default: that of the paper's first table)."""
    if evidence.scale == "pocket":
        return list(evidence.rows)
    models = [model for table in evidence.paper.tables for model in table.models]
    name = q.get("model") or (models[0].name if models else None)
    names = {name, *(m.hub for m in models if m.name == name)}
    return [row for row in evidence.rows if row["model"] in names]


def _base_row(evidence: Evidence, q: Quantity) -> Mapping[str, Any]:
    found = [r for r in _rows_of(evidence, q) if r["method"] == evidence.scored.baseline]
    if not found:
        raise MissingEvidence("no cost record of the untouched model")
    return found[-1]


def _cost_row(evidence: Evidence, q: Quantity, needed: str) -> Mapping[str, Any]:
    """The one row that a quantity speaks of; it holds a figure `needed`."""
    total, tokens = _base_row(evidence, q)["budget"], q.get("tokens")
    if tokens is None and "tokens_fraction" in q:
        tokens = round(Fraction(q["tokens_fraction"]) * total)
    found = [
        row
        for row in _rows_of(evidence, q)
        if row["method"] == q["method"]
        and tokens in (None, row["budget"])
        and row.get(needed) is not None
        and all((row.get("hyper_parameters") or {}).get(k) == v for k, v in hyper_of(q).items())
    ]
    if not found:
        raise MissingEvidence(f"no cost record of {q['method']}{wanted(q)}")
    if len({row["budget"] for row in found}) > 1:
        raise MissingEvidence(f"{q['method']}{wanted(q)} fits several budgets")
    return found[-1]


def _flops(row: Mapping[str, Any], part: str | None) -> float:
    if part is None:
        return float(row["flops"])
    names = [_FLOPS_PARTS[name.strip()] for name in part.split(" and ")]
    parts = {**row["flops_parts"], "visual": row.get("flops_visual", math.nan)}
    return float(sum(parts[name] for name in names))
