"""What a comparison gives back: one tidy frame, tables for people, figures, and the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console, Group

from frugalvlm.door import show
from frugalvlm.door.request import BASELINE, Line
from frugalvlm.door.rows import Answered, Questions
from frugalvlm.report.display import TERMINAL, Table
from frugalvlm.runs.records import Record
from frugalvlm.verdicts.gains import BLANK
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.scored import Scored

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ComparisonResult"]


@dataclass(frozen=True, eq=False)
class ComparisonResult:
    """Methods at budgets on data, with intervals and costs.

    Print it, show it in a notebook, or take its parts.

    Attributes:
        answered: all rows, the untouched model first.
        records: the records behind all numbers, as they lie in `folder`.
        folder: where the records are; the same comparison again runs nothing.
        notes: what else is to be said of this comparison.
    """

    answered: Sequence[Answered]
    records: Sequence[Record]
    folder: Path
    data: Mapping[str, Questions]
    notes: Sequence[str] = ()
    paper_table: Table | None = None
    paper: str | None = None

    @cached_property
    def frame(self) -> pd.DataFrame:
        """A row per method, budget and benchmark: every number, with interval and n.

        Columns: method, label, budget (visual tokens per crop, asked for), benchmark ("mean": over
        several of them), metric, score, retention (% of the untouched model's score, paired), gain
        (% of what the pictures are worth; needs the method `blank`), each with `_low` and `_high`
        (95 %), n, images, failed, tokens_mean (over decoder layers), costs
        of a prefill (flops, flops_share, prefill_ms, speedup, decode_ms, peak_mib, kv_share,
        joules, energy: "measured" or "modelled"), and `reason` where a row could not run. In a
        paper's table also the paper's own numbers.
        """
        costs = {(a.line.key, a.line.budget, a.line.label): show.cost_numbers(a.cost, self._base)
                 for a in self.answered}  # fmt: skip
        if self.paper_table is not None:
            data = self.paper_table.to_frame()
            keys = [(m, b) for m, b in zip(data["method"], data["budget"], strict=True)]
            by_key = {(k, b): numbers for (k, b, _), numbers in costs.items()}
            more = pd.DataFrame([by_key.get(key, show.cost_numbers(None, None)) for key in keys])
            own = data.drop(columns=[name for name in more.columns if name in data.columns])
            return pd.concat([own.reset_index(drop=True), more], axis=1)
        lines = [
            {**cell, **costs[a.line.key, a.line.budget, a.line.label]}
            for a in self.answered
            for cell in self._cells(a)
        ]
        return pd.DataFrame(lines)

    @cached_property
    def table(self) -> Table:
        """For people: a row per method and budget, a column per benchmark; HTML in a notebook."""
        if self.paper_table is not None:
            return self.paper_table
        return show.wide_table(self)

    @cached_property
    def costs(self) -> Table:
        """FLOPs, prefill, decoding, memory, cache and energy; modelled energy is marked so."""
        return show.cost_table(self)

    @property
    def skipped(self) -> list[Line]:
        """The rows that could not run; each says why in `reason`."""
        return [a.line for a in self.answered if a.line.method is None]

    def to_csv(self, path: str | Path) -> Path:
        """Write `frame` as a CSV file; returns its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.frame.to_csv(path, index=False)
        return path

    def to_latex(self) -> str:
        """`table` for a LaTeX document that uses the package booktabs."""
        return self.table.to_latex()

    def plot(
        self,
        kind: str = "tokens",
        benchmark: str | None = None,
        value: str = "retention",
        ax: Axes | None = None,
    ) -> Axes:
        """Accuracy against what it costs, with 95 % intervals; the paper's own curve beside ours.

        Args:
            kind: what is on the axis: "tokens" (mean over decoder layers), "flops" (counted), or
                "time" (of a prefill, measured).
            benchmark: default: the mean, or the only one.
            value: "retention" or "score".
            ax: axes to draw on; a new figure when absent.

        Raises:
            RequestError: for another kind, or where costs were not measured.
        """
        from frugalvlm.door.plots import accuracy_plot
        from frugalvlm.report.plots import retention_curve

        if self.paper_table is not None and (kind, value, benchmark) == (
            "tokens",
            "retention",
            None,
        ):
            return retention_curve(self.paper_table, ax)
        return accuracy_plot(self, kind, benchmark, value, ax)

    @cached_property
    def guard(self) -> Guard:
        """Which benchmarks may enter a mean."""
        return self._scored(self.answered[0]).guard

    @property
    def n(self) -> int:
        """Questions per benchmark, the largest number."""
        return int(self.frame["n"][self.frame["benchmark"] != "mean"].max())

    def _repr_html_(self) -> str:
        return self.table.to_html()

    def __rich__(self) -> Group:
        return self.table.to_rich()

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=TERMINAL, force_terminal=False)
        console.print(self.table)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        rows, out = len(self.answered), len(self.skipped)
        names = ", ".join(dict.fromkeys(self.frame["benchmark"]))
        return (
            f"ComparisonResult({rows} rows, {out} of them impossible; {names}; n = {self.n}; "
            "see .frame, .table, .costs, .plot(), .to_latex(), .to_csv(path), .skipped, .records)"
        )

    # -- numbers ---------------------------------------------------------------------------------

    @property
    def _base(self) -> Mapping[str, Any] | None:
        return self.answered[0].cost if self.answered else None

    def _scored(self, answered: Answered, guard: Guard | None = None) -> Scored:
        """The row's records and those of the untouched model."""
        blank = [a for a in self.answered if a.line.key == BLANK and a is not answered]
        own = [a for a in (answered, *blank) if a.line.key != BASELINE]
        records = [*self.answered[0].records.values(),
                   *(r for a in own for r in a.records.values())]  # fmt: skip
        by_id = {q.benchmark.id: q for q in self.data.values()}
        return Scored(records, BASELINE, by_id, guard)

    def _cells(self, answered: Answered) -> list[dict[str, Any]]:
        """The frame's rows of one method at one budget."""
        line, names = answered.line, list(self.data)
        scored = self._scored(answered, self.guard)
        tokens = scored.tokens(line.key, line.budget) if answered.records else None
        shared = {
            "method": line.key, "label": line.label, "budget": line.budget,
            "tokens_mean": tokens and tokens[0], "tokens_min": tokens and tokens[1],
            "tokens_max": tokens and tokens[2],
        }  # fmt: skip
        cells = [
            {**shared, "benchmark": name, "metric": q.benchmark.metric,
             **show.numbers(scored, line, [q.benchmark.id])}
            for name, q in self.data.items()
        ]  # fmt: skip
        if len(names) > 1:
            ids = [q.benchmark.id for q in self.data.values()]
            overall = show.numbers(scored, line, ids)
            cells.append({**shared, "benchmark": "mean", "metric": "mean retention", **overall})
        return cells
