"""Accuracy records as scored sheets again, and the paired figures that tables and verdicts show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import numpy as np

from frugalvlm.benchmarks import ALL_BENCHMARKS, stats
from frugalvlm.benchmarks.base import EvalSplit, Sheet, without_pictures
from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.digest import request_hash
from frugalvlm.methods import METHODS
from frugalvlm.runs.records import (
    MixedSettingError,
    Record,
    RecordError,
    latest,
    method_key,
    one_setting,
    select,
)
from frugalvlm.verdicts.guard import Guard, guard_of

__all__ = ["Scored", "SheetMaker", "contrast", "pick_run"]


class SheetMaker(Protocol):
    """What scoring needs of a benchmark: its rows and its rule."""

    def dataset(self, split: EvalSplit, n: int) -> Any:
        """The first `n` questions of a split."""

    def sheet(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str | None]) -> Sheet:
        """Answers, scored."""


class Scored:
    """The accuracy records of one setting, scored from their answers.

    Every figure is None where a record that it needs is missing.

    Args:
        records: records of any kind; the newest complete ones of each request count.
        baseline: key of the untouched run that retention refers to.
        benchmarks: by id; default: the kit's own.
        guard: which benchmarks may enter a mean; default: by the scores stored with the weights.

    Raises:
        MixedSettingError: when the accuracy records do not share model, n, machine and so on.
    """

    def __init__(
        self,
        records: Iterable[Record],
        baseline: str = "vanilla",
        benchmarks: Mapping[str, SheetMaker] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.records = latest(select(records, "accuracy"))
        self.setting = one_setting(self.records)
        self.baseline = baseline
        self.guard = guard_of(self.setting) if guard is None else guard
        self._benchmarks = benchmarks
        self._sheets: dict[tuple[str, int, str], Sheet | None] = {}

    @property
    def total(self) -> int | None:
        """Visual tokens of the untouched model; None without a baseline record."""
        budgets = {r["request"]["budget"] for r in select(self.records, method=self.baseline)}
        return max(budgets) if budgets else None

    def record(self, method: str, budget: int, benchmark: str) -> Record | None:
        """The record of a method at a budget on a benchmark."""
        found = select(self.records, method=method, budget=budget, benchmark=benchmark)
        return pick_run(found, method, budget, self.total)

    def sheet(self, method: str, budget: int, benchmark: str) -> Sheet | None:
        """The scored answers of that record.

        Raises:
            RecordError: when the record is about other questions than this kit asks.
        """
        key = (method, budget, benchmark)
        if key not in self._sheets:
            record = self.record(*key)
            self._sheets[key] = None if record is None else self._score(record)
        return self._sheets[key]

    def score(self, method: str, budget: int, benchmark: str) -> Estimate | None:
        """The benchmark's own metric."""
        sheet = self.sheet(method, budget, benchmark)
        return None if sheet is None else stats.interval(sheet)

    def retention(self, method: str, budget: int, benchmarks: Sequence[str]) -> Estimate | None:
        """Score in percent of the untouched model's, the mean over benchmarks, paired.

        Benchmarks that the guard does not admit are left out of the mean.
        """
        names = self.guard.admitted(benchmarks)
        pairs = {name: self._pair(method, budget, name) for name in names}
        known = {name: pair for name, pair in pairs.items() if pair is not None}
        if not known or len(known) < len(pairs):  # a mean over some would be another quantity
            return None
        if len(known) == 1:
            return stats.paired_retention(*next(iter(known.values())))
        return stats.mean_retention(known)

    def retention_terms(self, method: str, budget: int, benchmark: str) -> Sheet | None:
        """A sheet whose value is the retention in percent, drawn together with its baseline."""
        pair = self._pair(method, budget, benchmark)
        if pair is None:
            return None
        own, untouched = pair
        return _ratio(own, untouched)

    def score_terms(self, method: str, budget: int, benchmark: str) -> Sheet | None:
        """A sheet whose value is the score in percent of the best possible one."""
        sheet = self.sheet(method, budget, benchmark)
        if sheet is None:
            return None
        scale, value = 100 / sheet.headline_max, sheet.value
        return replace(sheet, value=lambda s: scale * value(s), headline_max=100.0)

    def failed(self, method: str, budget: int, benchmark: str) -> int:
        """Answers that never came (they count as wrong)."""
        record = self.record(method, budget, benchmark)
        return 0 if record is None else int(record["counts"]["failed"])

    def tokens(self, method: str, budget: int) -> tuple[float, float, float] | None:
        """Visual tokens of a method's records: mean over layers, smallest, largest of any image."""
        found = select(self.records, method=method, budget=budget)
        names = {r["request"]["benchmark"] for r in found}
        records = [self.record(method, budget, name) for name in sorted(names)]
        tokens = [r["tokens"] for r in records if r is not None]
        if not tokens:
            return None
        layers = np.array([t["per_layer"] for t in tokens], dtype=float)
        spread = np.array([t.get("spread") or [[x, x] for x in t["per_layer"]] for t in tokens])
        return float(layers.mean()), float(spread.min()), float(spread.max())

    def _pair(self, method: str, budget: int, benchmark: str) -> tuple[Sheet, Sheet] | None:
        total = self.total
        if total is None:
            return None
        sheets = self.sheet(method, budget, benchmark), self.sheet(self.baseline, total, benchmark)
        if sheets[0] is None or sheets[1] is None:
            return None
        return sheets[0], sheets[1]

    def _score(self, record: Record) -> Sheet | None:
        request = record["request"]
        name, split, n = request["benchmark"], request["split"], request["n"]
        known = ALL_BENCHMARKS if self._benchmarks is None else self._benchmarks
        if name not in known:
            return None
        if self._benchmarks is None:
            rows, data_hash = question_rows(name, split, n)
        else:
            rows = list(known[name].dataset(split, n))
            data_hash = request_hash(rows)
        made = record["provenance"].get("data_hash")
        asked = [question for question, _ in record["answers"]]
        if made not in (None, data_hash) or asked != [row["question_id"] for row in rows]:
            raise RecordError(
                f"The record of {method_key(record)} at {request['budget']} tokens answers other "
                f"questions than {name} asks now: run it again."
            )
        return known[name].sheet(rows, [answer for _, answer in record["answers"]])


def contrast(terms: Mapping[str, Sequence[tuple[float, Sheet]]]) -> Estimate:
    """A weighted sum of sheet values, with its interval.

    Args:
        terms: for each benchmark its weights and sheets, all on the same pictures. Sheets of one
            benchmark share every draw, benchmarks are drawn independently.

    Returns:
        The sum, in the unit of the sheets' values.
    """
    sums = {name: _weighted(parts) for name, parts in terms.items()}
    zero = {name: replace(sheet, value=_nothing) for name, sheet in sums.items()}
    mean = stats.mean_difference({name: (sheet, zero[name]) for name, sheet in sums.items()})
    n = len(sums)
    found = replace(mean, value=n * mean.value, low=n * mean.low, high=n * mean.high)
    return found if mean.draws is None else replace(found, draws=n * mean.draws)


def pick_run(found: Sequence[Record], method: str, budget: int, total: int | None) -> Record | None:
    """The one record among several of a method: that with the hyper-parameters of its budget.

    Raises:
        MixedSettingError: when several differ and none has the method's own hyper-parameters.
    """
    if len(found) <= 1:
        return found[0] if found else None
    if method in METHODS and total is not None:
        own = METHODS[method].for_budget(budget, total).describe()
        usual = [r for r in found if r["request"]["method"] == own]
        if len(usual) == 1:
            return usual[0]
    varying = [dict(r["request"]["method"]) for r in found]
    raise MixedSettingError(
        f"{len(found)} runs of {method} at {budget} tokens fit ({varying}): pick one with "
        "`records.select(...)`."
    )


@cache
def question_rows(name: str, split: EvalSplit, n: int) -> tuple[list[dict[str, Any]], str]:
    """The kit's own questions, made once per process, and their hash."""
    rows = list(without_pictures(ALL_BENCHMARKS[name].dataset(split, n)))
    return rows, request_hash(rows)


def _ratio(own: Sheet, untouched: Sheet) -> Sheet:
    def percent(own: np.ndarray, untouched: np.ndarray) -> np.ndarray:
        whole = np.asarray(untouched, dtype=float)
        return 100 * np.divide(own, whole, out=np.full(whole.shape, np.nan), where=whole != 0)

    return _stacked([own, untouched], percent)


def _weighted(parts: Sequence[tuple[float, Sheet]]) -> Sheet:
    def total(*values: np.ndarray) -> np.ndarray:
        return np.sum([w * v for (w, _), v in zip(parts, values, strict=True)], axis=0)

    return _stacked([sheet for _, sheet in parts], total)


def _stacked(sheets: Sequence[Sheet], combine: Callable[..., np.ndarray]) -> Sheet:
    """One sheet whose value combines the values of others about the same pictures."""
    first = sheets[0]
    if any(sheet.image_ids != first.image_ids for sheet in sheets):
        raise ValueError("A combined figure needs sheets about the same pictures.")
    ends = np.cumsum([sheet.stats.shape[1] for sheet in sheets])[:-1]

    def value(totals: np.ndarray) -> np.ndarray:
        own = np.split(totals, ends, axis=-1)
        return combine(*(sheet.value(part) for sheet, part in zip(sheets, own, strict=True)))

    stacked = np.hstack([sheet.stats for sheet in sheets])
    return replace(first, stats=stacked, value=value, headline_max=100.0)


def _nothing(totals: np.ndarray) -> np.ndarray:
    return np.zeros(totals.shape[:-1])
