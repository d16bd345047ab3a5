"""What the functions that measure a claim's quantity share: records in, `Measured` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.papers import Paper
from frugalvlm.runs.records import Record, latest, one_setting, select
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.scored import Scored, SheetMaker

# Parts of a quantity that say what to measure; all others are hyper-parameters of the method.
_SELECTORS = {
    "kind", "method", "model", "tokens", "tokens_fraction", "mean_keep_rate", "over", "part",
    "statistic", "of", "a", "b", "crops", "analysis", "figure", "source", "last_layers",
    "last_layers_fraction",
}  # fmt: skip

Quantity = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """A measured quantity; `reason` says why it, or its interval, is undefined (NaN).

    A counted one has `low == high == value`; n tells how many of `of` it rests on.
    """

    value: float
    low: float
    high: float
    n: int | None = None
    of: str = ""
    reason: str = ""


class MissingEvidence(Exception):
    """A record that the claim needs is not there; the message says which."""


@dataclass(frozen=True)
class Evidence:
    """The records of one paper at one scale, ready for measuring.

    Attributes:
        paper: whose claims.
        scale: "pocket", "blueprint" or "full".
        scored: its accuracy records.
        attention: its attention records.
        analyses: its analysis records.
        rows: rows of its cost records, each with its model.
    """

    paper: Paper
    scale: str
    scored: Scored
    attention: Sequence[Record]
    analyses: Sequence[Record]
    rows: Sequence[Mapping[str, Any]]

    @staticmethod
    def of(
        paper: Paper,
        records: Sequence[Record],
        scale: str,
        benchmarks: Mapping[str, SheetMaker] | None = None,
        guard: Guard | None = None,
    ) -> Evidence:
        """Sort records by kind; the newest complete ones of each request count.

        Raises:
            MixedSettingError: when records of a kind do not share their setting.
        """
        scored = Scored(records, benchmarks=benchmarks, guard=guard)
        attention, efficiency, analyses, blueprint = (
            latest(select(records, kind))
            for kind in ("attention", "efficiency", "analysis", "blueprint")
        )
        for group in (attention, efficiency, analyses):
            one_setting(group)
        rows = [
            {"model": record["request"].get("model"), **row}
            for record in (*blueprint, *efficiency[-1:])
            for row in record["rows"]
        ]
        return Evidence(paper, scale, scored, attention, analyses, rows)


Measure = Callable[[Evidence, Quantity], Measured]


def from_estimate(found: Estimate) -> Measured:
    """An estimate over questions."""
    n = found.n_questions
    return Measured(found.value, found.low, found.high, n, "questions", found.reason)


def exact(value: float) -> Measured:
    """A counted value: its interval is a point."""
    return Measured(float(value), float(value), float(value))


def number(value: float | None) -> float:
    """A recorded number; NaN where the record holds none."""
    return math.nan if value is None else float(value)


def hyper_of(q: Quantity) -> dict[str, Any]:
    """The hyper-parameters that a quantity asks of its method."""
    return {k: v for k, v in q.items() if k not in _SELECTORS}


def wanted(q: Quantity) -> str:
    """What a quantity asks beside the method, for a sentence about what is missing."""
    parts = [
        f"{k.replace('_', ' ')} {q[k]}"
        for k in ("tokens_fraction", "tokens", "mean_keep_rate", "model")
        if k in q
    ]
    parts += [f"{k} {v}" for k, v in hyper_of(q).items()]
    return f" ({', '.join(parts)})" if parts else ""
