"""What the functions that measure a claim's quantity share: records in, `Measured` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.papers import Paper
from frugalvlm.runs.records import Record, created, latest, one_setting, select
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.scored import Scored, SheetMaker

# Parts of a quantity that say what to measure; all others are hyper-parameters of the method.
_SELECTORS = {
    "kind", "method", "model", "tokens", "tokens_fraction", "mean_keep_rate", "over", "part",
    "statistic", "of", "a", "b", "crops", "analysis", "figure", "source", "last_layers",
    "last_layers_fraction", "pocket_model", "equal", "each", "divided_by",
}  # fmt: skip

Quantity = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """A measured quantity; `reason` says why it, or its interval, is undefined (NaN).

    A counted one has `low == high == value`; n tells how many of `of` it rests on. `draws` are its
    values on resampled pictures, `trainings` how many models of other seeds it is a mean of, and
    `spread` what low and high are: an "interval", the "range" of one run, or "exact".
    """

    value: float
    low: float
    high: float
    n: int | None = None
    of: str = ""
    reason: str = ""
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)
    trainings: int = 1
    spread: str = "interval"


class MissingEvidence(Exception):
    """A record that the claim needs is not there; the message says which."""


class Untestable(Exception):
    """No records could ever hold it for this model; the message says why."""


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
        beside: those of other models and of a second set of questions, by the folder's name.
        trainings: those of the same model, trained from other seeds.
    """

    paper: Paper
    scale: str
    scored: Scored
    attention: Sequence[Record]
    analyses: Sequence[Record]
    rows: Sequence[Mapping[str, Any]]
    beside: Mapping[str, Evidence] = field(default_factory=dict)
    trainings: tuple[Evidence, ...] = ()

    @property
    def model(self) -> str | None:
        """The model that most of it is about."""
        known = [r["request"] for r in (*self.scored.records, *self.attention, *self.analyses)]
        return next((r["model"] for r in (*known, *self.rows) if r.get("model")), None)

    def about(self, model: str) -> Evidence:
        """The evidence of a model by its name.

        Raises:
            MissingEvidence: when it has none.
        """
        if model == self.model:
            return self
        if model not in self.beside:
            raise MissingEvidence(f"no record of {model}")
        return self.beside[model]

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
            {"model": record["request"].get("model"), "made": created(record), **row}
            for record in (*blueprint, *efficiency[-1:])
            for row in record["rows"]
        ]
        return Evidence(paper, scale, scored, attention, analyses, rows)


Measure = Callable[[Evidence, Quantity], Measured]


def from_estimate(found: Estimate) -> Measured:
    """An estimate over questions."""
    return Measured(
        found.value, found.low, found.high, found.n_questions, "questions", found.reason,
        found.draws, found.trainings,
    )  # fmt: skip


def exact(value: float) -> Measured:
    """A counted value: its interval is a point."""
    return Measured(float(value), float(value), float(value), spread="exact")


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
