"""Tables and figures of early exits, from the three records of `analyses.early_exit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from frugalvlm.benchmarks import stats
from frugalvlm.formats import NONE_PRINTED, plus_minus
from frugalvlm.report.display import Block, Cell, Table, facts_of, setting_lines
from frugalvlm.report.plots import MARKERS, colors_of, new_axes
from frugalvlm.runs.records import Record

__all__ = ["copy_plot", "decoding_table", "depth_plot", "depth_table", "gate_plot", "gate_table",
           "time_table"]  # fmt: skip

INTERVAL = "± is half of a 95 % bootstrap interval over prompts."
ORACLES = {"first_match": "first match", "saturation": "saturation"}


def depth_table(record: Record) -> Table:
    """Where an oracle that knows the last layer's answer would exit, source by source."""
    headers = ("answers", "exit counted", "mean layer", "% of depth", "last layer, %",
               "last 5/16, %", "first - later piece", "after attention, %")  # fmt: skip
    lines = []
    for name, source in record["sources"].items():
        for key, label in ORACLES.items():
            own = source[key]
            last = round(source["layers"] * 5 / 16)
            lines.append({
                "answers": f"{name} ({source['tokens']} tokens)", "exit counted": label,
                "mean layer": own["mean"], "% of depth": own["depth_%"],
                "last layer, %": _last(own["per_item"], 1),
                "last 5/16, %": _last(own["per_item"], last),
                "first - later piece": own["first_minus_later"],
                "after attention, %": source["after_attention"] if key == "first_match" else None,
            })  # fmt: skip
    notes = (
        "First match: the first layer that says what the last one says. Saturation: the first from "
        "which on all do. Pieces: mean exit of a word's first piece minus that of later pieces, in "
        "layers. After attention: the first match comes inside a block, before its MLP.",
    )
    return _table("Oracle exits", headers, lines, record, notes)


def gate_table(record: Record, source: str = "captions") -> Table:
    """What the three gates find, judged in one pass where no exit disturbs another."""
    headers = ("gate", "threshold", "mean exit", "hits oracle, %", "same word, %", "precision, %",
               "recall, %")  # fmt: skip
    lines = [
        {"gate": row["gate"], "threshold": f"{row['threshold']:g}", "mean exit": row["mean_exit"],
         "hits oracle, %": row["hits"], "same word, %": row["agreement"],
         "precision, %": row["precision"], "recall, %": row["recall"]}
        for row in record["sources"][source]["gates"]
    ]  # fmt: skip
    layers = record["sources"][source]["layers"]
    notes = (
        f"Mean exit in layers, of {layers}. Hits: leaves exactly at the first match. Same word: "
        "what is said there is what the last layer says. Precision and recall count readings: of "
        "those where the gate fires, how many say the last layer's word, and the other way round.",
    )
    return _table(f"Gates on {source}", headers, lines, record, notes)


def decoding_table(record: Record, source: str = "captions") -> Table:
    """Exits that really happen: agreement with the untouched model, and free answers."""
    found = record["sources"][source]
    headers = ("gate", "threshold", "cache", "layers", "same word, %", "free: layers",
               "same answer, %", "score", "score change")  # fmt: skip
    lines = []
    for row in found["methods"]:
        free = row["free"]
        lines.append({
            "gate": row["gate"], "threshold": f"{row['threshold']:g}", "cache": row["kv_copy"],
            "layers": row["mean_layers"], "same word, %": row["agreement"],
            "free: layers": free["mean_layers"], "same answer, %": free["same_answer_%"],
            "score": free.get("score"), "score change": free.get("score_change"),
        })  # fmt: skip
    score = found.get("score")
    untouched = f" Untouched: {_text(score)}." if score else ""
    notes = (
        "Layers per decoded token. Same word: the untouched model's answer is fed back, so each "
        "place is judged behind the same text. Free: answers as they come out, exits and all."
        f"{untouched}",
    )
    return _table(f"Decoding {source} with early exits", headers, lines, record, notes)


def time_table(record: Record) -> Table:
    """Measured decode time per token, runs taking turns, and the layers that they ran."""
    headers = ("answers", "run", "layers", "ms per token, p50", "p95", "speed-up")
    lines = []
    for name, source in record["sources"].items():
        for run in source["runs"]:
            lines.append({
                "answers": f"{name} ({source['steps']} tokens)", "run": run["run"],
                "layers": run["mean_layers"], "ms per token, p50": run["p50_ms"],
                "p95": run["p95_ms"], "speed-up": run["speedup"],
            })  # fmt: skip
    rounds = record["request"]["repeats"]
    notes = (
        f"Batch 1, the longest answer of each source, {rounds} rounds. Speed-up: median over "
        "rounds of the untouched model's time over the run's. Gate alone reads every layer and "
        "never leaves: the price of looking.",
    )
    return _table("Decode time", headers, lines, record, notes, digits=2)


def depth_plot(record: Record, ax: Axes | None = None) -> Axes:
    """Tokens that could have left by each layer; solid: first match, dashed: saturation."""
    ax = ax or new_axes((6.6, 4.0))
    colors = colors_of(list(record["sources"]))
    for marker, (name, source) in zip(MARKERS, record["sources"].items(), strict=False):
        for key, line in zip(ORACLES, ("-", "--"), strict=True):
            counts = np.asarray(source[key]["per_item"], dtype=float).sum(0)
            label = f"{name}, {ORACLES[key]}"
            ax.plot(np.arange(1, len(counts) + 1), 100 * counts.cumsum() / counts.sum(), line,
                    color=colors[name], marker=marker, markersize=4, label=label)  # fmt: skip
    return _finished(ax, record, "layer", "tokens that could have left, %",
                     "How deep must a token go? (oracle)")  # fmt: skip


def gate_plot(record: Record, source: str = "captions", ax: Axes | None = None) -> Axes:
    """Agreement with the last layer against layers saved, gate by gate; the oracle has 100 %."""
    ax = ax or new_axes((6.6, 4.0))
    found = record["sources"][source]
    rows, layers = pd.DataFrame(found["gates"]), found["layers"]
    colors = colors_of(list(rows["gate"].unique()))
    for marker, (gate, own) in zip(MARKERS, rows.groupby("gate", sort=False), strict=False):
        saved = [100 * (1 - exit["value"] / layers) for exit in own["mean_exit"]]
        values, low, high = ([a[k] for a in own["agreement"]] for k in ("value", "low", "high"))
        error = np.abs(np.array([low, high]) - values)
        ax.errorbar(saved, values, yerr=error, marker=marker, capsize=3, color=colors[str(gate)],
                    label=gate)  # fmt: skip
        for x, y, threshold in zip(saved, values, own["threshold"], strict=True):
            ax.annotate(f"{threshold:g}", (x, y), xytext=(3, 4), textcoords="offset points",
                        fontsize=7)  # fmt: skip
    oracle = 100 - found["first_match"]["depth_%"]["value"]
    ax.plot(oracle, 100, marker="*", markersize=14, linestyle="none", color="0.2", label="oracle")
    return _finished(ax, record, "layers saved, %", "same word as the last layer, %",
                     f"What gates find on {source} (numbers: thresholds)")  # fmt: skip


def copy_plot(record: Record, source: str = "captions", ax: Axes | None = None) -> Axes:
    """Agreement by place in the answer, for each way to fill the cache of skipped layers."""
    ax = ax or new_axes((6.6, 4.0))
    found = record["sources"][source]
    edges = found["bins"]
    names = [f"{a + 1}-{b}" for a, b in pairwise(edges)] + [f"{edges[-1] + 1}-"]
    rows = [r for r in found["methods"]
            if r["gate"] == "confidence" and r["threshold"] == found["eager"]]  # fmt: skip
    colors = colors_of([row["kv_copy"] for row in rows])
    for i, row in enumerate(rows):
        places = [(j, p) for j, p in enumerate(row["by_place"]) if p["value"] is not None]
        values, low, high = ([p[k] for _, p in places] for k in ("value", "low", "high"))
        x = [j + 0.05 * (i - 1) for j, _ in places]
        error = np.abs(np.array([low, high]) - values)
        ax.errorbar(x, values, yerr=error, marker=MARKERS[i], capsize=3,
                    color=colors[row["kv_copy"]], label=row["kv_copy"])  # fmt: skip
    ax.set_xticks(range(len(names)), names)
    return _finished(ax, record, "token of the answer", "same word as the untouched model, %",
                     f"Copied caches on {source}, confidence {found['eager']:g}")  # fmt: skip


def _finished(ax: Axes, record: Record, x: str, y: str, title: str) -> Axes:
    request = record["request"]
    ax.set(xlabel=x, ylabel=y)
    ax.set_title(
        f"{title}\n{request['model']} at the {request['scale']} scale, "
        f"{request['items']} answers per source, {request['split']} split",
        fontsize=10, loc="left",
    )  # fmt: skip
    ax.legend(fontsize=8)
    return ax


def _last(per_item: Sequence[Sequence[int]], layers: int) -> dict[str, Any]:
    """Share of the tokens whose exit is one of the last layers, in %."""
    counts = np.asarray(per_item, dtype=float)
    sums = np.stack([100 * counts[:, counts.shape[1] - layers :].sum(1), counts.sum(1)], 1)
    found = stats.from_sums(stats.share, sums, top=100)
    return {"value": found.value, "low": found.low, "high": found.high}


def _text(value: Any, digits: int = 1) -> str:
    if isinstance(value, Mapping):
        if value["value"] is None:
            return NONE_PRINTED
        return plus_minus(value["value"], value["low"], value["high"], digits)
    if value is None:
        return NONE_PRINTED
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _table(
    title: str,
    headers: Sequence[str],
    lines: Sequence[Mapping[str, Any]],
    record: Record,
    notes: Sequence[str],
    digits: int = 1,
) -> Table:
    """Lines under their headers; `data` has every figure with its interval."""
    rows = tuple(tuple(Cell(_text(line[h], digits)) for h in headers) for line in lines)
    flat = []
    for line in lines:
        row: dict[str, Any] = {}
        for name, value in line.items():
            if isinstance(value, Mapping):
                row |= {name: value["value"], f"{name} low": value["low"],
                        f"{name} high": value["high"]}  # fmt: skip
            else:
                row[name] = value
        flat.append(row)
    facts = facts_of([record], record["request"]["scale"], record["request"]["items"])
    setting = f"{facts['n']} answers per source."
    caption = (*setting_lines(facts), setting, *notes, INTERVAL)
    return Table(title, tuple(headers), (Block("", rows),), caption, pd.DataFrame(flat), facts)
