"""Figures: which patches survive, what is retained, what it costs. Colours are safe for the
colour-blind, and every line has a marker of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from frugalvlm.benchmarks.stats import mean_interval
from frugalvlm.drawing import KEPT_EDGE, TINTS, count_text, draw_kept_patches
from frugalvlm.report.display import Table
from frugalvlm.runs.records import Record

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "attention_mass_plot",
    "draw_kept_patches",
    "efficiency_bars",
    "keep_rates_plot",
    "kept_patches_panel",
    "rank_agreement_plot",
    "retention_curve",
]

Kept = tuple[tuple[int, int], Sequence[int], Mapping[int, Sequence[int]]]

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def kept_patches_panel(image: Image, runs: Mapping[str, Kept], title: str = "") -> Figure:
    """The picture, and beside it what each run keeps of it.

    Args:
        image: the picture the tower saw.
        runs: for each label its grid, kept patches and merged groups.
        title: of the whole figure.
    """
    rows = -(-(len(runs) + 1) // 4)
    columns = -(-(len(runs) + 1) // rows)
    figure = plt.figure(figsize=(2.7 * columns, 3.3 * rows + 0.6), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).ravel())
    for ax in axes[len(runs) + 1 :]:
        ax.remove()
    axes[0].imshow(image)
    axes[0].set(xticks=[], yticks=[])
    axes[0].set_title("the picture\n\n", fontsize=9, loc="left")
    for ax, (label, (grid, kept, merged)) in zip(axes[1:], runs.items(), strict=False):
        draw_kept_patches(image, grid, kept, merged, ax)
        counted = count_text(grid, kept, merged).replace(", ", ",\n")
        ax.set_title("")
        ax.set_title(f"{label}\n{counted}" + "\n" * ("\n" not in counted), fontsize=9, loc="left")
    handles = [
        Patch(facecolor="white", edgecolor=KEPT_EDGE, linewidth=2, label="kept as it is"),
        Patch(facecolor=TINTS[0], edgecolor="white", label="merged (one tint and edge per token)"),
        Patch(facecolor="0.25", label="dropped"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def retention_curve(table: Table, ax: Axes | None = None) -> Axes:
    """Mean retention over the measured mean of tokens, with intervals; the paper's dashed.

    The paper's own numbers stand at the tokens that it names, which some papers count otherwise.

    Args:
        table: what `accuracy_table` gives.
        ax: axes to draw on; a new figure when absent.
    """
    ax = ax or new_axes((7.2, 4.4))
    total = table.data["budget"].max()
    means = table.data[(table.data["benchmark"] == "mean") & (table.data["budget"] < total)]
    means = means[~means["once"].astype(bool)]
    paper_total = table.data["paper_tokens"].max()
    methods = list(dict.fromkeys(means["label"]))
    colors = colors_of(methods)
    for i, label in enumerate(methods):
        rows = means[means["label"] == label].sort_values("budget")
        known = rows.dropna(subset=["retention"])
        # A little apart, or intervals at one budget would hide each other.
        apart = 1 + 0.014 * (i - (len(methods) - 1) / 2)
        x = 100 * known["tokens_mean"].astype(float) / total * apart
        down = known["retention"] - known["retention_low"]
        up = known["retention_high"] - known["retention"]
        style: dict[str, Any] = {"color": colors[label], "marker": MARKERS[i % len(MARKERS)]}
        if len(known):
            ax.errorbar(x, known["retention"], yerr=[down, up], label=label, capsize=3, **style)
        printed = rows.dropna(subset=["paper_retention"])
        if len(printed):
            x = 100 * printed["paper_tokens"] / paper_total
            style |= {"markerfacecolor": "white", "alpha": 0.85, "linestyle": "--"}
            ax.plot(x, printed["paper_retention"], label=f"{label}, printed", **style)
    ax.axhline(100, color="0.4", linewidth=1)
    ax.set_ylim(top=max(105.0, ax.get_ylim()[1]))
    ax.annotate(
        "untouched model", (0.99, 100), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", fontsize=8, color="0.3",
    )  # fmt: skip
    budgets = sorted(means["budget"].unique())
    ax.set_xscale("log")
    ax.set_xticks(
        [100 * b / total for b in budgets], [f"{100 * b / total:.0f}\n({b})" for b in budgets]
    )
    ax.minorticks_off()
    ax.set_xlabel(f"visual tokens, measured mean over layers, % of all (number, of {total})")
    ax.set_ylabel("score retained, % of untouched model\n(mean over benchmarks)")
    printed_line = "\ndashed: printed in the paper, for its own model and benchmarks"
    benchmarks = table.data["benchmark"].nunique() - 1
    ax.set_title(
        f"{table.title}\nn = {_questions(means)} questions on {benchmarks} benchmarks; "
        f"bars: 95 % interval{printed_line if _any(means, 'paper_retention') else ''}",
        fontsize=10, loc="left",
    )  # fmt: skip
    _legend(ax)
    return ax


def efficiency_bars(table: Table) -> Figure:
    """Prefill speed-up with intervals, prefill FLOPs and visual KV cache, budget by budget.

    Args:
        table: what `efficiency_table` gives.
    """
    figure = plt.figure(figsize=(10.5, 4), layout="constrained")
    with sns.axes_style("whitegrid"):
        axes = figure.subplots(1, 3)
    data = table.data
    total = data["budget"].max()
    rows = data[data["budget"] < total].assign(
        flops_share=lambda d: 100 / d["flops_ratio"],
        kv_share=lambda d: 100 * d["kv_visual_ratio"],
    )
    panels = {
        "prefill_speedup": ("prefill speed-up (higher is better)", "times as fast", 1),
        "flops_share": ("prefill FLOPs (lower is better)", "% of untouched", 100),
        "kv_share": ("visual KV cache (lower is better)", "% of untouched", 100),
    }
    for ax, (name, (title, unit, reference)) in zip(axes, panels.items(), strict=True):
        _bars(ax, rows, name, total)
        ax.axhline(reference, color="0.25", linewidth=1, linestyle=":")
        ax.set_title(title, fontsize=10)
        ax.set_ylabel(unit)
        ax.set_xlabel(f"visual tokens asked for (of {total})")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    rounds = int(data["n"].max())
    facts = table.facts
    figure.suptitle(
        f"Cost at the {facts['scale']} scale: {facts['model']} on {facts['hardware']}\n"
        f"speed-up: {rounds} paired rounds, bars: 95 % interval; FLOPs and cache are counted; "
        "dotted: untouched model",
        fontsize=10,
    )  # fmt: skip
    return figure


def attention_mass_plot(record: Record, ax: Axes | None = None) -> Axes:
    """How much [CLS] attention the most attended patches get, layer by layer of the encoder.

    Args:
        record: an attention record.
        ax: axes to draw on; a new figure when absent.
    """
    ax = ax or new_axes((6.4, 3.9))
    mass = 100 * np.asarray(record["mass_per_layer"], dtype=float)
    layers = np.arange(1, len(mass) + 1)
    share = 100 * float(record["patches_fraction"])
    color = sns.color_palette("colorblind")[0]
    ax.plot(layers, mass, marker="o", color=color, label="measured")
    if record.get("mass_per_image"):
        _, low, high = mean_interval(100 * np.asarray(record["mass_per_image"], dtype=float))
        ax.fill_between(layers, low, high, color=color, alpha=0.25, label="95 % interval")
    ax.axhline(share, color="0.35", linestyle=":", label="attention spread evenly")
    if len(mass) > 1:
        ax.plot(layers[-2], mass[-2], marker="o", markersize=13, markerfacecolor="none",
                markeredgecolor="#d55e00", linestyle="none",
                label="second-last layer (read by CLS-guided methods)")  # fmt: skip
    ax.set_xticks(layers)
    ax.set_ylim(0, mass.max() * 1.45)  # room for the legend
    ax.set_xlabel("layer of the vision encoder (last on the right)")
    ax.set_ylabel(f"attention on the top {share:.0f} % patches, %")
    request = record["request"]
    ax.set_title(
        f"Where [CLS] looks: {request.get('model')} at the {request.get('scale')} scale\n"
        f"mean over {record['images']} images",
        fontsize=10, loc="left",
    )  # fmt: skip
    ax.legend(fontsize=8, frameon=True, loc="best")
    return ax


def rank_agreement_plot(record: Record, ax: Axes | None = None) -> Axes:
    """Kendall's tau of the visual-token rankings of neighbouring decoder layers.

    Args:
        record: an analysis record with `neighbours` [prompts, layers - 1].
        ax: axes to draw on; a new figure when absent.
    """
    ax = ax or new_axes((6.4, 3.6))
    tau = np.asarray(record["neighbours"], dtype=float)
    pairs = np.arange(1, tau.shape[1] + 1)
    mean, low, high = mean_interval(tau)
    color = sns.color_palette("colorblind")[0]
    ax.bar(pairs, mean, color=color)
    ax.errorbar(pairs, mean, yerr=[mean - low, high - mean], fmt="none", ecolor="0.15", capsize=2)
    ax.axhline(0.65, color="0.35", linestyle=":", label="above it in the paper, but for the first")
    ax.set_xticks(pairs, [f"{p}-{p + 1}" for p in pairs])
    ax.set_xlabel("neighbouring decoder layers")
    ax.set_ylabel("Kendall's tau")
    ax.set_title(
        f"Do layers rank visual tokens alike? {record['request'].get('model')}\n"
        f"mean over {len(tau)} prompts; bars: 95 % interval",
        fontsize=10, loc="left",
    )  # fmt: skip
    ax.legend(fontsize=8, frameon=True, loc="best")
    return ax


def keep_rates_plot(
    measured: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    printed: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ax: Axes | None = None,
) -> Axes:
    """Keep rates over the depth of the decoder: ours, and the paper's own dashed.

    Args:
        measured: for each label depth (0 to 1) and rate.
        printed: those of the paper, for its own models.
        ax: axes to draw on; a new figure when absent.
    """
    ax = ax or new_axes((7.2, 4.2))
    for i, (label, (depth, rates)) in enumerate(measured.items()):
        color = sns.color_palette("colorblind")[i]
        ax.step(depth, rates, where="mid", color=color)
        ax.plot(depth, rates, color=color, marker=MARKERS[i], linestyle="none", label=label)
    for i, (label, (depth, rates)) in enumerate(printed.items()):
        grey = str(0.15 + 0.55 * i / max(len(printed) - 1, 1))
        ax.plot(depth, rates, "--", color=grey, linewidth=1, label=f"{label}, printed")
    ax.set(ylim=(0, 1.04), xlim=(0, 1))
    ax.set_xlabel("depth (0: in front of the first decoder layer, 1: behind the last)")
    ax.set_ylabel("share of the visual tokens kept")
    _legend(ax)
    return ax


def new_axes(size: tuple[float, float]) -> Axes:
    with sns.axes_style("whitegrid"):
        return plt.figure(figsize=size, layout="constrained").subplots()


def colors_of(labels: Sequence[str]) -> dict[str, Any]:
    palette = sns.color_palette("colorblind", max(len(labels), 6))
    return dict(zip(labels, palette, strict=False))


def _bars(ax: Axes, rows: pd.DataFrame, name: str, total: int) -> None:
    """Bars of one quantity: a group per budget, largest first, and a bar per method."""
    budgets = sorted(rows["budget"].unique(), reverse=True)
    labels = list(dict.fromkeys(rows["label"]))
    colors, width = colors_of(labels), 0.8 / max(len(labels), 1)
    for i, label in enumerate(labels):
        own = rows[rows["label"] == label].set_index("budget").reindex(budgets)
        x = np.arange(len(budgets)) + (i - (len(labels) - 1) / 2) * width
        ax.bar(x, own[name], 0.92 * width, color=colors[label], label=label)
        if f"{name}_low" in own:
            spread = [own[name] - own[f"{name}_low"], own[f"{name}_high"] - own[name]]
            ax.errorbar(x, own[name], yerr=spread, fmt="none", ecolor="0.15", capsize=2)
    ax.set_xticks(range(len(budgets)), [f"{b}\n({100 * b / total:.0f} %)" for b in budgets])
    ax.grid(False, axis="x")


def _legend(ax: Axes) -> None:
    """Measured and printed lines of a method one after the other."""
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i].split(",")[0], labels[i]))
    ax.legend(
        [handles[i] for i in order], [labels[i] for i in order],
        fontsize=8, frameon=True, loc="center left", bbox_to_anchor=(1.01, 0.5),
    )  # fmt: skip


def _questions(means: pd.DataFrame) -> str:
    counts = sorted({int(n) for n in means["n"] if n})
    return f"{counts[0]:,} to {counts[-1]:,}" if len(counts) > 1 else f"{sum(counts):,}"


def _any(frame: pd.DataFrame, column: str) -> bool:
    return bool(frame[column].notna().any())
