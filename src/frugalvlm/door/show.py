"""A comparison's numbers and tables. Statistics are `verdicts.scored`'s, nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.door.request import Line, RequestError
from frugalvlm.door.rows import Compared
from frugalvlm.formats import NONE_PRINTED, NOT_MEASURED, between, percent, plus_minus
from frugalvlm.report.cost_tables import efficiency_table, energy_table
from frugalvlm.report.display import Block, Cell, Table, facts_of, setting_lines
from frugalvlm.runs.records import select
from frugalvlm.verdicts.gains import BLANK, visual_gain
from frugalvlm.verdicts.scored import Scored

IMPOSSIBLE = "not possible"
COSTS = (
    "flops", "flops_share", "prefill_ms", "prefill_ms_p95", "speedup", "speedup_low",
    "speedup_high", "decode_ms", "peak_mib", "kv_bytes", "kv_share", "joules", "energy",
    "carbon_g_per_1000",
)  # fmt: skip


def numbers(scored: Scored, line: Line, ids: Sequence[str]) -> dict[str, Any]:
    """Score and retention of a row on one benchmark, or its mean retention over several."""
    key, budget = line.key, line.budget
    score = scored.score(key, budget, ids[0]) if len(ids) == 1 else None
    retention = scored.retention(key, budget, ids)
    gain = visual_gain(scored, key, budget, ids)
    known: Estimate | None = score or retention
    return {
        "score": score and score.value,
        "score_low": score and score.low,
        "score_high": score and score.high,
        "retention": retention and retention.value,
        "retention_low": retention and retention.low,
        "retention_high": retention and retention.high,
        "gain": gain and gain.value,
        "gain_low": gain and gain.low,
        "gain_high": gain and gain.high,
        "n": known.n_questions if known else 0,
        "images": known.n_images if known else 0,
        "failed": sum(scored.failed(key, budget, name) for name in ids),
        "reason": line.reason or (retention.reason if retention else ""),
    }


def cost_numbers(cost: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> dict[str, Any]:
    """The costs of a row, one prompt or one question each; None where they were not measured."""
    if cost is None or base is None:
        return dict.fromkeys(COSTS)
    speed, energy = cost["prefill_speedup"], cost["energy"]
    joules = energy["joules_per_question"]
    return {
        "flops": cost["flops"],
        "flops_share": 100 * cost["flops"] / base["flops"],
        "prefill_ms": cost["prefill_ms"]["p50"],
        "prefill_ms_p95": cost["prefill_ms"]["p95"],
        "speedup": speed["median"],
        "speedup_low": speed["low"],
        "speedup_high": speed["high"],
        "decode_ms": cost["decode_ms"]["p50"],
        "peak_mib": cost["peak_mib"],
        "kv_bytes": cost["kv_bytes"],
        "kv_share": 100 * cost["kv_visual_bytes"] / base["kv_visual_bytes"],
        "joules": joules,
        "energy": None if joules is None else "modelled" if energy["modelled"] else "measured",
        "carbon_g_per_1000": energy.get("carbon_g_per_1000"),
    }


def wide_table(result: Compared) -> Table:
    """A row per method and budget, a column per benchmark, the mean, and the two main costs."""
    frame, names = result.frame, list(result.data)
    several, costed = len(names) > 1, bool(frame["flops"].notna().any())
    gained = bool(frame["gain"].notna().any())
    total = result.answered[0].line.budget
    blocks: dict[int, list[tuple[Cell, ...]]] = {}
    for answered in result.answered:
        line = answered.line
        own = frame[(frame["label"] == line.label) & (frame["budget"] == line.budget)]
        cells = [_cell(own[own["benchmark"] == name].iloc[0], name) for name in names]
        last = own[own["benchmark"] == ("mean" if several else names[0])].iloc[0]
        if several:
            cells.append(_cell(last, "mean"))
        if gained:
            cells.append(_gain(last))
        if costed:
            cells += _cost_cells(own.iloc[0])
        blocks.setdefault(line.budget, []).append((Cell(line.label), _tokens(own.iloc[0]), *cells))
    accuracy = select(result.records, "accuracy")
    facts = facts_of(accuracy[-1:], "pocket", result.n)
    counted = [f"{name}\nn={int(frame.loc[frame['benchmark'] == name, 'n'].max())}"
               for name in names]  # fmt: skip
    return Table(
        title=f"{facts['model']}: methods compared on {', '.join(names)}",
        headers=(
            "method", "tokens\nasked/mean", *counted, *(["mean\nretention"] if several else []),
            *(["visual\ngain"] if gained else []),
            *(["prefill\nFLOPs", "prefill\nspeed-up"] if costed else []),
        ),
        blocks=tuple(Block(_heading(b, total), tuple(rows)) for b, rows in blocks.items()),
        caption=(*setting_lines(facts), *_caption(result, costed), *reasons(result)),
        data=frame,
        facts=facts,
    )  # fmt: skip


def _heading(budget: int, total: int) -> str:
    if budget == total:
        return f"untouched: all {total} visual tokens"
    return f"{budget} of {total} visual tokens ({100 * budget / total:.1f} %)"


def _cell(row: Any, name: str) -> Cell:
    if row["n"] == 0:
        return Cell(IMPOSSIBLE if row["reason"] else NOT_MEASURED)  # the caption says why
    kept = between(row["retention_low"], row["retention_high"], 1)
    whole = percent(row["retention"], 1)
    if name == "mean":
        mean = plus_minus(row["retention"], row["retention_low"], row["retention_high"], 1)
        return Cell(f"{mean} %", f"{whole} {kept}")
    score = plus_minus(row["score"], row["score_low"], row["score_high"], 1)
    exact = f"{row['score']:.1f} {between(row['score_low'], row['score_high'], 1)}"
    failed = f"\n{row['failed']} failed" if row["failed"] else ""
    return Cell(f"{score}\n{percent(row['retention'])}{failed}", f"{exact}\n{whole} {kept}{failed}")


def _gain(row: Any) -> Cell:
    if row["gain"] is None or pd.isna(row["gain"]):
        return Cell(NONE_PRINTED)
    ends = row["gain_low"], row["gain_high"]
    return Cell(f"{plus_minus(row['gain'], *ends, 1)} %", f"{percent(row['gain'], 1)} "
                f"{between(*ends, 1)}")  # fmt: skip


def _tokens(row: Any) -> Cell:
    mean = row["tokens_mean"]
    return Cell(f"{row['budget']}/" + (NONE_PRINTED if pd.isna(mean) else f"{mean:.4g}"))


def _cost_cells(row: Any) -> list[Cell]:
    if pd.isna(row["flops"]):
        return [Cell(NONE_PRINTED), Cell(NONE_PRINTED)]
    interval = between(row["speedup_low"], row["speedup_high"], 2)
    return [
        Cell(f"{row['flops_share']:.1f} %"),
        Cell(f"{row['speedup']:.2f}x\n{interval}"),
    ]


def _caption(result: Compared, costed: bool) -> list[str]:
    lines = [
        "Score with its 95 % bootstrap interval over pictures; below it the share of the untouched "
        "model's score that is retained (same questions, paired). Tokens: asked for per crop, and "
        "the mean over decoder layers. A failed answer counts as wrong.",
        *result.guard.notes([q.benchmark.id for q in result.data.values()]),
    ]
    if result.frame["gain"].notna().any():
        lines.append(
            "Visual gain: (score - blank) / (untouched - blank), where blank is the untouched "
            "model with grey pictures."
        )
    else:
        lines.append(f"Visual gain: add '{BLANK}' to the methods, the run with grey pictures.")
    if costed:
        lines.append(cost_note(result))
    return [*lines, *result.notes]


def cost_note(result: Compared) -> str:
    """How times and energy were taken, which shrinks with the number of questions."""
    request = select(result.records, "efficiency")[-1]["request"]
    return (
        f"Costs: FLOPs are counted for one prompt; times are those of batches of "
        f"{request['batch_size']}, methods taking turns in {request['repeats']} rounds. "
        + _shrinks(request)
    )


def _shrinks(request: Mapping[str, Any]) -> str:
    return (
        f"With few questions costs are measured briefly, too: {request['repeats']} rounds and "
        f"{request['energy_window_s']:g} s per method here; repeats=9 and energy_window_s=1.0 are "
        "the full measurement."
    )


def reasons(result: Compared) -> list[str]:
    """Why rows could not run; those that share a reason share a sentence."""
    groups: dict[tuple[int, str], list[str]] = {}
    for line in result.skipped:
        groups.setdefault((line.budget, line.reason), []).append(line.label)
    return [
        f"Not possible: {', '.join(labels)} at {budget} tokens. {reason}"
        for (budget, reason), labels in groups.items()
    ]


def cost_table(result: Compared) -> Table:
    """The kit's cost table and the energy beside it, by the labels of the comparison."""
    measured = select(result.records, "efficiency")
    if not measured:
        raise RequestError("Costs were not measured: compare with costs=True.")
    costs = efficiency_table(measured, result.paper)
    energy = energy_table(measured, result.paper)
    labels = [a.line.label for a in result.answered if a.cost is not None]
    if result.paper is not None:
        labels = list(costs.data["label"])
    budgets = list(costs.data["budget"])
    # Blocks are in the order of budgets, rows within them in the order of the runs.
    named = list(zip(labels, budgets, strict=True))
    order = iter([label for b in dict.fromkeys(budgets) for label, own in named if own == b])
    blocks = tuple(
        Block(
            block.heading,
            tuple((Cell(next(order)), *row[1:], more[2], more[4])
                  for row, more in zip(block.rows, beside.rows, strict=True)),
        )
        for block, beside in zip(costs.blocks, energy.blocks, strict=True)
    )  # fmt: skip
    names = ("joules_per_question", "carbon_g_per_1000", "modelled", "reliable")
    return Table(
        title=costs.title.replace("prefill and decoding", "prefill, decoding and energy"),
        headers=(*costs.headers, *(energy.headers[i] for i in (2, 4))),
        blocks=blocks,
        caption=(*costs.caption, *energy.caption[1:], _shrinks(measured[-1]["request"])),
        data=pd.concat([costs.data.assign(label=labels), energy.data[list(names)]], axis=1),
        facts=costs.facts,
    )


__all__ = [
    "COSTS", "IMPOSSIBLE", "cost_note", "cost_numbers", "cost_table",
    "numbers", "reasons", "wide_table",
]  # fmt: skip
