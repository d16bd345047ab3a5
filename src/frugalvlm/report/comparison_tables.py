"""Tables of the comparison: gaps, retention, ranking, costs, energy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from frugalvlm import measure
from frugalvlm.formats import NONE_PRINTED, NOT_MEASURED, between, plus_minus
from frugalvlm.methods import CONTROLS
from frugalvlm.report.comparison import Comparison
from frugalvlm.report.comparison_runs import method_of
from frugalvlm.report.cost_tables import REALISED, rankable, realised
from frugalvlm.report.display import Block, Cell, Table, name_of
from frugalvlm.verdicts.ranking import RESAMPLES, rank

__all__ = [
    "accuracy_table", "cost_table", "energy_table", "missing_table", "ranking_table",
    "realised_table",
]  # fmt: skip


def accuracy_table(comparison: Comparison) -> Table:
    """Retention of all runs over the suite and per benchmark, by tokens asked for."""
    columns = ["mean", *comparison.benchmarks]
    frame = comparison.frame()
    blocks = []
    for budget, own in frame.groupby("budget", sort=False):
        own = own.sort_values("mean", ascending=False)
        control = own["method"].isin(CONTROLS)
        heading = f"{budget} of {comparison.total} visual tokens asked for"
        for part, minor in ((own[~control], False), (own[control], True)):
            rows = tuple(
                (Cell(line["label"]), _tokens(line), _flops(line),
                 *(_retained(line, c) for c in columns), Cell(_names(line["papers"])))
                for line in part.to_dict("records")
            )  # fmt: skip
            if rows or not minor:
                blocks.append(Block("controls" if minor else heading, rows, minor))
    return Table(
        title="Score retained, % of the untouched model's",
        headers=(
            "method",
            "tokens\nasked/mean",
            "FLOPs\n%",
            "mean",
            *(name.replace("-", "-\n", 1) for name in comparison.benchmarks),
            "recorded for",
        ),
        blocks=tuple(blocks),
        caption=(
            *comparison.caption(),
            "Retention with half the width of its 95 % bootstrap interval over pictures "
            "(paired: the same questions with and without the method). Tokens: asked for, and "
            "the measured mean over decoder layers; FLOPs of the prefill. Within a block sorted by "
            "the mean, methods and controls apart; what "
            "is no more than a few points apart may be no difference, see the ranking.",
        ),
        data=frame,
        facts=comparison.setting,
    )


def ranking_table(comparison: Comparison) -> Table:
    """Per paper and budget: the order, and which part of it may be chance."""
    blocks, data = [], []
    for (paper, budget), runs in comparison.blocks().items():
        ranked = rank(
            {i: draws for i, run in enumerate(runs)
             if (draws := run.draws(comparison.benchmarks)) is not None}
        )  # fmt: skip
        rows = []
        for i, run in enumerate(runs):
            found = run.retention(comparison.benchmarks)
            assert found is not None
            gap, p = ranked.against(0, i)
            line = {
                "paper": paper, "budget": budget, "rank": i + 1, "method": run.key,
                "label": run.label, "tokens": run.tokens, "mean": found.value,
                "low": found.low, "high": found.high, "n": found.n_questions,
                "behind": comparison.mean(runs[0]) - found.value, "behind_low": gap[0],
                "behind_high": gap[1], "p_holm": p, "letters": ranked.letters[i],
                "flops_share": run.cost and run.cost["flops_share"],
            }  # fmt: skip
            data.append(line)
            rows.append(_ranked_row(line))
        tell = sum(not s for s in ranked.significant.values())
        blocks.append(
            Block(
                f"{name_of(paper)}, {budget} tokens asked for: {len(runs)} methods, {tell} of "
                f"{len(ranked.significant)} pairs cannot be told apart", tuple(rows),
            )
        )  # fmt: skip
    return Table(
        title="Ranking by mean retention, with what is not told apart",
        headers=("", "method", "tokens\nasked/mean", "FLOPs\n%", "mean\nretention",
                 "behind the best\n[95 % interval]", "p (Holm)", "same letter:\nnot told apart"),
        blocks=tuple(blocks),
        caption=(
            *comparison.caption(),
            "Behind the best: paired difference of mean retention in points, its interval not "
            f"corrected. p: two-sided, by {RESAMPLES:,} bootstrap draws over pictures, all "
            "pairs of a block corrected by Holm's method (family-wise level 5 %). Two methods "
            "that share a letter are not told apart; their order may be chance. Methods of a "
            "block were asked for the same budget but keep different means and cost different "
            "FLOPs: read the ranking together with these columns.",
        ),
        data=pd.DataFrame(data),
        facts=comparison.setting,
    )  # fmt: skip


def cost_table(comparison: Comparison) -> Table:
    """What the runs cost: counted FLOPs and cache, measured times and memory."""
    frame = comparison.frame()
    frame = frame[frame["flops"].notna()]
    blocks = []
    for budget, own in frame.groupby("budget", sort=False):
        rows = tuple(_cost_row(line) for line in own.sort_values("flops").to_dict("records"))
        blocks.append(Block(f"{budget} of {comparison.total} visual tokens asked for", rows))
    base = comparison.untouched
    times = [r["rows"][0]["prefill_ms"]["p50"] for _, r in comparison.timed]
    drift = "No efficiency record yet."
    if base:
        drift = f"Untouched model: {base['flops'] / 1e9:.2f} GFLOPs, prefill {min(times):.0f} ms"
        if len(times) > 1:
            drift += f" to {max(times):.0f} ms in {len(times)} efficiency records"
        drift += " per batch. Across papers compare speed-ups, not milliseconds."
    return Table(
        title="Cost of a prefill: counted and measured",
        headers=("method", "tokens\nasked/mean", "GFLOPs\n% of untouched", "visual KV\n%",
                 "prefill ms\n(measured)", "speed-up [95 %]\n(measured)", "of FLOPs\nratio",
                 "decode ms/token\n(measured)", "peak MiB\n(measured)", "timed for"),
        blocks=tuple(blocks),
        caption=(
            *comparison.caption()[:1],
            f"{_clock_text(comparison.clock)} FLOPs and cache are counted on what really ran, for "
            "one prompt: tower, projector, decoder, the method's own work, and for guided "
            "methods the whole answer of the small model. Times: wall clock, methods of one "
            "paper taking turns; speed-up against the untouched model in the same rounds.",
            drift,
            REALISED,
        ),
        data=frame,
        facts=comparison.setting,
    )  # fmt: skip


def energy_table(comparison: Comparison, grid: float = measure.GRID_FACTOR_G_PER_KWH) -> Table:
    """Energy per question and grams of CO2e per 1000, in the order of tokens, never ranked."""
    frame = comparison.frame()
    frame = frame[frame["flops"].notna()].assign(
        grams=lambda d: 1000 * d["joules"].map(lambda j: _grams(j, grid))
    )
    base = comparison.untouched
    blocks = []
    for budget, own in frame.groupby("budget", sort=False):
        rows = tuple(_energy_row(line, base) for line in own.to_dict("records"))
        blocks.append(Block(f"{budget} of {comparison.total} visual tokens asked for", rows))
    if base:
        energy = base["energy"]
        line = {"label": "untouched", "budget": comparison.total,
                "tokens": float(comparison.total or 0), "joules": energy["joules_per_question"],
                "modelled": energy["modelled"],
                "reliable": energy["reliable"], "energy_method": method_of(energy),
                "joules_sd": energy.get("sd"), "prefill_ms": base["prefill_ms"]["p50"],
                "batch_size": base["batch_size"],
                "grams": 1000 * _grams(energy["joules_per_question"], grid)}  # fmt: skip
        blocks.insert(0, Block("untouched model", (_energy_row(line, base),)))
    return Table(
        title="Energy of a prefill, and carbon of a thousand",
        headers=("method", "tokens\nasked/mean", "J per\nquestion", "of untouched",
                 "g CO2e per\n1000 questions", "how"),
        blocks=tuple(blocks),
        caption=(
            *comparison.caption()[:1],
            f"{_clock_text(comparison.clock)} Grams: joules / 3.6 million x {grid:g} g CO2e per "
            "kWh, an assumption and not your grid"
            + (f" ({measure.GRID_FACTOR_SOURCE})." if grid == measure.GRID_FACTOR_G_PER_KWH
               else ", chosen in this notebook's parameters."),
            "Measured: read from hardware counters over windows of 10 s or more. Modelled: "
            "computed from a model of the machine's power; such figures are neither ranked "
            "nor compared.",
        ),
        data=frame,
        facts=comparison.setting,
    )  # fmt: skip


def missing_table(comparison: Comparison) -> Table:
    """Papers with gaps here, and the command that fills each."""
    gaps = comparison.missing()
    rows = tuple(
        (Cell(g["paper"]), Cell(f"{g['missing']} of {g['cells']}"), Cell(g["cost"]),
         Cell(g["command"]))
        for g in gaps.to_dict("records")
    )  # fmt: skip
    return Table(
        title="What is not recorded" if rows else "Every cell of every paper is recorded",
        headers=("paper", "cells missing", "cost", "made by"),
        blocks=(Block("", rows),),
        caption=(
            *(comparison.left_out_lines() or ["No records were left out."]),
            *comparison.other_code_lines(),
        ),
        data=gaps,
    )


def _clock_text(clock: Mapping[str, Any]) -> str:
    if not clock:
        return "No efficiency record yet."
    return (f"Times: batches of {clock['batch_size']}, {clock['threads']} "
            f"thread{'' if clock['threads'] == 1 else 's'}, "
            f"{clock['repeats']} rounds (medians).")  # fmt: skip


def _grams(joules: float | None, grid: float) -> float:
    return float("nan") if joules is None or pd.isna(joules) else measure.carbon_g(joules, grid)


def _tokens(line: Mapping[Any, Any]) -> Cell:
    return Cell(f"{line['budget']}/{line['tokens']:.4g}")


def _flops(line: Mapping[Any, Any]) -> Cell:
    share = line["flops_share"]
    return Cell(NONE_PRINTED if share is None or pd.isna(share) else f"{share:.0f}")


def _retained(line: Mapping[Any, Any], name: str) -> Cell:
    value = line[name]
    if value is None or pd.isna(value):
        return Cell(NOT_MEASURED if name != "mean" else "not on the\nwhole suite")
    return Cell(plus_minus(value, line[f"{name}_low"], line[f"{name}_high"], 1))


def _ranked_row(line: Mapping[str, Any]) -> tuple[Cell, ...]:
    share = NONE_PRINTED if line["flops_share"] is None else f"{line['flops_share']:.0f}"
    best = line["rank"] == 1
    behind = f"{line['behind']:.1f} {between(line['behind_low'], line['behind_high'], 1)}"
    p = "< 0.001" if line["p_holm"] < 0.001 else f"{line['p_holm']:.3f}"
    return (
        Cell(str(line["rank"])), Cell(line["label"]), _tokens(line), Cell(share),
        Cell(plus_minus(line["mean"], line["low"], line["high"], 1)),
        Cell("best" if best else behind), Cell("" if best else p), Cell(line["letters"]),
    )  # fmt: skip


def realised_table(comparison: Comparison, most: int = 10) -> Table:
    """The runs for which FLOPs promise most beyond what the clock gives, by the ratio of both."""
    frame = comparison.frame()
    frame = frame[frame["flops"].notna() & frame["speedup"].notna()]
    frame = frame.assign(flops_ratio=100 / frame["flops_share"].astype(float))
    frame = frame.assign(realised=100 * frame["speedup"].astype(float) / frame["flops_ratio"])
    frame = frame.sort_values("realised")
    rows = tuple(
        (Cell(line["label"]), _tokens(line), Cell(f"{line['flops_ratio']:.2f}x"),
         Cell(f"{line['speedup']:.2f}x {between(line['speedup_low'], line['speedup_high'], 2)}"),
         _realised(line))
        for line in frame.head(most).to_dict("records")
    )  # fmt: skip
    return Table(
        title="FLOPs are not time: where least of the promise comes true",
        headers=("method", "tokens\nasked/mean", "FLOPs ratio\n(counted)",
                 "speed-up [95 %]\n(measured)", "of FLOPs\nratio"),
        blocks=(Block("", rows),),
        caption=(*comparison.caption()[:1], _clock_text(comparison.clock), REALISED),
        data=frame,
        facts=comparison.setting,
    )  # fmt: skip


def _realised(line: Mapping[Any, Any]) -> Cell:
    share = realised(line["speedup"], 100 / line["flops_share"])
    return Cell(NONE_PRINTED if share is None else f"{share:.0f} %")


def _names(keys: str) -> str:
    """Names of papers, by their keys."""
    return "\n".join(name_of(key) for key in keys.split())


def _cost_row(line: Mapping[Any, Any]) -> tuple[Cell, ...]:
    peak = line["peak_mib"]
    interval = between(line["speedup_low"], line["speedup_high"], 2)
    return (
        Cell(line["label"]), _tokens(line),
        Cell(f"{line['flops'] / 1e9:.2f}\n{line['flops_share']:.1f} %"),
        Cell(f"{line['kv_share']:.1f}"), Cell(f"{line['prefill_ms']:.1f}"),
        Cell(f"{line['speedup']:.2f}x {interval}"), _realised(line),
        Cell(f"{line['decode_ms']:.2f}"),
        Cell(NOT_MEASURED if peak is None or pd.isna(peak) else f"{peak:.0f}"),
        Cell(_names(line["cost_paper"])),
    )  # fmt: skip


def _energy_row(line: Mapping[Any, Any], base: Mapping[str, Any] | None) -> tuple[Cell, ...]:
    known = line["joules"] is not None and not pd.isna(line["joules"])
    mark = " modelled" if line["modelled"] else "" if line["reliable"] else " unreliable"
    ratio = "not compared"
    measured = known and not line["modelled"] and bool(line["reliable"])
    whole = base["energy"] if base and rankable(base["energy"]) else None
    if measured and whole and line["energy_method"] == method_of(whole):
        ratio = f"{line['joules'] / whole['joules_per_question']:.2f}"
    return (
        Cell(line["label"]), _tokens(line),
        Cell(f"{line['joules']:.3g}{mark}" if known else NOT_MEASURED), Cell(ratio),
        Cell(f"{line['grams']:.3g}{mark}" if known else NOT_MEASURED), Cell(line["energy_method"]),
    )  # fmt: skip
