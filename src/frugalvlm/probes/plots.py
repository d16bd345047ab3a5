"""Figures of the pocket benchmarks' own notebook: what tells methods apart, and the phenomena."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill, shorten
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from frugalvlm.benchmarks import ALL_BENCHMARKS, BENCHMARKS, load_benchmark
from frugalvlm.benchmarks.stats import mean_interval
from frugalvlm.checks import check_names
from frugalvlm.drawing import draw_kept_patches
from frugalvlm.pocket.scenes import make_scene
from frugalvlm.probes.controls import ranked_patches
from frugalvlm.probes.discrimination import LABELS
from frugalvlm.probes.phenomena import HARMLESS, SAME_RANKING, stages
from frugalvlm.report.plots import MARKERS, colors_of, new_axes
from frugalvlm.runs.records import Record

__all__ = [
    "discrimination_plot",
    "object_attention_plot",
    "oracle_panel",
    "ranking_plot",
    "removal_plot",
    "sample_panel",
    "stages_plot",
]


def sample_panel(names: Sequence[str] = (), picture: int = 2, split: str = "test") -> Figure:
    """One picture of every benchmark, and up to three questions about it with their answers.

    Args:
        names: benchmarks; none: all.
        picture: the how-manieth picture.
        split: "dev" or "test".
    """
    names = list(check_names("names", names, ALL_BENCHMARKS) if names else BENCHMARKS)
    figure, axes = _grid(len(names), (3.6, 5.1))
    for ax, name in zip(axes, names, strict=True):
        benchmark = load_benchmark(name)
        rows = benchmark.dataset(split, (picture + 1) * benchmark.per_image)  # type: ignore[arg-type]
        own = list(rows.select(range(len(rows) - benchmark.per_image, len(rows))))
        ax.imshow(own[0]["image"])
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{name} (stands for {benchmark.stands_for})", fontsize=10, loc="left")
        asked = [fill(f"{row['question']} → {shorten(row['answer'], 120)}", 52) for row in own[:3]]
        ax.set_xlabel("\n".join(asked), fontsize=8, loc="left")
    figure.get_layout_engine().set(hspace=0.1)  # type: ignore[union-attr, call-arg]
    return figure


def oracle_panel(
    name: str = "pocket-gqa", picture: int = 2, budgets: Sequence[int] = (48, 16, 8),
    grid: tuple[int, int] = (12, 12), split: str = "test",
) -> Figure:  # fmt: skip
    """What the oracle keeps of a picture at several budgets, for one question.

    Args:
        name: the benchmark.
        picture: the how-manieth picture; its last question is taken.
        budgets: visual tokens kept.
        grid: rows and columns of patches.
        split: "dev" or "test".
    """
    benchmark = load_benchmark(name)
    row = benchmark.dataset(split, (picture + 1) * benchmark.per_image)[-1]  # type: ignore[arg-type]
    scene = make_scene(split, row["scene_seed"])  # type: ignore[arg-type]
    ranked = ranked_patches(scene, [(r, c) for r, c in row["about"]], grid)
    figure, axes = _grid(len(budgets), (3.2, 3.4), columns=len(budgets))
    for ax, budget in zip(axes, budgets, strict=True):
        draw_kept_patches(row["image"], grid, ranked[:budget], ax=ax)
    figure.suptitle(f"{row['question']} ({row['answer']})", fontsize=11)
    return figure


def discrimination_plot(frame: pd.DataFrame, title: str = "") -> Figure:
    """Accuracy over the visual tokens kept, benchmark by benchmark, with 95 % intervals.

    Args:
        frame: what `discrimination.accuracies` returned.
        title: of the figure, e.g. model and scale.
    """
    names = list(dict.fromkeys(frame["benchmark"]))
    total = frame["budget"].max()
    choices = [key for key in LABELS if key not in ("vanilla", "blank")]
    colors = colors_of(choices)
    figure, axes = _grid(len(names), (4.0, 3.3))
    for ax, name in zip(axes, names, strict=True):
        own = frame[frame["benchmark"] == name]
        for i, key in enumerate(choices):
            rows = own[(own["method"] == key) & (own["budget"] < total)].sort_values("budget")
            # A little apart, or intervals at one budget would hide each other.
            x = rows["budget"] * (1 + 0.04 * (i - (len(choices) - 1) / 2))
            spread = [rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]]
            ax.errorbar(x, rows["accuracy"], yerr=spread, label=LABELS[key], capsize=2,
                        color=colors[key], marker=MARKERS[i], markersize=4)  # fmt: skip
        for key, style in (("vanilla", "-"), ("blank", ":")):
            line = own[(own["method"] == key) & (own["budget"] == total)]
            for row in line.itertuples():
                ax.axhline(row.accuracy, color="0.25", linestyle=style, linewidth=1.2,
                           label=LABELS[key])  # fmt: skip
                ax.axhspan(row.low, row.high, color="0.5", alpha=0.15, linewidth=0)
        budgets = sorted(own.loc[own["budget"] < total, "budget"].unique())
        ax.set_xscale("log")
        ax.set_xticks(budgets, [str(b) for b in budgets])
        ax.minorticks_off()
        ax.set_ylim(-3, 103)
        ax.set_title(f"{name}, n = {own['n'].max()}", fontsize=10, loc="left")
    for ax in axes:
        ax.set_xlabel(f"visual tokens asked for, of {total}", fontsize=9)
    axes[0].set_ylabel("accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    figure.legend(
        known.values(), known.keys(), loc="outside lower center", frameon=False, fontsize=9,
        ncols=len(known) if len(names) > 2 else 3,
    )  # fmt: skip
    figure.suptitle(f"{title}\nbars and bands: 95 % interval".strip(), fontsize=11)
    return figure


def object_attention_plot(record: Record, ax: Axes | None = None) -> Axes:
    """Share of the tower's attention on object patches, layer by layer of the tower.

    Args:
        record: of kind "phenomena".
        ax: axes to draw on; a new figure when absent.
    """
    ax = ax or new_axes((6.4, 3.9))
    shares = record["shares"]
    names = {"cls": "attention of [CLS]", "received": "attention of all tokens"}
    for i, name in enumerate(name for name in names if name in shares):
        _band(ax, 100 * np.asarray(shares[name]), names[name], i)
    covered = 100 * np.mean(shares["covered"])
    ax.axhline(covered, color="0.35", linestyle=":", label="attention spread evenly")
    ax.axvline(record["read_layer"], color="0.7", linewidth=6, alpha=0.5, zorder=0,
               label="read by the language model")  # fmt: skip
    x, y = "layer of the vision tower", "attention on object patches, %"
    _finish(ax, record, x, y, "Does the vision tower look at objects?")
    return ax


def stages_plot(record: Record, ax: Axes | None = None) -> Axes:
    """Share of the text's attention on visual tokens, layer by layer of the decoder.

    Arguments as for `object_attention_plot`.
    """
    ax = ax or new_axes((6.4, 3.9))
    shares = {name: 100 * np.asarray(values) for name, values in record["shares"].items()}
    _band(ax, shares["text"], "all tokens of the question", 0)
    _band(ax, shares["last"], "the last token of the prompt", 1)
    ax.axhline(shares["even"].mean(), color="0.35", linestyle=":", label="attention spread evenly")
    for stage in stages(shares["text"].shape[1])[1:]:
        ax.axvline(stage.start + 0.5, color="0.6", linewidth=1, linestyle="--")
    x, y = "decoder layer (dashed: the paper's stages, scaled)", "attention on visual tokens, %"
    _finish(ax, record, x, y, "How much does the text look at the image?")
    return ax


def ranking_plot(record: Record) -> Figure:
    """Kendall's tau between the layers' rankings of visual tokens: neighbours, and all pairs.

    Args:
        record: of kind "phenomena".
    """
    figure = plt.figure(figsize=(10.5, 4), layout="constrained")
    with sns.axes_style("whitegrid"):
        line, heat = figure.subplots(1, 2)
    neighbours = np.asarray(record["shares"]["neighbours"])
    mean, low, high = mean_interval(neighbours)
    x = np.arange(1, len(mean) + 1)
    line.bar(x, mean, yerr=[mean - low, high - mean], capsize=2,
             color=sns.color_palette("colorblind")[0])  # fmt: skip
    line.axhline(
        SAME_RANKING, color="0.35", linestyle=":", label=f"tau = {SAME_RANKING} (G-Search)"
    )
    line.set_xticks(x, [f"{i}-{i + 1}" for i in x], fontsize=8)
    line.set(xlabel="neighbouring decoder layers", ylabel="Kendall's tau")
    line.legend(fontsize=8)
    tau = np.asarray(record["tau"], dtype=float)
    labels = np.arange(1, len(tau) + 1)
    sns.heatmap(
        tau, ax=heat, vmin=-1, vmax=1, cmap="vlag", square=True, xticklabels=labels,
        yticklabels=labels, cbar_kws={"label": "Kendall's tau"},
    )  # fmt: skip
    heat.set(xlabel="decoder layer", ylabel="decoder layer")
    figure.suptitle(_title(record, "Do the layers rank the visual tokens alike?"), fontsize=10)
    return figure


def removal_plot(removal: pd.DataFrame, title: str = "", ax: Axes | None = None) -> Axes:
    """Accuracy when all visual tokens are removed behind a decoder layer.

    Args:
        removal: what `phenomena.removal_frame` returned.
        title: model and scale.
        ax: axes to draw on; a new figure when absent.
    """
    ax = ax or new_axes((7.2, 4.4))
    names = [name for name in dict.fromkeys(removal["benchmark"]) if name != "loss"]
    for i, name in enumerate(names):
        rows = removal[removal["benchmark"] == name].sort_values("layer")
        color = sns.color_palette("colorblind")[i % 10]
        ax.plot(rows["layer"], rows["value"], label=f"{name}, n = {rows['n'].max()}", color=color,
                marker=MARKERS[i % len(MARKERS)], markersize=4)  # fmt: skip
        ax.fill_between(rows["layer"], rows["low"], rows["high"], color=color, alpha=0.15)
    loss = removal[removal["benchmark"] == "loss"].sort_values("layer")
    fine = loss[loss["high"] <= HARMLESS]["layer"]
    ax.plot(fine, np.full(len(fine), -2.0), "k|", markersize=9,
            label=f"mean loss surely under {HARMLESS:g} points")  # fmt: skip
    ax.set_xticks(loss["layer"])
    ax.set_ylim(-5, 103)
    ax.set_xlabel("last decoder layer that sees the image (rightmost: untouched)")
    ax.set_ylabel("accuracy, %")
    ax.set_title(f"How deep is the image needed?\n{title}", fontsize=10, loc="left")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def _grid(count: int, size: tuple[float, float], columns: int = 3) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = plt.figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    with sns.axes_style("whitegrid"):
        axes = list(np.atleast_1d(figure.subplots(rows, columns)).ravel())
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _band(ax: Axes, values: np.ndarray, label: str, i: int) -> None:
    """Mean over pictures per layer, with its 95 % interval."""
    mean, low, high = mean_interval(values)
    layers, color = np.arange(1, len(mean) + 1), sns.color_palette("colorblind")[i]
    style: dict[str, Any] = {"color": color, "marker": MARKERS[i], "label": label}
    ax.plot(layers, mean, **style)
    ax.fill_between(layers, low, high, color=color, alpha=0.25)


def _finish(ax: Axes, record: Record, x: str, y: str, question: str) -> None:
    ax.set(xlabel=x, ylabel=y)
    ax.set_xticks(np.asarray(ax.lines[0].get_xdata()))
    ax.set_ylim(bottom=0)
    ax.set_title(_title(record, question), fontsize=10, loc="left")
    ax.legend(fontsize=8, frameon=True, loc="best")


def _title(record: Record, question: str) -> str:
    request = record["request"]
    return (
        f"{question}\n{request['model']} at the {request['scale']} scale, {request['split']} "
        f"split\nmean over {record['images']} pictures; bands and bars: 95 % interval"
    )
