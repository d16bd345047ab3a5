"""A table that is ready to be shown: terminal, HTML, Markdown, data frame; and number formats."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from rich.console import Console, ConsoleOptions, Group

from frugalvlm.papers import Budget, Column, LayoutModel, Paper, all_papers, load_paper
from frugalvlm.report.latex import latex_table
from frugalvlm.report.terminal import Minor, fits, terminal_table
from frugalvlm.runs.records import Record

TERMINAL = 140  # columns of a terminal that shows every column of a table


@dataclass(frozen=True)
class Cell:
    """One cell; lines by newline.

    `short` is for a terminal, `tight` for one of 80 columns, `long` for HTML, `brief` for Markdown.
    """

    short: str
    long: str = ""
    brief: str = ""
    tight: str = ""


@dataclass(frozen=True)
class Block:
    """Rows under one heading, e.g. all methods at one budget.

    `minor` ones belong to the block above and are set apart by a thin rule.
    """

    heading: str
    rows: tuple[tuple[Cell, ...], ...]
    minor: bool = False


@dataclass(frozen=True)
class Narrow:
    """How a table is shown where a terminal has no room for all of it.

    Attributes:
        headers: of the columns that are left, by their index.
        note: what the cells hold there, if not what the caption says.
    """

    headers: Mapping[int, str]
    note: str = ""


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
        narrow: what a terminal of 80 columns shows; None: all columns, long cells folded.
        more: tables about the same rows, shown below.
    """

    title: str
    headers: tuple[str, ...]
    blocks: tuple[Block, ...]
    caption: tuple[str, ...]
    data: pd.DataFrame
    facts: Mapping[str, Any] = field(default_factory=dict)
    styles: Mapping[str, str] = field(default_factory=dict)
    narrow: Narrow | None = None
    more: tuple[Table, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """The numbers; a copy."""
        return self.data.copy()

    def to_rich(self, width: int = TERMINAL) -> Group:
        """For a terminal so many columns wide; where it has no room for all, `narrow` decides."""
        blocks = [(_headed(b), [[c.short for c in row] for row in b.rows]) for b in self.blocks]
        headers, notes = list(self.headers), list(self.caption)
        if self.narrow is not None and not fits(headers, blocks, width):
            columns = list(self.narrow.headers)
            tight = [[[row[i].tight or row[i].short for i in columns] for row in b.rows]
                     for b in self.blocks]  # fmt: skip
            blocks = [(_headed(b), rows) for b, rows in zip(self.blocks, tight, strict=True)]
            headers = list(self.narrow.headers.values())
            notes.append(self._left_out(self.narrow))
        shown = terminal_table(self.title, headers, blocks, notes, width, self.styles)
        below = [table.to_rich(width) for table in self.more]
        return Group(shown, *below) if below else shown

    def to_latex(self, label: str = "") -> str:
        r"""For a paper, with booktabs; `label` is what `\ref` finds."""
        blocks = [(_headed(b), [[c.brief or c.short for c in row] for row in b.rows])
                  for b in self.blocks]  # fmt: skip
        own = latex_table(self.title, self.headers, blocks, self.caption, label)
        return "\n".join([own, *(table.to_latex() for table in self.more)])

    def to_html(self) -> str:
        """Self-contained, for notebooks and pages."""
        head = "".join(f'<th scope="col">{_html(h)}</th>' for h in self.headers)
        body = "".join(self._html_block(block) for block in self.blocks)
        notes = "".join(f"<p>{_html(line)}</p>" for line in self.caption)
        more = "".join(table.to_html() for table in self.more)
        return (
            f'<div class="frugalvlm">{_CSS}<table><caption>{_html(self.title)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}</div>{more}"
        )

    def to_markdown(self) -> str:
        """For a README: a table in GitHub's dialect and its caption."""
        lines = [_pipes(self.headers), _pipes(["---", *["---:"] * (len(self.headers) - 1)])]
        for block in self.blocks:
            if block.heading:
                blank = [""] * (len(self.headers) - 1)
                mark = "*" if block.minor else "**"
                lines.append(_pipes([f"{mark}{_markdown(block.heading)}{mark}", *blank]))
            for row in block.rows:
                lines.append(_pipes([_markdown(c.brief or c.short) for c in row]))
        notes = "\n\n".join(_markdown(line) for line in self.caption)
        own = "\n".join([f"**{_markdown(self.title)}**", "", *lines, "", notes]) + "\n"
        return "\n".join([own, *(table.to_markdown() for table in self.more)])

    def _left_out(self, narrow: Narrow) -> str:
        left = [h.replace("\n", " ") for i, h in enumerate(self.headers) if i not in narrow.headers]
        what = f"Left out here: {', '.join(left)}. " if left else ""
        note = f"{narrow.note} " if narrow.note else ""
        return f"{note}{what}A wider terminal ({TERMINAL} columns) and the page have everything."

    def _html_block(self, block: Block) -> str:
        span = len(self.headers)
        kind = ' class="minor"' if block.minor else ""
        heading = (
            f'<tr><th{kind} colspan="{span}" scope="rowgroup">{_html(block.heading)}</th></tr>'
        )
        rows = ""
        for row in block.rows:
            cells = "".join(f"<td>{_html(c.long or c.short)}</td>" for c in row)
            rows += f"<tr>{cells}</tr>"
        return (heading if block.heading else "") + rows

    def _repr_html_(self) -> str:
        return self.to_html()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Group]:
        yield self.to_rich(options.max_width)


def _headed(block: Block) -> str | Minor:
    return Minor(block.heading) if block.minor else block.heading


def budget_at(budget: Budget, scale: str, model: LayoutModel, total: int) -> int | None:
    """The number of visual tokens per crop, of `total`, that a layout's budget means at a scale."""
    if scale == "pocket":
        return model.kept(budget, total)
    return model.at(budget, total)


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


def column_name(column: Column) -> str:
    """What to call a column: a pocket benchmark is never called by an official name alone."""
    if not column.id.startswith("pocket-"):
        return column.label
    return f"pocket-\n{column.label}" + ("-hd" if column.id.endswith("-hd") else "")


def stands_for(columns: Sequence[Column]) -> tuple[str, ...]:
    """A sentence on what pocket columns are; none where there are none."""
    names = [
        f"{column_name(c)} ({c.paper_benchmark})".replace("\n", "")
        for c in columns
        if c.id.startswith("pocket-") and c.paper_benchmark
    ]
    if not any(c.id.startswith("pocket-") for c in columns):
        return ()
    printed = f" Printed beside them are the official ones: {', '.join(names)}." if names else ""
    return (f"Columns are this kit's own pocket benchmarks, no official sets.{printed}",)


def labels_of(paper: Paper | str | None) -> dict[str, str]:
    """What a paper's layouts call its methods, by key; the pocket tables' names come first."""
    if paper is None:
        return {}
    paper = load_paper(paper) if isinstance(paper, str) else paper
    layouts = sorted(paper.tables, key=lambda layout: "pocket" in layout.scales)
    return {row.method: row.label for t in layouts for row in t.rows} | dict(paper.labels)


def method_labels() -> dict[str, str]:
    """What papers call methods, by key; a paper's name for its own method comes first."""
    names: dict[str, str] = {}
    for paper in all_papers():
        own = labels_of(paper)
        names = own | names
        names |= {k: v for k, v in own.items() if k == paper.key}
    return names


def method_label(key: str) -> str:
    """What papers call one method; its key where none does."""
    return method_labels().get(key, key)


def name_of(paper: Paper | str) -> str:
    """What to call a paper in a word: its method, its title up to the colon, or its authors."""
    paper = load_paper(paper) if isinstance(paper, str) else paper
    head, own = paper.title.split(":")[0], labels_of(paper).get(paper.key, "")
    if " " not in head:
        return head
    if own.lower() == paper.key:
        return own
    return head if len(head) <= 30 else f"{paper.authors[0].split()[-1]} et al. {paper.year}"


# A value and its interval, or a figure and its share, stay on one line.
_TOGETHER = re.compile(
    r"(?:[-+]?[\d.,]+(?:x| %)? )?\[[-+\d][^\[\]\n]{2,39}\]|\[no interval\]|[\d.]+ ±[\d.]+(?: %)?"
)


def _html(text: str) -> str:
    kept = _TOGETHER.sub(lambda m: f"<span>{m[0]}</span>", html.escape(text))
    return kept.replace("\n", "<br>")


def _markdown(text: str) -> str:
    for sign in ("|", "*", "_", "<", ">"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", "<br>")


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("\n", "<br>") for c in cells) + " |"


_CSS = """<style>
.frugalvlm table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:0.82em}
.frugalvlm caption{text-align:left;font-weight:bold;padding:0.4em 0}
.frugalvlm td,.frugalvlm th{padding:0.3em 0.5em;text-align:right;vertical-align:top;
border-bottom:1px solid rgba(128,128,128,0.35)}
.frugalvlm td:first-child,.frugalvlm th:first-child,.frugalvlm th[colspan]{text-align:left}
.frugalvlm th[colspan]{background:rgba(128,128,128,0.12)}
.frugalvlm th.minor{background:none;font-weight:normal;font-style:italic;
border-top:1px solid rgba(128,128,128,0.7);padding:0.1em 0.5em}
.frugalvlm td span,.frugalvlm th span,.frugalvlm p span{white-space:nowrap}
.frugalvlm p{font-size:0.85em;max-width:60em;margin:0.4em 0}
</style>"""
