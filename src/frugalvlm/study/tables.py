"""Tables from records: in the paper's own layout, each number beside the paper's.

A `Table` holds the text of its cells in a short form (terminal) and a long one (HTML), and all
numbers behind them as a tidy data frame. Nothing here runs a model.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from frugalvlm.study import papers
from frugalvlm.study.papers import Budget, Column, LayoutModel, Paper, load_paper
from frugalvlm.study.records import Record, latest, one_setting, select
from frugalvlm.study.scored import Scored, SheetMaker
from frugalvlm.study.stats import Estimate

__all__ = [
    "NOT_MEASURED",
    "Block",
    "Cell",
    "Table",
    "accuracy_table",
    "blueprint_table",
    "budget_at",
    "efficiency_table",
    "energy_table",
    "hardware",
    "total_at",
]

NOT_MEASURED = "not measured"
NONE_PRINTED = "–"
INTERVAL = "95 % bootstrap interval over pictures"


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
        return [
            max(_width(text) for text in (header, *column))
            for header, column in zip(self.headers, cells, strict=True)
        ]

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


@dataclass(frozen=True)
class _Beside:
    """What papers print for a cell: the number, its share of the baseline's, and where."""

    value: float | None = None
    retention: float | None = None
    source: str = ""
    verified: bool = True


def accuracy_table(
    paper: Paper | str,
    table_id: str,
    records: Iterable[Record],
    *,
    scale: str = "pocket",
    benchmarks: Mapping[str, SheetMaker] | None = None,
) -> Table:
    """A paper's accuracy table in its own layout, from records.

    Args:
        paper: the paper or its key.
        table_id: which of its layouts.
        records: records of one setting (one model, n, machine ...); incomplete ones are left out.
        scale: at which the budgets of the layout are read when there are no records.
        benchmarks: by id; default: the kit's own.

    Raises:
        MixedSettingError: when the records differ in their setting; pick one first.
        ValueError: for an unknown layout.
    """
    paper = load_paper(paper) if isinstance(paper, str) else paper
    layout = paper.table(table_id)
    scored = Scored(records, layout.baseline, benchmarks)
    scale = scored.setting.get("scale", scale)
    total = scored.total or total_at(layout.model, scale)
    lines, heading_of = [], {}
    for row, budget in _lines_of(layout):
        tokens = total if budget is None else budget_at(budget, scale)
        if tokens is None:
            continue
        heading_of[tokens] = _heading(tokens, total, budget, layout.model)
        lines.append(_accuracy_line(paper, layout, row, budget, tokens, scored))
    failures = any(line["failed"] > 0 for line in lines)
    blocks = tuple(
        Block(heading, tuple(_cells(line, failures) for line in lines if line["budget"] == tokens))
        for tokens, heading in heading_of.items()
    )
    frame = pd.DataFrame([cell for line in lines for cell in line["data"]])
    facts = _facts(scored.records, scale, int(frame["n"].max()) if frame["n"].any() else 0)
    return Table(
        title=f"{paper.title.split(':')[0]}, {layout.where} at the {scale} scale",
        headers=(
            "method",
            "tokens\nasked/mean",
            *(_column_header(column, frame) for column in layout.columns),
            "mean\nretention",
            *(["failed"] if failures else []),
        ),
        blocks=blocks,
        caption=(*_setting_lines(facts), *_ACCURACY_CAPTION, *_notes(layout)),
        data=frame,
        facts=facts,
    )


_ACCURACY_CAPTION = (
    f"Score with its {INTERVAL} (± is half its width); below it the share of the untouched model's "
    "score that is retained (same questions, paired), and beside that what the paper's own numbers "
    f"give ({NONE_PRINTED}: none printed). Tokens: asked for, and the mean over decoder layers. "
    "A failed answer counts as wrong.",
)


def _lines_of(layout: papers.Table) -> list[tuple[papers.Row, Budget | None]]:
    """The baseline, then budget by budget all other rows."""
    base = [(row, None) for row in layout.rows if row.method == layout.baseline]
    others = [row for row in layout.rows if row.method != layout.baseline]
    return [*base, *((row, budget) for budget in layout.budgets for row in others)]


def _accuracy_line(
    paper: Paper,
    layout: papers.Table,
    row: papers.Row,
    budget: Budget | None,
    tokens: int,
    scored: Scored,
) -> dict[str, Any]:
    """One row: its cells' numbers, and what they share."""
    ids = [column.id for column in layout.columns]
    beside = [_printed(paper, layout, row, column, budget) for column in layout.columns]
    counted = scored.tokens(row.method, tokens)
    shared = {
        "scale": scored.setting.get("scale"),
        "model": scored.setting.get("model"),
        "method": row.method,
        "label": row.label,
        "budget": tokens,
        "paper_tokens": layout.model.tokens if budget is None else budget.paper_tokens,
        "tokens_mean": counted and counted[0],
        "tokens_min": counted and counted[1],
        "tokens_max": counted and counted[2],
    }
    data = [
        shared | {"benchmark": column.id, "unit": column.unit} | _numbers(
            scored.score(row.method, tokens, column.id),
            scored.retention(row.method, tokens, [column.id]),
            printed,
            scored.failed(row.method, tokens, column.id),
        )
        for column, printed in zip(layout.columns, beside, strict=True)
    ]  # fmt: skip
    ratios = [b.retention for b in beside if b.retention is not None]
    whole = len(ratios) == len(beside)
    sources = sorted({b.source for b in beside if b.source})
    mean = _Beside(None, sum(ratios) / len(ratios) if whole else None, "; ".join(sources))
    failed = sum(scored.failed(row.method, tokens, name) for name in ids)
    overall = _numbers(None, scored.retention(row.method, tokens, ids), mean, failed)
    data.append(shared | {"benchmark": "mean", "unit": "%"} | overall)
    return {**shared, "failed": failed, "data": data}


def _numbers(
    score: Estimate | None, retention: Estimate | None, beside: _Beside, failed: int
) -> dict[str, Any]:
    known = score or retention
    return {
        "n": known.n_questions if known else 0,
        "images": known.n_images if known else 0,
        "failed": failed,
        "score": score and score.value,
        "score_low": score and score.low,
        "score_high": score and score.high,
        "retention": retention and retention.value,
        "retention_low": retention and retention.low,
        "retention_high": retention and retention.high,
        "paper_score": beside.value,
        "paper_retention": beside.retention,
        "paper_source": beside.source,
        "paper_verified": beside.verified,
        "reason": retention.reason if retention else "",
    }


def _printed(
    paper: Paper, layout: papers.Table, row: papers.Row, column: Column, budget: Budget | None
) -> _Beside:
    """The paper's number of a cell; its retention only beside a baseline of the same paper."""
    value = paper.printed(layout, row, column, budget)
    if value is None:
        return _Beside()
    source = paper if row.paper is None else load_paper(row.paper, folder=paper.folder)
    where = row.paper_table or layout.paper_table or ""
    whole = None
    if row.paper is None:
        base = next(r for r in layout.rows if r.method == layout.baseline)
        whole = paper.printed(layout, base, column)
    verified = where not in {u.table for u in source.unverified}
    share = 100 * value / whole if whole else None
    return _Beside(value, share, f"arXiv:{source.arxiv} {where}", verified)


def _cells(line: Mapping[str, Any], failures: bool) -> tuple[Cell, ...]:
    asked, mean = line["budget"], line["tokens_mean"]
    counted = NONE_PRINTED if mean is None else f"{mean:.4g}"
    spread = ""
    if mean is not None and line["tokens_min"] != line["tokens_max"]:
        spread = f"\n{line['tokens_min']:g} to {line['tokens_max']:g} over layers and images"
    tokens = Cell(f"{asked}/{counted}", f"{asked} asked\n{counted} mean{spread}")
    *own, overall = line["data"]
    cells = [Cell(line["label"]), tokens, *(_score_cell(d) for d in own), _mean_cell(overall)]
    if failures:
        asked_all = sum(d["n"] for d in own)
        cells.append(Cell(f"{line['failed']}/{asked_all}" if asked_all else NONE_PRINTED))
    return tuple(cells)


def _score_cell(d: Mapping[str, Any]) -> Cell:
    paper = _paper_text(d)
    if d["score"] is None:
        return Cell(NOT_MEASURED, f"{NOT_MEASURED}\npaper {paper}", NOT_MEASURED)
    digits = 1 if d["unit"] == "%" else 0
    score = _plus_minus(d["score"], d["score_low"], d["score_high"], digits)
    share = _percent(d["retention"])
    printed = _bare(d["paper_retention"])
    interval = _between(d["score_low"], d["score_high"], digits)
    kept = _between(d["retention_low"], d["retention_high"], 1)
    return Cell(
        f"{score}\n{share} ({printed})",
        f"{d['score']:.{digits}f} {interval}\n{_percent(d['retention'], 1)} {kept}\npaper {paper}",
        f"{score}\n{share} (paper {printed})",
    )


def _mean_cell(d: Mapping[str, Any]) -> Cell:
    printed = _bare(d["paper_retention"])
    if d["retention"] is None:
        return Cell(NOT_MEASURED, f"{NOT_MEASURED}\npaper {printed} %", NOT_MEASURED)
    share = _plus_minus(d["retention"], d["retention_low"], d["retention_high"], 1)
    interval = _between(d["retention_low"], d["retention_high"], 1)
    long = f"{_percent(d['retention'], 1)} {interval}\npaper {_percent(d['paper_retention'], 1)}"
    brief = f"{share} %\n(paper {printed})"
    return Cell(f"{share}\n({printed})", long, brief)


def _paper_text(d: Mapping[str, Any]) -> str:
    """Retention and printed number of the paper, with its source."""
    if d["paper_score"] is None:
        return NONE_PRINTED
    share = "" if d["paper_retention"] is None else f"{d['paper_retention']:.1f} % "
    doubt = "" if d["paper_verified"] else ", not verified"
    return f"{share}({d['paper_score']:g}, {d['paper_source']}{doubt})"


def efficiency_table(records: Iterable[Record], paper: Paper | str | None = None) -> Table:
    """What the methods cost on the hardware at hand, from the newest efficiency record.

    Args:
        records: records of one setting.
        paper: gives the methods their labels.

    Raises:
        MixedSettingError: when the efficiency records come from several models or machines.
    """
    known = latest(select(records, "efficiency"))
    one_setting(known)
    rows = known[-1]["rows"] if known else []
    labels = _labels(paper)
    base = rows[0] if rows else {}
    unit, flops_name = _flops_unit(r["flops"] for r in rows)
    size, size_name = _bytes_unit(r["kv_visual_bytes"] for r in rows)
    data = [_efficiency_numbers(row, base, labels) for row in rows]
    facts = _facts(known[-1:], "pocket", None)
    request = known[-1]["request"] if known else {}
    blocks = [
        (
            Cell(d["label"]),
            _tokens_cell(d),
            Cell(f"{d['flops'] / unit:.2f}\n{100 / d['flops_ratio']:.1f} %"),
            Cell(f"{d['prefill_ms_p50']:.1f}\n{d['prefill_ms_p95']:.1f}"),
            _speedup_cell(d),
            Cell(f"{d['decode_ms_p50']:.2f}\n{d['decode_ms_p95']:.2f}"),
            Cell(NOT_MEASURED if d["peak_mib"] is None else f"{d['peak_mib']:.0f}"),
            Cell(f"{d['kv_visual_bytes'] / size:.1f}\n{d['kv_visual_ratio']:.3f}"),
        )
        for d in data
    ]
    return Table(
        title=f"Cost of prefill and decoding at the {facts['scale']} scale",
        headers=(
            "method", "tokens\nasked/mean", f"prefill {flops_name}\nshare of untouched",
            "prefill ms\np50, p95", "prefill speed-up\n[95 % interval]",
            "decode ms/token\np50, p95", "peak\nMiB", f"visual KV {size_name}\nof untouched",
        ),
        blocks=_by_budget(blocks, data),
        caption=(
            *_setting_lines(facts),
            "FLOPs and cache are counted for one prompt; times and memory are measured for "
            f"batches of {request.get('batch_size', '?')}, methods taking turns in "
            f"{request.get('repeats', '?')} rounds. Speed-up: time of the untouched model over "
            "time with the method, paired by round; vision tower and selection included. Peak "
            f"memory: {rows[0].get('peak_method', '?') if rows else '?'}.",
        ),
        data=pd.DataFrame(data),
        facts=facts,
    )  # fmt: skip


def _efficiency_numbers(
    row: Mapping[str, Any], base: Mapping[str, Any], labels: Mapping[str, str]
) -> dict[str, Any]:
    speedup, prefill, decode = row["prefill_speedup"], row["prefill_ms"], row["decode_ms"]
    return _counted_numbers(row, base, labels) | {
        "prefill_ms_p50": prefill["p50"],
        "prefill_ms_p95": prefill["p95"],
        "decode_ms_p50": decode["p50"],
        "decode_ms_p95": decode["p95"],
        "n": prefill["n"],
        "prefill_speedup": speedup["median"],
        "prefill_speedup_low": speedup["low"],
        "prefill_speedup_high": speedup["high"],
        "peak_mib": row.get("peak_mib"),
        "peak_method": row.get("peak_method", ""),
    }


def _counted_numbers(
    row: Mapping[str, Any], base: Mapping[str, Any], labels: Mapping[str, str]
) -> dict[str, Any]:
    parts = {f"flops_{name}": value for name, value in row["flops_parts"].items()}
    decoder = row["flops_parts"].get("decoder")
    return {
        "model": row.get("model"),
        "method": row["method"],
        "label": labels.get(row["method"], row["method"]),
        "budget": row["budget"],
        "tokens_mean": row["tokens_mean"],
        "tokens_after": row["tokens_after"],
        "flops": row["flops"],
        **parts,
        "flops_ratio": base["flops"] / row["flops"],
        "decoder_flops_ratio": base["flops_parts"]["decoder"] / decoder if decoder else None,
        "kv_bytes": row["kv_bytes"],
        "kv_visual_bytes": row["kv_visual_bytes"],
        "kv_visual_ratio": row["kv_visual_bytes"] / base["kv_visual_bytes"],
    }


def _speedup_cell(d: Mapping[str, Any]) -> Cell:
    interval = _between(d["prefill_speedup_low"], d["prefill_speedup_high"], 2)
    return Cell(f"{d['prefill_speedup']:.2f}x\n{interval}")


def _tokens_cell(d: Mapping[str, Any]) -> Cell:
    return Cell(f"{d['budget']}/{d['tokens_mean']:.4g}")


def blueprint_table(
    paper: Paper | str, records: Iterable[Record], table_id: str = "blueprint"
) -> Table:
    """Exact costs on the paper's own architectures: counted, so without intervals.

    Where the paper printed a prefill time for the same model and budget, its speed-up stands
    beside the FLOPs, marked as the other quantity that it is.

    Args:
        paper: the paper or its key.
        records: blueprint records; of cells counted twice the newest one is shown.
        table_id: the layout that names models, budgets and methods.
    """
    paper = load_paper(paper) if isinstance(paper, str) else paper
    layout = paper.table(table_id)
    counted = {
        (row["model"], row["method"], row["budget"]): row
        for record in latest(select(records, "blueprint"))
        for row in record["rows"]
    }
    labels = _labels(paper)
    blocks, data = [], []
    for model in layout.models:
        base = counted.get((model.name, layout.baseline, model.tokens))
        for budget in (None, *model.budgets):
            tokens = model.tokens if budget is None else budget.paper_tokens
            methods = [
                row.method
                for row in layout.rows
                if (row.method == layout.baseline) == (budget is None)
            ]
            rows = []
            for method in methods:
                row = counted.get((model.name, method, tokens))
                times = _printed_times(paper, model, method, budget)
                if row is None or base is None:
                    gap = {"model": model.name, "method": method, "budget": tokens}
                    data.append(gap | {"label": labels.get(method, method), **times})
                    rows.append(_gap_row(labels.get(method, method), 9))
                    continue
                numbers = _counted_numbers(row, base, labels) | times
                data.append(numbers)
                rows.append(_blueprint_row(numbers))
            heading = f"{model.name}: {_heading(tokens, model.tokens, None, model)}"
            blocks.append(Block(heading, tuple(rows)))
    doubt = {u.table: u.why for u in paper.unverified}
    times_table = next((t for t in paper.tables if _time_column(t)), None)
    why = doubt.get((times_table.paper_table or "") if times_table else "")
    return Table(
        title=f"{paper.title.split(':')[0]}: counted cost of one prefill, no weights involved",
        headers=(
            "method", "tokens\nasked/mean", "TFLOPs\ntotal", "tower", "decoder",
            "other", "FLOPs ratio\nall (decoder)", "visual KV\nMiB (ratio)",
            "another quantity:\nprinted time ratio",
        ),
        blocks=tuple(blocks),
        caption=(
            "Scale: blueprint. Counted on the real modules without weights, one prompt with one "
            "image; exact, so without an interval. Ratio of FLOPs: untouched model over method. "
            "Ratio of the cache: method over untouched. Other: projector, head and the method's "
            "own work.",
            "The last column is no FLOPs figure: it is the paper's measured prefill time of the "
            "untouched model over that with the method, on its own hardware"
            + (f" ({times_table.where}, {times_table.title}" if times_table else "")
            + (f"; {why})." if why else ")." if times_table else "."),
        ),
        data=pd.DataFrame(data),
        facts={"scale": "blueprint"},
    )  # fmt: skip


def _blueprint_row(d: Mapping[str, Any]) -> tuple[Cell, ...]:
    tera, mib = 1e12, 2**20
    known = ("tower", "decoder")
    other = d["flops"] - sum(d[f"flops_{part}"] for part in known)
    time = d["paper_prefill_time_ratio"]
    return (
        Cell(d["label"]),
        _tokens_cell(d),
        Cell(f"{d['flops'] / tera:.2f}"),
        *(Cell(f"{d[f'flops_{part}'] / tera:.2f}") for part in known),
        Cell(f"{other / tera:.2f}"),
        Cell(f"{d['flops_ratio']:.2f}x ({d['decoder_flops_ratio']:.2f}x)"),
        Cell(f"{d['kv_visual_bytes'] / mib:.1f} ({d['kv_visual_ratio']:.3f})"),
        Cell(NONE_PRINTED if time is None else f"{time:.1f}x time"),
    )


def _printed_times(
    paper: Paper, model: LayoutModel, method: str, budget: Budget | None
) -> dict[str, float | None]:
    """The paper's own prefill times of this model and budget, if a layout of it has them."""
    times: dict[str, float | None] = {"paper_prefill_ms": None, "paper_prefill_time_ratio": None}
    for layout in paper.tables:
        column = _time_column(layout)
        own = next((m for m in layout.models if m.name == model.name), None)
        row = next((r for r in layout.rows if r.method == method), None)
        if column is None or own is None or row is None:
            continue
        if budget and budget.paper_tokens not in [b.paper_tokens for b in own.budgets]:
            continue
        base = next(r for r in layout.rows if r.method == layout.baseline)
        untouched = paper.printed(layout, base, column, model=own)
        value = paper.printed(layout, row, column, budget, model=own)
        ratio = untouched / value if untouched and value else None
        times = {"paper_prefill_ms": value, "paper_prefill_time_ratio": ratio}
    return times


def _time_column(layout: papers.Table) -> Column | None:
    return next((c for c in layout.columns if c.metric == "prefill time"), None)


def energy_table(records: Iterable[Record], paper: Paper | str | None = None) -> Table:
    """Energy and carbon per question, in the order of the runs: never sorted by energy.

    Modelled figures are marked and compared with nothing; measured ones are compared only when
    they are reliable and were read by the same methods.

    Raises:
        MixedSettingError: when the efficiency records come from several models or machines.
    """
    known = latest(select(records, "efficiency"))
    one_setting(known)
    rows = known[-1]["rows"] if known else []
    labels = _labels(paper)
    base = rows[0]["energy"] if rows else {}
    data = [_energy_numbers(row, base, labels) for row in rows]
    blocks = [
        (
            Cell(d["label"]),
            _tokens_cell(d),
            Cell(_energy_text(d, "joules_per_question")),
            Cell(_ratio_text(d)),
            Cell(_energy_text(d, "carbon_g_per_1000")),
            *(Cell(str(d[f"{part}_method"])) for part in ("gpu", "cpu", "ram")),
        )
        for d in data
    ]
    facts = _facts(known[-1:], "pocket", None)
    reasons = sorted({reason for row in rows for reason in row["energy"].get("reasons", ())})
    return Table(
        title=f"Energy of one prefill at the {facts['scale']} scale",
        headers=(
            "method", "tokens\nasked/mean", "J per\nquestion", "of\nuntouched",
            "g CO2e per\n1000 questions", "GPU", "CPU", "memory",
        ),
        blocks=_by_budget(blocks, data),
        caption=(
            *_setting_lines(facts),
            "Modelled figures come from a model of the machine's power and not from a counter: "
            "they are shown for orientation and neither ranked nor compared.",
            *([f"Why not measured or not reliable: {'; '.join(reasons)}."] if reasons else []),
        ),
        data=pd.DataFrame(data),
        facts=facts,
    )  # fmt: skip


def _energy_numbers(
    row: Mapping[str, Any], base: Mapping[str, Any], labels: Mapping[str, str]
) -> dict[str, Any]:
    energy = row["energy"]
    joules, whole = energy["joules_per_question"], base["joules_per_question"]
    comparable = _rankable(energy) and _rankable(base) and energy["methods"] == base["methods"]
    methods = energy.get("methods", {})
    return {
        "method": row["method"],
        "label": labels.get(row["method"], row["method"]),
        "budget": row["budget"],
        "tokens_mean": row["tokens_mean"],
        "joules_per_question": joules,
        "carbon_g_per_1000": energy.get("carbon_g_per_1000"),
        "modelled": energy["modelled"],
        "reliable": energy["reliable"],
        "of_untouched": joules / whole if comparable and joules and whole else None,
        **{f"{part}_method": methods.get(part, "none") for part in ("gpu", "cpu", "ram")},
        "reasons": "; ".join(energy.get("reasons", ())),
    }


def _rankable(energy: Mapping[str, Any]) -> bool:
    known = energy["joules_per_question"] is not None
    return known and not energy["modelled"] and bool(energy["reliable"])


def _energy_text(d: Mapping[str, Any], name: str) -> str:
    if d[name] is None:
        return NOT_MEASURED
    mark = " modelled" if d["modelled"] else "" if d["reliable"] else " unreliable"
    return f"{d[name]:.3g}{mark}"


def _ratio_text(d: Mapping[str, Any]) -> str:
    return "not compared" if d["of_untouched"] is None else f"{d['of_untouched']:.2f}"


def budget_at(budget: Budget, scale: str) -> int | None:
    """The number of visual tokens per crop that a layout's budget means at a scale."""
    return budget.pocket_tokens if scale == "pocket" else budget.per_crop or budget.paper_tokens


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


def _facts(records: Sequence[Record], scale: str, n: int | None) -> dict[str, Any]:
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


def _setting_lines(facts: Mapping[str, Any]) -> tuple[str, ...]:
    if facts["model"] is None:
        return (f"Scale: {facts['scale']}. No records yet.",)
    parts = [f"Scale: {facts['scale']}", f"model: {facts['model']}"]
    if facts.get("split"):
        parts.append(f"{facts['split']} split")
    parts += [f"{facts['dtype']}" if facts.get("dtype") else "", f"hardware: {facts['hardware']}"]
    return ("; ".join(p for p in parts if p) + f" (machine {facts['machine']}).",)


def _notes(layout: papers.Table) -> tuple[str, ...]:
    rows = [f"{row.label}: {row.note.rstrip('.')}." for row in layout.rows if row.note]
    return tuple(n for n in (layout.note.strip(), " ".join(rows)) if n)


def _heading(tokens: int, total: int, budget: Budget | None, model: LayoutModel) -> str:
    if tokens == total:
        return f"untouched: all {total} visual tokens"
    paper = ""
    if budget is not None and budget.paper_tokens != tokens:
        paper = f"; paper: {budget.paper_tokens} of {model.tokens}"
    return f"{tokens} of {total} visual tokens ({100 * tokens / total:.1f} %{paper})"


def _column_header(column: Column, frame: pd.DataFrame) -> str:
    n = int(frame.loc[frame["benchmark"] == column.id, "n"].max())
    return f"{column.label}\n" + (f"n={n}" if n else "no records")


def _labels(paper: Paper | str | None) -> dict[str, str]:
    if paper is None:
        return {}
    paper = load_paper(paper) if isinstance(paper, str) else paper
    return {row.method: row.label for layout in paper.tables for row in layout.rows}


def _by_budget(
    rows: Sequence[tuple[Cell, ...]], data: Sequence[Mapping[str, Any]]
) -> tuple[Block, ...]:
    """One block per budget, in the order of the runs; the first row is the untouched model."""
    if not rows:
        return (Block(NOT_MEASURED, ()),)
    total = data[0]["budget"]
    budgets = dict.fromkeys(d["budget"] for d in data)
    return tuple(
        Block(
            f"{budget} of {total} visual tokens ({100 * budget / total:.1f} %)",
            tuple(row for row, d in zip(rows, data, strict=True) if d["budget"] == budget),
        )
        for budget in budgets
    )


def _gap_row(label: str, columns: int) -> tuple[Cell, ...]:
    return (Cell(label), Cell(NOT_MEASURED), *(Cell("") for _ in range(columns - 2)))


def _flops_unit(values: Iterable[float]) -> tuple[float, str]:
    top = max(values, default=1e9)
    return (1e12, "TFLOPs") if top >= 1e12 else (1e9, "GFLOPs")


def _bytes_unit(values: Iterable[float]) -> tuple[int, str]:
    return (2**20, "MiB") if max(values, default=0) >= 2**20 else (2**10, "KiB")


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _plus_minus(value: float, low: float | None, high: float | None, digits: int) -> str:
    if _missing(value):
        return "undefined"
    if low is None or high is None or _missing(low) or _missing(high):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ±{(high - low) / 2:.{digits}f}"


def _between(low: float | None, high: float | None, digits: int) -> str:
    if low is None or high is None or _missing(low) or _missing(high):
        return "[no interval]"
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def _percent(value: float | None, digits: int = 0) -> str:
    if value is None:
        return NONE_PRINTED
    return "undefined" if math.isnan(value) else f"{value:.{digits}f} %"


def _bare(value: float | None) -> str:
    return NONE_PRINTED if value is None else f"{value:.0f}"


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
