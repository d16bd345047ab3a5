"""A table that is ready to be shown: terminal, HTML, Markdown, data frame; and number formats."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from frugalvlm.formats import NOT_MEASURED
from frugalvlm.papers import Budget, LayoutModel, Paper, load_paper
from frugalvlm.runs.records import Record

TERMINAL = 120  # columns that a table should fit in


@dataclass(frozen=True)
class Cell:
    """One cell: `short` for a terminal, `long` for HTML, `brief` for Markdown; lines by newline."""

    short: str
    long: str = ""
    brief: str = ""


@dataclass(frozen=True)
class Block:
    """Rows under one heading, e.g. all methods at one budget."""

    heading: str
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Table:
    """A table that is ready to be shown.

    Attributes:
        title: one line.
        headers: one per column.
        blocks: the rows.
        caption: sentences to read it by: scale, model, n, hardware, what a cell shows.
        data: every number, one row per cell, with interval, n and the paper's number.
        facts: scale, model, n and hardware, for the titles of figures.
        styles: rich style of cells with this very text.
    """

    title: str
    headers: tuple[str, ...]
    blocks: tuple[Block, ...]
    caption: tuple[str, ...]
    data: pd.DataFrame
    facts: Mapping[str, Any] = field(default_factory=dict)
    styles: Mapping[str, str] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """The numbers; a copy."""
        return self.data.copy()

    def to_rich(self) -> Group:
        """For the terminal, at most 120 columns wide."""
        shown: list[Text | RichTable] = [Text(self.title, style="bold"), Text("")]
        # Rich knows no cell over all columns, so each block is a table of its own, equally wide.
        shown.append(self._rich_block(Block("", ()), show_header=True))
        for block in self.blocks:
            if block.heading:
                shown.append(Text(block.heading, style="cyan"))
            shown.append(self._rich_block(block, show_header=False))
        return Group(*shown, Text(""), *(Text(line, style="dim") for line in self.caption))

    def to_html(self) -> str:
        """Self-contained, for notebooks and pages."""
        head = "".join(f"<th>{_html(h)}</th>" for h in self.headers)
        body = "".join(self._html_block(block) for block in self.blocks)
        notes = "".join(f"<p>{_html(line)}</p>" for line in self.caption)
        return (
            f'<div class="frugalvlm">{_CSS}<table><caption>{_html(self.title)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}</div>"
        )

    def to_markdown(self) -> str:
        """For a README: a table in GitHub's dialect and its caption."""
        lines = [_pipes(self.headers), _pipes(["---", *["---:"] * (len(self.headers) - 1)])]
        for block in self.blocks:
            if block.heading:
                blank = [""] * (len(self.headers) - 1)
                lines.append(_pipes([f"**{_markdown(block.heading)}**", *blank]))
            for row in block.rows:
                lines.append(_pipes([_markdown(c.brief or c.short) for c in row]))
        notes = "\n\n".join(_markdown(line) for line in self.caption)
        return "\n".join([f"**{_markdown(self.title)}**", "", *lines, "", notes]) + "\n"

    def _rich_block(self, block: Block, show_header: bool) -> RichTable:
        table = RichTable(
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
            show_header=show_header,
        )  # fmt: skip
        for i, (header, width) in enumerate(zip(self.headers, self._widths(), strict=True)):
            table.add_column(Text(header), justify="left" if i == 0 else "right", width=width)
        for row in block.rows:
            table.add_row(*(Text(c.short, style=self.styles.get(c.short, "")) for c in row))
        return table

    def _widths(self) -> list[int]:
        columns = zip(*(row for block in self.blocks for row in block.rows), strict=True)
        cells = [[c.short for c in column] for column in columns] or [[] for _ in self.headers]
        widths = [
            max(_width(text) for text in (header, *column))
            for header, column in zip(self.headers, cells, strict=True)
        ]
        # Where a line gets too long, names of several words take several lines.
        words = [word for text in (self.headers[0], *cells[0]) for word in text.split()]
        word = max(map(len, words), default=0)
        widths[0] = max(word, widths[0] - max(0, sum(widths) + 2 * len(widths) - 2 - TERMINAL))
        return widths

    def _html_block(self, block: Block) -> str:
        span = len(self.headers)
        heading = f'<tr><th colspan="{span}">{_html(block.heading)}</th></tr>'
        rows = ""
        for row in block.rows:
            cells = "".join(f"<td>{_html(c.long or c.short)}</td>" for c in row)
            rows += f"<tr>{cells}</tr>"
        return (heading if block.heading else "") + rows

    def _repr_html_(self) -> str:
        return self.to_html()

    def __rich__(self) -> Group:
        return self.to_rich()


def budget_at(budget: Budget, scale: str, model: LayoutModel, total: int) -> int | None:
    """The number of visual tokens per crop, of `total`, that a layout's budget means at a scale."""
    if scale == "pocket":
        return model.kept(budget, total)
    return budget.per_crop or budget.paper_tokens


def total_at(model: LayoutModel, scale: str) -> int:
    """Visual tokens per crop of the untouched model at a scale."""
    if scale == "pocket" and model.pocket_tokens is not None:
        return model.pocket_tokens
    return model.tokens // model.crops


def hardware(record: Record) -> str:
    """What a record ran on, in one phrase."""
    described = record["provenance"].get("hardware") or {}
    gpu, cpu = described.get("gpu"), described.get("cpu") or {}
    if gpu:
        return str(gpu.get("name"))
    cores = cpu.get("usable_cores") or cpu.get("logical_cores")
    return f"CPU {cpu.get('model', 'unknown')}" + (f", {cores} cores" if cores else "")


def facts_of(records: Sequence[Record], scale: str, n: int | None) -> dict[str, Any]:
    """What caption and figures say of the newest record: scale, model, n, hardware."""
    if not records:
        return {"scale": scale, "model": None, "n": n, "hardware": None, "split": None}
    newest = records[-1]
    request = newest["request"]
    return {
        "scale": request.get("scale", scale),
        "model": request.get("model"),
        "split": request.get("split"),
        "n": n,
        "hardware": hardware(newest),
        "machine": newest["provenance"]["machine"],
        "dtype": request.get("dtype"),
    }


def setting_lines(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The first line of a caption."""
    if facts["model"] is None:
        return (f"Scale: {facts['scale']}. No records yet.",)
    parts = [f"Scale: {facts['scale']}", f"model: {facts['model']}"]
    if facts.get("split"):
        parts.append(f"{facts['split']} split")
    parts += [f"{facts['dtype']}" if facts.get("dtype") else "", f"hardware: {facts['hardware']}"]
    return ("; ".join(p for p in parts if p) + f" (machine {facts['machine']}).",)


def budget_heading(tokens: int, total: int, budget: Budget | None, model: LayoutModel) -> str:
    """Heading of a block: our tokens, and the paper's where they differ."""
    if tokens == total:
        return f"untouched: all {total} visual tokens"
    paper = ""
    if budget is not None and budget.paper_tokens != tokens:
        paper = f"; paper: {budget.setting or f'{budget.paper_tokens} of {model.tokens}'}"
    return f"{tokens} of {total} visual tokens ({100 * tokens / total:.1f} %{paper})"


def labels_of(paper: Paper | str | None) -> dict[str, str]:
    """What a paper's layouts call its methods, by key; the pocket tables' names come first."""
    if paper is None:
        return {}
    paper = load_paper(paper) if isinstance(paper, str) else paper
    layouts = sorted(paper.tables, key=lambda layout: "pocket" in layout.scales)
    return {row.method: row.label for t in layouts for row in t.rows} | dict(paper.labels)


def _width(text: str) -> int:
    """Columns a cell needs in a terminal; only "not measured" may be wrapped."""
    lines = text.replace(NOT_MEASURED, "measured").splitlines()
    return max((len(line) for line in lines), default=0)


def _html(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def _markdown(text: str) -> str:
    for sign in ("|", "*", "_", "<", ">"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", "<br>")


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("\n", "<br>") for c in cells) + " |"


_CSS = """<style>
.frugalvlm table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:0.9em}
.frugalvlm caption{text-align:left;font-weight:bold;padding:0.4em 0}
.frugalvlm td,.frugalvlm th{padding:0.3em 0.7em;text-align:right;vertical-align:top;
border-bottom:1px solid rgba(128,128,128,0.35)}
.frugalvlm td:first-child,.frugalvlm th:first-child,.frugalvlm th[colspan]{text-align:left}
.frugalvlm th[colspan]{background:rgba(128,128,128,0.12)}
.frugalvlm p{font-size:0.85em;max-width:60em;margin:0.4em 0}
</style>"""
