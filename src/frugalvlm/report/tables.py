"""Tables from records: in the paper's own layout, each number beside the paper's.

Nothing here runs a model. How a table is shown is in `display`, cost tables are in `cost_tables`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from frugalvlm import papers
from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.formats import NONE_PRINTED, NOT_MEASURED, bare, between, percent, plus_minus
from frugalvlm.papers import Budget, Column, Paper, load_paper
from frugalvlm.report.cost_tables import blueprint_table, efficiency_table, energy_table
from frugalvlm.report.display import (
    Block,
    Cell,
    Narrow,
    Table,
    budget_at,
    budget_heading,
    facts_of,
    name_of,
    setting_lines,
    total_at,
)
from frugalvlm.runs.records import Record
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.scored import Scored, SheetMaker

__all__ = [
    "NOT_MEASURED",
    "Block",
    "Cell",
    "Table",
    "accuracy_table",
    "blueprint_table",
    "efficiency_table",
    "energy_table",
]

INTERVAL = "95 % bootstrap interval over pictures"


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
    guard: Guard | None = None,
) -> Table:
    """A paper's accuracy table in its own layout, from records.

    Args:
        paper: the paper or its key.
        table_id: which of its layouts.
        records: records of one setting (one model, n, machine ...); incomplete ones are left out.
        scale: at which the budgets of the layout are read when there are no records.
        benchmarks: by id; default: the kit's own.
        guard: which benchmarks may enter the mean; default: by the scores stored with the weights.

    Raises:
        MixedSettingError: when the records differ in their setting; pick one first.
        ValueError: for an unknown layout.
    """
    paper = load_paper(paper) if isinstance(paper, str) else paper
    layout = paper.table(table_id)
    scored = Scored(records, layout.baseline, benchmarks, guard)
    scale = scored.setting.get("scale", scale)
    total = scored.total or total_at(layout.model, scale)
    others = {row.paper for row in layout.rows if row.paper is not None}
    sources: dict[str | None, Paper | None] = {
        None: paper,
        **{key: paper.other(key) for key in others},
    }
    lines, heading_of = [], {}
    for row, budget in _lines_of(layout):
        tokens = total if budget is None else budget_at(budget, scale, layout.model, total)
        if tokens is None:
            continue
        heading_of[tokens] = budget_heading(tokens, total, budget, layout.model)
        source = sources[row.paper]
        lines.append(_accuracy_line(source, layout, row, budget, tokens, scored))
    failures = any(line["failed"] > 0 for line in lines)
    blocks = tuple(
        Block(heading, tuple(_cells(line, failures) for line in lines if line["budget"] == tokens))
        for tokens, heading in heading_of.items()
    )
    frame = pd.DataFrame([cell for line in lines for cell in line["data"]])
    facts = facts_of(scored.records, scale, int(frame["n"].max()) if frame["n"].any() else 0)
    guarded = scored.guard.notes([c.id for c in layout.columns]) if scored.records else ()
    return Table(
        title=f"{name_of(paper)}, {layout.where} at the {scale} scale",
        headers=(
            "method",
            "tokens\nasked/mean",
            *(_column_header(column, frame) for column in layout.columns),
            "mean\nretention",
            *(["failed"] if failures else []),
        ),
        blocks=blocks,
        caption=(
            *setting_lines(facts),
            *_ACCURACY_CAPTION,
            *guarded,
            *_sources(frame),
            *_notes(layout),
        ),
        data=frame,
        facts=facts,
        narrow=_narrow(layout, failures),
    )


def _narrow(layout: papers.Table, failures: bool) -> Narrow:
    headers = ["method", "tokens", *(f"{c.label}\n%" for c in layout.columns),
               "mean retention\n% (paper)", *(["failed"] if failures else [])]  # fmt: skip
    return Narrow(
        dict(enumerate(headers)),
        "Here a cell is the share of the untouched model's score that is retained, in %.",
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
    source: Paper | None,
    layout: papers.Table,
    row: papers.Row,
    budget: Budget | None,
    tokens: int,
    scored: Scored,
) -> dict[str, Any]:
    """One row: its cells' numbers, and what they share."""
    ids = [column.id for column in layout.columns]
    beside = [_printed(source, layout, row, column, budget) for column in layout.columns]
    counted = scored.tokens(row.method, tokens)
    # Where pictures have several crops, an old record of the untouched model says what was asked
    # for per crop, and not what was read.
    if budget is None and layout.pocket_model is not None and counted and counted[0] == tokens:
        counted = None
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
    inside = scored.guard.admitted(ids)  # the paper's mean is taken over the same benchmarks
    averaged = [b for name, b in zip(ids, beside, strict=True) if name in inside]
    ratios = [b.retention for b in averaged if b.retention is not None]
    whole = 0 < len(ratios) == len(averaged)
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
    source: Paper | None,
    layout: papers.Table,
    row: papers.Row,
    column: Column,
    budget: Budget | None,
) -> _Beside:
    """A printed number, from `source`; its retention only where that is the table's own paper."""
    if source is None:  # its files cannot be used, which was said
        return _Beside()
    value = source.printed(layout, replace(row, paper=None), column, budget)
    if value is None:
        return _Beside()
    where = row.paper_table or layout.paper_table or ""
    whole = None
    if row.paper is None:
        base = next(r for r in layout.rows if r.method == layout.baseline)
        whole = source.printed(layout, base, column)
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
        return Cell(NOT_MEASURED, f"{NOT_MEASURED}\npaper {paper}", NOT_MEASURED, NONE_PRINTED)
    digits = 1 if d["unit"] == "%" else 0
    score = plus_minus(d["score"], d["score_low"], d["score_high"], digits)
    share = percent(d["retention"])
    printed = bare(d["paper_retention"])
    interval = between(d["score_low"], d["score_high"], digits)
    kept = between(d["retention_low"], d["retention_high"], 1)
    return Cell(
        f"{score}\n{share} ({printed})",
        f"{d['score']:.{digits}f} {interval}\n{percent(d['retention'], 1)} {kept}\npaper {paper}",
        f"{score}\n{share} (paper {printed})",
        share.removesuffix(" %"),
    )


def _mean_cell(d: Mapping[str, Any]) -> Cell:
    printed = bare(d["paper_retention"])
    if d["retention"] is None:
        tight = f"{NONE_PRINTED} ({printed})"
        return Cell(NOT_MEASURED, f"{NOT_MEASURED}\npaper {printed} %", NOT_MEASURED, tight)
    share = plus_minus(d["retention"], d["retention_low"], d["retention_high"], 1)
    interval = between(d["retention_low"], d["retention_high"], 1)
    long = f"{percent(d['retention'], 1)} {interval}\npaper {percent(d['paper_retention'], 1)}"
    brief = f"{share} %\n(paper {printed})"
    return Cell(f"{share}\n({printed})", long, brief, f"{share} ({printed})")


def _paper_text(d: Mapping[str, Any]) -> str:
    """Retention and printed number of the paper; the caption names the source."""
    if d["paper_score"] is None:
        return NONE_PRINTED
    share = "" if d["paper_retention"] is None else f"{d['paper_retention']:.1f} % "
    doubt = "" if d["paper_verified"] else ", not verified"
    return f"{share}({d['paper_score']:g}{doubt})"


def _sources(frame: pd.DataFrame) -> tuple[str, ...]:
    """Where the paper's numbers in the cells were printed."""
    found = frame.loc[frame["paper_score"].notna(), "paper_source"].dropna().unique()
    return (f"The paper's numbers (in brackets): {'; '.join(found)}.",) if len(found) else ()


def _notes(layout: papers.Table) -> tuple[str, ...]:
    rows = [f"{row.label}: {row.note.rstrip('.')}." for row in layout.rows if row.note]
    return tuple(n for n in (layout.note.strip(), " ".join(rows)) if n)


def _column_header(column: Column, frame: pd.DataFrame) -> str:
    n = int(frame.loc[frame["benchmark"] == column.id, "n"].max())
    return f"{column.label}\n" + (f"n={n}" if n else "no records")
