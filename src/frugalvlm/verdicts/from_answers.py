"""Quantities from accuracy records: scores, retention, and their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from frugalvlm.benchmarks.base import Sheet
from frugalvlm.runs.records import Record, select
from frugalvlm.verdicts.pairs import fair_side
from frugalvlm.verdicts.quantity import (
    Evidence,
    Measured,
    MissingEvidence,
    Quantity,
    from_estimate,
    hyper_of,
    wanted,
)
from frugalvlm.verdicts.scored import contrast

PAIRED = ("retention", "score")  # kinds whose differences are paired question by question


def retention(evidence: Evidence, q: Quantity) -> Measured:
    """Score in percent of the untouched model's."""
    budget, over = budget_of(evidence, q), _over(evidence, q)
    found = evidence.scored.retention(q["method"], budget, over)
    if found is None:
        raise MissingEvidence(_gap(evidence, q["method"], budget, over))
    return from_estimate(found)


def score(evidence: Evidence, q: Quantity) -> Measured:
    """A benchmark's own metric; of several the mean, in percent of the best possible score."""
    budget, over = budget_of(evidence, q), _over(evidence, q)
    if len(over) > 1:
        return from_estimate(contrast(_terms(evidence, "score", q, 1.0)))
    found = evidence.scored.score(q["method"], budget, over[0])
    if found is None:
        raise MissingEvidence(_gap(evidence, q["method"], budget, over))
    return from_estimate(found)


def paired_difference(
    evidence: Evidence, kind: str, q: Quantity, a: Quantity, b: Quantity
) -> Measured:
    """Retention or score (`kind`) of side a minus that of side b, on the same pictures.

    Of two methods whose every score is the same nothing is said about what sets them apart.
    """
    if q.get("equal") not in (None, "tokens kept", "nothing"):
        b = fair_side(evidence, q, a, budget_of(evidence, a), b)
    terms = _terms(evidence, kind, a, 1.0)
    for name, parts in _terms(evidence, kind, b, -1.0).items():
        terms.setdefault(name, []).extend(parts)
    found = from_estimate(contrast(terms))
    if a["method"] != b["method"] and _same_scores(evidence, a, b):
        return replace(
            found, low=math.nan, high=math.nan, draws=None,
            reason=f"not one of the {found.n:,} scores differs, so the records say nothing about "
            "what sets the two apart",
        )  # fmt: skip
    return found


def _same_scores(evidence: Evidence, a: Quantity, b: Quantity) -> bool:
    budgets = [(side["method"], budget_of(evidence, side)) for side in (a, b)]
    sheets = [[evidence.scored.sheet(*run, name) for run in budgets] for name in _over(evidence, a)]
    return all(x and y and np.array_equal(x.correct, y.correct) for x, y in sheets)


def left_out(evidence: Evidence, q: Quantity) -> tuple[str, ...]:
    """Benchmarks that the guard keeps out of the means of an accuracy quantity."""
    kind = q.get("of", "retention") if q["kind"] == "difference" else q["kind"]
    if kind not in PAIRED:
        return ()
    sides = [{**q, **q.get(side, {})} for side in ("a", "b")]
    named = [name for side in sides for name in _named(evidence, side)]
    inside = {name for side in sides for name in _over(evidence, side)}
    return tuple(name for name in dict.fromkeys(named) if name not in inside)


def budget_of(evidence: Evidence, q: Quantity) -> int:
    """Visual tokens per crop that a quantity speaks of, from the accuracy records.

    Raises:
        MissingEvidence: when no record fits, or records of several budgets do.
    """
    total = evidence.scored.total
    if total is None:
        raise MissingEvidence("no accuracy record of the untouched model")
    runs = select(evidence.scored.records, method=q["method"])
    budgets = sorted({int(r["request"]["budget"]) for r in runs if _fits(r, q, total)})
    if len(budgets) == 1:
        return budgets[0]
    if not budgets:
        raise MissingEvidence(f"no accuracy record of {q['method']}{wanted(q)}")
    raise MissingEvidence(f"{q['method']}{wanted(q)} fits budgets {budgets}, the claim names none")


def _terms(
    evidence: Evidence, kind: str, q: Quantity, sign: float
) -> dict[str, list[tuple[float, Sheet]]]:
    """What a mean over benchmarks adds up, by benchmark: weight and sheet."""
    budget, over, scored = budget_of(evidence, q), _over(evidence, q), evidence.scored
    make = scored.retention_terms if kind == "retention" else scored.score_terms
    if kind == "score" and len(over) == 1:  # in its own unit, where nothing is averaged
        make = scored.sheet
    terms: dict[str, list[tuple[float, Sheet]]] = {}
    for name in over:
        sheet = make(q["method"], budget, name)
        if sheet is None:
            raise MissingEvidence(_gap(evidence, q["method"], budget, over))
        terms[name] = [(sign / len(over), sheet)]
    return terms


def _over(evidence: Evidence, q: Quantity) -> list[str]:
    """The benchmarks that a quantity is about, as far as the guard admits them."""
    named = _named(evidence, q)
    admitted = evidence.scored.guard.admitted(named)
    if named and not admitted:
        raise MissingEvidence(
            "the untouched model answers all benchmarks as well from blank pictures"
        )
    return admitted


def _named(evidence: Evidence, q: Quantity) -> list[str]:
    over = q.get("over", "mean")
    if over != "mean":
        return [over] if isinstance(over, str) else list(over)
    layout = next((t for t in evidence.paper.tables if evidence.scale in t.scales), None)
    if layout is not None:
        return [column.id for column in layout.columns]
    return sorted({r["request"]["benchmark"] for r in evidence.scored.records})


def _fits(record: Record, q: Quantity, total: int) -> bool:
    hyper = record["request"]["method"]
    if any(hyper.get(name) != value for name, value in hyper_of(q).items()):
        return False
    if "mean_keep_rate" in q:
        layers = record["tokens"]["per_layer"]
        rate = sum(layers) / len(layers) / total
        return abs(rate - float(q["mean_keep_rate"])) < 0.005
    if "tokens_fraction" in q:
        return record["request"]["budget"] == round(Fraction(q["tokens_fraction"]) * total)
    return "tokens" not in q or record["request"]["budget"] == q["tokens"]


def _gap(evidence: Evidence, method: str, budget: int, over: Sequence[str]) -> str:
    """Which accuracy records are missing."""
    scored = evidence.scored
    runs = [(method, budget), (scored.baseline, scored.total or budget)]
    lacking = [
        f"{key} at {tokens} tokens on {name}"
        for key, tokens in dict.fromkeys(runs)
        for name in over
        if scored.record(key, tokens, name) is None
    ]
    more = f" and {len(lacking) - 2} more" if len(lacking) > 2 else ""
    return f"no record of {'; '.join(lacking[:2])}{more}" if lacking else "unknown benchmark"
