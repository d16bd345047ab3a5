"""Tables from records: in the paper's own layout, each number beside the paper's.

Nothing here runs a model. How a table is shown is in `display`, cost tables are in `cost_tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from frugalvlm import papers
from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.formats import NONE_PRINTED, NOT_MEASURED, bare, between, percent, plus_minus
from frugalvlm.methods import CONTROLS
from frugalvlm.papers import Budget, Column, Paper, load_paper
from frugalvlm.report.cost_tables import blueprint_table, efficiency_table, energy_table
from frugalvlm.report.display import (
    Block,
    Cell,
    Narrow,
    Table,
    budget_at,
    budget_heading,
    column_name,
    facts_of,
    name_of,
    setting_lines,
    stands_for,
    total_at,
)
from frugalvlm.runs.records import Record, latest, select
from frugalvlm.verdicts.categories import PARTS, scored_parts
from frugalvlm.verdicts.gains import BLANK, visual_gain
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
    gain: float | None = None
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
    layout, records = paper.table(table_id), list(records)
    scored = Scored(records, layout.baseline, benchmarks, guard)
    scale = scored.setting.get("scale", scale)
    total = scored.total or total_at(layout.model, scale)
    others = {row.paper for row in layout.rows if row.paper is not None}
    sources: dict[str | None, Paper | None] = {
        None: paper,
        **{key: paper.other(key) for key in others},
    }
    shares = flops_shares(records, scored.setting)
    lines = []
    for row, budget, tokens, heading in _placed(layout, scale, total):
        line = _accuracy_line(sources, layout, row, budget, tokens, scored, shares)
        lines.append({**line, "heading": heading})
    failures = any(line["failed"] > 0 for line in lines)
    gained = _gained(layout)
    blocks = tuple(_blocks(lines, failures))
    frame = pd.DataFrame([cell for line in lines for cell in line["data"]])
    facts = facts_of(scored.records, scale, int(frame["n"].max()) if frame["n"].any() else 0)
    guarded = scored.guard.notes([c.id for c in layout.columns]) if scored.records else ()
    return Table(
        title=f"{name_of(paper)}, {layout.where} at the {scale} scale",
        headers=(
            "method",
            "kept",
            "mean",
            "FLOPs\n%",
            *(_column_header(column, frame) for column in layout.columns),
            "mean re-\ntention",
            *(["visual\ngain"] if gained else []),
            *(["failed"] if failures else []),
        ),
        blocks=blocks,
        caption=(
            *setting_lines(facts),
            *stands_for(layout.columns),
            _ACCURACY_CAPTION,
            *([_GAIN_CAPTION] if gained else []),
            *_controls_note(lines),
            *guarded,
            *_sources(frame),
            *_notes(layout),
        ),
        data=frame,
        facts=facts,
        narrow=_narrow(layout, failures),
        more=_by_part(paper, layout, scored, scale, benchmarks, guard),
    )


def _placed(
    layout: papers.Table, scale: str, total: int
) -> Iterator[tuple[papers.Row, papers.Budget | None, int, str]]:
    """Rows of a layout that this scale has a budget for: row, budget, tokens, and their heading."""
    for row, budget in layout.lines():
        tokens = total if budget is None else budget_at(budget, scale, layout.model, total)
        if tokens is not None:
            heading = budget_heading(tokens, total, budget, layout.model)
            yield row, budget, 0 if row.once == "none" else tokens, heading


def _by_part(
    paper: Paper, layout: papers.Table, scored: Scored, scale: str,
    benchmarks: Mapping[str, SheetMaker] | None, guard: Guard | None,
) -> tuple[Table, ...]:  # fmt: skip
    """The same rows by what is asked, where the questions say so."""
    columns = {column.id for column in layout.columns}
    asked = [r for r in scored.records if r["request"]["benchmark"] in columns]
    parts = scored_parts(asked, layout.baseline, benchmarks, guard)
    if not parts:
        return ()
    total = scored.total or total_at(layout.model, scale)
    lines: list[dict[str, Any]] = []
    for row, _, tokens, heading in _placed(layout, scale, total):
        data = [
            {
                "method": row.method,
                "label": row.label,
                "control": _is_control(row),
                "budget": tokens,
                "part": part,
                **_numbers(
                    None,
                    own.retention(row.method, tokens, names),
                    visual_gain(own, row.method, tokens, names),
                    _Beside(),
                    0,
                ),
            }
            for part, (own, names) in parts.items()
        ]
        lines.append({**data[0], "heading": heading, "data": data})
    facts = facts_of(scored.records, scale, None)
    counted = {p: max((d["n"] for x in lines for d in x["data"] if d["part"] == p), default=0)
               for p in parts}  # fmt: skip
    return (
        Table(
            title=f"{name_of(paper)}, {layout.where}: by what is asked",
            headers=("method", *(f"{PARTS[p]}\n{what}\nn={counted[p]}" for p in parts
                                 for what in ("retention", "visual gain"))),
            blocks=tuple(_blocks(lines, False, _part_cells)),
            caption=(
                *setting_lines(facts),
                "The same answers, split by what the question is about: what stands out in the "
                "picture, as the papers' benchmarks mostly ask, or something small or farther "
                "off. Means over the benchmarks that have such questions, "
                f"with the {INTERVAL}.",
            ),
            data=pd.DataFrame([d for line in lines for d in line["data"]]),
            facts=facts,
        ),
    )  # fmt: skip


def _part_cells(line: Mapping[str, Any], failures: bool) -> tuple[Cell, ...]:
    cells = [Cell(line["label"])]
    for d in line["data"]:
        for name in ("retention", "gain"):
            if d[name] is None:
                cells.append(Cell(NOT_MEASURED))
                continue
            ends = d[f"{name}_low"], d[f"{name}_high"]
            brief = plus_minus(d[name], *ends, 1)
            cells.append(Cell(brief, f"{percent(d[name], 1)} {between(*ends, 1)}", f"{brief} %"))
    return tuple(cells)


def _blocks(
    lines: Sequence[Mapping[str, Any]], failures: bool,
    cells: Callable[[Mapping[str, Any], bool], tuple[Cell, ...]] | None = None,
) -> Iterator[Block]:  # fmt: skip
    """One block a heading; controls stand at its end, below a thin rule."""
    made = _cells if cells is None else cells
    for heading in dict.fromkeys(line["heading"] for line in lines):
        own = [line for line in lines if line["heading"] == heading]
        methods = [line for line in own if not line["control"]]
        controls = [line for line in own if line["control"]]
        if methods:
            yield Block(heading, tuple(made(line, failures) for line in methods))
        if controls:
            rows = tuple(made(line, failures) for line in controls)
            yield Block("controls", rows, minor=True)


def _gained(layout: papers.Table) -> bool:
    """Whether a table has the run with blank pictures, to which gains refer."""
    return any(row.method == BLANK for row in layout.rows)


def _is_control(row: papers.Row) -> bool:
    return row.control or row.method in CONTROLS


def _controls_note(lines: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    if not any(line["control"] for line in lines):
        return ()
    return (
        "Controls bound what a choice of tokens is worth, and are ranked with no method: what is "
        "read without a picture or behind a layer, a grid, a small picture, random tokens before "
        "the decoder or at a method's own cut.",
    )


def flops_shares(
    records: Iterable[Record], setting: Mapping[str, Any]
) -> dict[tuple[str, int], float]:
    """Prefill FLOPs in percent of the untouched model's, by method and budget, where counted.

    Args:
        records: of any kind; efficiency records of the setting's model count, the newest first.
        setting: of the accuracy records beside which the shares stand.
    """
    found: dict[tuple[str, int], float] = {}
    for record in reversed(latest(select(records, "efficiency"))):
        same = ("scale", "model")
        if setting and any(record["request"].get(k) != setting.get(k) for k in same):
            continue
        rows = record["rows"]
        for row in rows:
            share = 100 * row["flops"] / rows[0]["flops"]
            found.setdefault((row["method"], row["budget"]), share)
    return found


def _narrow(layout: papers.Table, failures: bool) -> Narrow:
    columns = len(layout.columns)
    shown = {0: "method", 3: "FLOPs\n%"}
    shown |= {4 + i: f"{_squeezed(c)}\n%" for i, c in enumerate(layout.columns)}
    shown |= {4 + columns: "mean\n(paper)"} | ({5 + columns: "gain\n%"} if _gained(layout) else {})
    shown |= {max(shown) + 1: "failed"} if failures else {}
    return Narrow(
        shown,
        "Here a cell is the share of the untouched model's score that is retained, in %.",
    )


def _squeezed(column: Column) -> str:
    """A column's name, the prefix on a line of its own without its hyphen."""
    return column_name(column).replace("-\n", "\n", 1)


_ACCURACY_CAPTION = (
    f"Score with its {INTERVAL} (± is half its width); below it the share of the untouched model's "
    "score that is retained (%, same questions, paired), and beside that what the paper's own "
    f"numbers give ({NONE_PRINTED}: none printed). Kept: visual tokens behind the last cut; mean: "
    "over decoder layers; both measured. FLOPs: of the prefill, % of the untouched model's. A "
    "failed answer counts as wrong."
)
_GAIN_CAPTION = (
    "Visual gain: (score - blank) / (untouched - blank) in %, where blank is the same model with "
    "grey pictures; in brackets what the paper's numbers give, whose blank is a prompt without "
    "visual tokens."
)


def _accuracy_line(
    sources: Mapping[str | None, Paper | None],
    layout: papers.Table,
    row: papers.Row,
    budget: Budget | None,
    tokens: int,
    scored: Scored,
    shares: Mapping[tuple[str, int], float],
) -> dict[str, Any]:
    """One row: its cells' numbers, and what they share."""
    ids = [column.id for column in layout.columns]
    beside = [_printed(sources, layout, row, column, budget) for column in layout.columns]
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
        "control": _is_control(row),
        "once": row.once is not None,
        "gained": _gained(layout),
        "budget": tokens,
        "paper_tokens": _paper_tokens(layout, row, budget),
        "tokens_kept": counted and _kept(scored, row.method, tokens, ids),
        "flops_share": shares.get((row.method, tokens)),
        "tokens_mean": counted and counted[0],
        "tokens_min": counted and counted[1],
        "tokens_max": counted and counted[2],
    }
    data = [
        shared | {"benchmark": column.id, "unit": column.unit} | _numbers(
            scored.score(row.method, tokens, column.id),
            scored.retention(row.method, tokens, [column.id]),
            visual_gain(scored, row.method, tokens, [column.id]),
            printed,
            scored.failed(row.method, tokens, column.id),
        )
        for column, printed in zip(layout.columns, beside, strict=True)
    ]  # fmt: skip
    inside = scored.guard.admitted(ids)  # the paper's mean is taken over the same benchmarks
    averaged = [b for name, b in zip(ids, beside, strict=True) if name in inside]
    where = sorted({b.source for b in beside if b.source})
    mean = _Beside(
        None, _mean([b.retention for b in averaged]), _mean([b.gain for b in averaged]),
        "; ".join(where),
    )  # fmt: skip
    failed = sum(scored.failed(row.method, tokens, name) for name in ids)
    kept = scored.retention(row.method, tokens, ids)
    overall = _numbers(None, kept, visual_gain(scored, row.method, tokens, ids), mean, failed)
    data.append(shared | {"benchmark": "mean", "unit": "%"} | overall)
    return {**shared, "failed": failed, "data": data}


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing: a mean over some would be another quantity."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if 0 < len(known) == len(values) else None


def _paper_tokens(layout: papers.Table, row: papers.Row, budget: Budget | None) -> int:
    if budget is not None:
        return budget.paper_tokens
    return 0 if row.once == "none" else layout.model.tokens


def _kept(scored: Scored, method: str, tokens: int, ids: Sequence[str]) -> float | None:
    """Visual tokens behind the last cut, the mean over benchmarks."""
    records = [scored.record(method, tokens, name) for name in ids]
    last = [r["tokens"]["per_layer"][-1] for r in records if r is not None]
    return sum(last) / len(last) if last else None


def _numbers(
    score: Estimate | None, retention: Estimate | None, gain: Estimate | None, beside: _Beside,
    failed: int,
) -> dict[str, Any]:  # fmt: skip
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
        "gain": gain and gain.value,
        "gain_low": gain and gain.low,
        "gain_high": gain and gain.high,
        "paper_score": beside.value,
        "paper_retention": beside.retention,
        "paper_gain": beside.gain,
        "paper_source": beside.source,
        "paper_verified": beside.verified,
        "reason": retention.reason if retention else "",
    }


def _printed(
    sources: Mapping[str | None, Paper | None],
    layout: papers.Table,
    row: papers.Row,
    column: Column,
    budget: Budget | None,
) -> _Beside:
    """A printed number; its retention and gain only where it is the table's own paper's."""
    source = sources[row.paper]
    if source is None:  # its files cannot be used, which was said
        return _Beside()
    value = source.printed(layout, replace(row, paper=None), column, budget)
    if value is None:
        return _Beside()
    where = row.paper_table or layout.paper_table or ""
    whole = floor = None
    if row.paper is None:
        base = next(r for r in layout.rows if r.method == layout.baseline)
        whole = source.printed(layout, base, column)
        floor = _floor(sources, layout, column)
    verified = where not in {u.table for u in source.unverified}
    share = 100 * value / whole if whole else None
    rises = whole is not None and floor is not None and whole > floor
    gain = 100 * (value - floor) / (whole - floor) if rises else None  # type: ignore[operator]
    return _Beside(value, share, gain, f"arXiv:{source.arxiv} {where}", verified)


def _floor(
    sources: Mapping[str | None, Paper | None], layout: papers.Table, column: Column
) -> float | None:
    """The number printed for a prompt without visual tokens."""
    row = next((r for r in layout.rows if r.once == "none" and r.paper_method), None)
    source = None if row is None else sources[row.paper]
    if row is None or source is None:
        return None
    return source.printed(layout, replace(row, paper=None), column)


def _cells(line: Mapping[str, Any], failures: bool) -> tuple[Cell, ...]:
    mean, kept, share = (line[k] for k in ("tokens_mean", "tokens_kept", "flops_share"))
    spread = ""
    if mean is not None and line["tokens_min"] != line["tokens_max"]:
        spread = f"\n{line['tokens_min']:g} to {line['tokens_max']:g} over layers and images"
    tokens = (
        Cell(_count(kept), f"{_count(kept)}\n({line['budget']} asked)"),
        Cell(_count(mean), f"{_count(mean)}{spread}"),
        Cell(NONE_PRINTED if share is None else f"{share:.0f}",
             NONE_PRINTED if share is None else f"{share:.1f} %"),
    )  # fmt: skip
    *own, overall = line["data"]
    cells = [Cell(line["label"]), *tokens, *(_score_cell(d) for d in own)]
    cells.append(_mean_cell(overall))
    if line["gained"]:
        cells.append(_mean_cell(overall, "gain"))
    if failures:
        asked_all = sum(d["n"] for d in own)
        cells.append(Cell(f"{line['failed']}/{asked_all}" if asked_all else NONE_PRINTED))
    return tuple(cells)


def _count(tokens: float | None) -> str:
    return NONE_PRINTED if tokens is None else f"{tokens:.3g}" if tokens < 100 else f"{tokens:.0f}"


def _score_cell(d: Mapping[str, Any]) -> Cell:
    paper = _paper_text(d)
    if d["score"] is None:
        return Cell(NOT_MEASURED, f"{NOT_MEASURED}\npaper {paper}", NOT_MEASURED, NONE_PRINTED)
    digits = 1 if d["unit"] == "%" else 0
    score = plus_minus(d["score"], d["score_low"], d["score_high"], digits)
    share = percent(d["retention"])
    printed = bare(d["paper_retention"])
    gain = "" if d["gain"] is None else f"\ngain {percent(d['gain'], 1)}"
    interval = between(d["score_low"], d["score_high"], digits)
    kept = f"{between(d['retention_low'], d['retention_high'], 1)}{gain}"
    bare_share = share.removesuffix(" %")
    return Cell(
        f"{score}\n{bare_share} ({printed})",
        f"{d['score']:.{digits}f} {interval}\n{percent(d['retention'], 1)} {kept}\npaper {paper}",
        f"{score}\n{share} (paper {printed})",
        bare_share,
    )


def _mean_cell(d: Mapping[str, Any], name: str = "retention") -> Cell:
    """A mean over benchmarks, of retention or gain, and what the paper's numbers give."""
    value, beside = d[name], d[f"paper_{name}"]
    printed = bare(beside)
    if value is None:
        tight = f"{NONE_PRINTED} ({printed})" if name == "retention" else NONE_PRINTED
        return Cell(NOT_MEASURED, f"{NOT_MEASURED}\npaper {printed} %", NOT_MEASURED, tight)
    ends = d[f"{name}_low"], d[f"{name}_high"]
    share = plus_minus(value, *ends, 1)
    long = f"{percent(value, 1)} {between(*ends, 1)}\npaper {percent(beside, 1)}"
    tight = f"{share} ({printed})" if name == "retention" else percent(value).removesuffix(" %")
    return Cell(f"{share}\n({printed})", long, f"{share} %\n(paper {printed})", tight)


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
    return f"{column_name(column)}\n" + (f"n={n}" if n else "no records")
