"""The rows of a comparison as they were measured, and what tables and figures need of a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pandas as pd

from frugalvlm.door.request import Line
from frugalvlm.report.display import Table
from frugalvlm.runs.records import Record
from frugalvlm.verdicts.guard import Guard

__all__ = ["Answered", "Compared", "Questions"]


@dataclass(frozen=True, eq=False)
class Questions:
    """A benchmark and the very rows that were asked, so that scoring makes none a second time."""

    benchmark: Any
    rows: Sequence[Mapping[str, Any]]

    def dataset(self, split: str, n: int) -> Sequence[Mapping[str, Any]]:
        """The rows, without pictures."""
        return self.rows

    def sheet(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str | None]) -> Any:
        """Answers, scored by the benchmark."""
        return self.benchmark.sheet(rows, answers)


@dataclass(frozen=True, eq=False)
class Answered:
    """A row with what was measured of it.

    Attributes:
        line: method and budget.
        records: its accuracy records by the name of the data.
        cost: its row of the efficiency record, if costs were measured.
    """

    line: Line
    records: Mapping[str, Record] = field(default_factory=dict)
    cost: Mapping[str, Any] | None = None


class Compared(Protocol):
    """A result, as its tables and figures see it; see `result.ComparisonResult`."""

    @property
    def answered(self) -> Sequence[Answered]:
        """All rows."""

    @property
    def records(self) -> Sequence[Record]:
        """What is behind them."""

    @property
    def data(self) -> Mapping[str, Questions]:
        """The questions by name."""

    @property
    def notes(self) -> Sequence[str]:
        """More for the caption."""

    @property
    def paper(self) -> str | None:
        """Whose table it is."""

    @property
    def frame(self) -> pd.DataFrame:
        """Every number."""

    @property
    def table(self) -> Table:
        """For people."""

    @property
    def guard(self) -> Guard:
        """Which benchmarks may enter a mean."""

    @property
    def skipped(self) -> list[Line]:
        """Rows that could not run."""

    @property
    def n(self) -> int:
        """Questions per benchmark."""
