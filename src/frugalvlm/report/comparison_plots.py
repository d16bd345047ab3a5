"""Figures of the comparison: accuracy over tokens, Pareto fronts, the methods' tax, energy.

A method has one colour and marker in all of them. Every title says scale, model and n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from frugalvlm.report.comparison import CLOSE, DOMINATED, FRONT, Comparison
from frugalvlm.report.comparison_runs import FAMILIES

__all__ = ["benchmarks_plot", "energy_plot", "pareto_plot", "speed_plot", "tax_plot", "tokens_plot"]

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
_GREY = "0.8"
INTERVALS = "bars: 95 % interval over pictures"


def tokens_plot(comparison: Comparison) -> Figure:
    """Mean retention over visual tokens, one panel per place where methods act."""
    frame = _whole(comparison)
    families = _families(frame)
    figure, axes = _panels(1, len(families), 4.6, 4.4)
    for ax, family in zip(axes, families, strict=True):
        for _, own in frame[frame["family"] != family].sort_values("tokens").groupby("label"):
            ax.plot(own["tokens"], own["mean"], color=_GREY, linewidth=1, zorder=1)
        _lines(ax, frame[frame["family"] == family], "mean", comparison)
        _tokens_axis(ax, frame, comparison.total)
        ax.set_title(_family_title(family), fontsize=10, loc="left")
        ax.legend(fontsize=8, frameon=True, loc="lower right")
        ax.sharey(axes[0])
    axes[0].set_ylabel("score retained, % of untouched model\n(mean over benchmarks)")
    questions = int(frame["mean_n"].max())
    figure.suptitle(
        f"Accuracy over visual tokens: {comparison.title()}, {questions:,} in all\n"
        f"{INTERVALS}; grey: the methods of the other panels",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def benchmarks_plot(comparison: Comparison) -> Figure:
    """Retention over visual tokens, one panel per benchmark; colours say where methods act."""
    frame, names = comparison.frame(), comparison.benchmarks
    columns = min(3, len(names))
    figure, axes = _panels(-(-len(names) // columns), columns, 4.4, 3.4)
    families = _families(frame)
    colors = dict(zip(families, sns.color_palette("colorblind"), strict=False))
    for ax, name in zip(axes, names, strict=False):
        known = frame[frame[name].notna()]
        for (family, _), own in known.groupby(["family", "label"]):
            own = own.sort_values("tokens")
            error = [own[name] - own[f"{name}_low"], own[f"{name}_high"] - own[name]]
            ax.errorbar(own["tokens"], own[name], yerr=error, color=colors[str(family)],
                        linewidth=1, marker=".", elinewidth=0.6, alpha=0.75)  # fmt: skip
        _tokens_axis(ax, known, comparison.total)
        ax.set_title(f"{name} (n = {int(known[f'{name}_n'].max())})", fontsize=10, loc="left")
    for ax in axes[len(names) :]:
        ax.remove()
    for ax in axes[::columns]:
        ax.set_ylabel("score retained, %")
    handles = [Line2D([], [], color=colors[f], marker=".", label=_family_title(f))
               for f in families]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(
        f"The same per benchmark: {comparison.title()}\none line per method; {INTERVALS}",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def pareto_plot(comparison: Comparison) -> Figure:
    """Mean retention against counted FLOPs, with the front and what cannot be told apart from it.

    `comparison.front()` holds the numbers.
    """
    return _pareto(
        comparison, "flops_share", "prefill FLOPs, % of the untouched model's (counted)",
        "Accuracy against counted FLOPs", "counted for one prompt, guiding models included",
    )  # fmt: skip


def speed_plot(comparison: Comparison) -> Figure:
    """Mean retention against the measured time of a prefill."""
    return _pareto(
        comparison, "time_share", "prefill time, % of the untouched model's (measured)",
        "Accuracy against measured time",
        f"wall clock on machine {comparison.setting['machine']}; states as for FLOPs",
    )  # fmt: skip


def _pareto(comparison: Comparison, column: str, axis: str, title: str, remark: str) -> Figure:
    frame = comparison.front()
    frame = frame.assign(time_share=100 / frame["speedup"].astype(float))
    figure, (ax,) = _panels(1, 1, 9.2, 5.4)
    styles = _styles(frame)
    for row in frame.to_dict("records"):
        line = {str(name): value for name, value in row.items()}
        color, marker = styles[str(line["label"])]
        strong = line["state"] != DOMINATED
        error: dict[str, Any] = {"yerr": [[line["mean"] - line["mean_low"]],
                                          [line["mean_high"] - line["mean"]]]}  # fmt: skip
        if column == "time_share":
            error["xerr"] = [[line[column] - 100 / line["speedup_high"]],
                             [100 / line["speedup_low"] - line[column]]]  # fmt: skip
        ax.errorbar(
            line[column], line["mean"], **error, color=color, marker=marker, markersize=7,
            markerfacecolor=color if line["state"] == FRONT else "white", elinewidth=0.8,
            alpha=1 if strong else 0.35, linestyle="none", zorder=3 if strong else 2,
        )  # fmt: skip
    if column == "flops_share":
        best = frame[frame["state"] == FRONT].sort_values(column)
        ax.step(best[column], best["mean"], where="post", color="0.3", linewidth=1, zorder=1)
    ax.plot(100, 100, marker="*", markersize=13, color="0.2", linestyle="none")
    ax.annotate("untouched", (100, 100), xytext=(-6, 5), textcoords="offset points", ha="right",
                fontsize=8)  # fmt: skip
    ax.set_xlabel(axis)
    ax.set_ylabel("score retained, % of untouched model\n(mean over benchmarks)")
    ax.set_title(
        f"{title}: {comparison.title()}\n{remark}; {INTERVALS}", fontsize=10, loc="left"
    )  # fmt: skip
    handles = [Line2D([], [], color=c, marker=m, linestyle="none", label=label)
               for label, (c, m) in styles.items()]  # fmt: skip
    grey: dict[str, Any] = {"color": "0.3", "marker": "o", "linestyle": "none"}
    handles += [
        Line2D([], [], label=f"filled: {FRONT}", **grey),
        Line2D([], [], markerfacecolor="white", label=f"open: {CLOSE} from it", **grey),
        Line2D([], [], markerfacecolor="white", alpha=0.35, label=f"pale: {DOMINATED}", **grey),
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return figure


def tax_plot(tax: pd.DataFrame) -> Figure:
    """The methods' own tax: pruned prefill over one that was given as many tokens.

    Args:
        tax: what `compare.tax_rows` gives.
    """
    models = list(dict.fromkeys(tax["model"]))
    figure, axes = _panels(1, len(models), 5.0, 0.32 * tax["label"].nunique() + 1.8)
    for ax, model in zip(axes, models, strict=True):
        own = tax[tax["model"] == model].sort_values("ratio", ascending=False)
        place = np.arange(len(own))
        error = [own["ratio"] - own["low"], own["high"] - own["ratio"]]
        ax.errorbar(own["ratio"], place, xerr=error, fmt="o", color="#0072b2", capsize=2)
        ax.axvline(1, color="0.3", linewidth=1)
        ax.set_yticks(place, own["label"])
        kept, total, n = (int(own[name].iloc[0]) for name in ("kept", "total", "n"))
        ax.set_title(f"{model}: {kept} of {total} tokens\n{n} rounds; bars: 95 % interval",
                     fontsize=10, loc="left")  # fmt: skip
        ax.set_xlabel("times as long as a native prefill (1: no tax)")
    return figure


def energy_plot(comparison: Comparison) -> Figure:
    """Joules per question against prefill time per question: is there more in one of them?"""
    frame = comparison.frame()
    frame = frame[frame["joules"].notna()]
    figure, (ax,) = _panels(1, 1, 8.6, 4.6)
    ms = frame["prefill_ms"].astype(float) / frame["batch_size"].astype(float)
    for label, (color, marker) in _styles(frame).items():
        own = frame["label"] == label
        ax.plot(ms[own], frame.loc[own, "joules"], color=color, marker=marker, linestyle="none",
                label=label)  # fmt: skip
    if len(frame):
        watts = power(frame)
        longest = np.array([0, ms.max()])
        ax.plot(longest, watts.median() * longest / 1000, color="0.4", linestyle=":",
                label=f"{watts.median():.1f} W x time")  # fmt: skip
    kinds = {True: "modelled", False: "measured"}
    how = " and ".join(sorted({kinds[bool(m)] for m in frame["modelled"]})) or "no"
    ax.set(xlim=(0, None), ylim=(0, None))
    ax.set_xlabel("prefill time per question, ms (measured)")
    ax.set_ylabel(f"J per question ({how})")
    ax.set_title(f"Energy and time of a prefill: {comparison.title()}\n{how} energy; no interval",
                 fontsize=10, loc="left")  # fmt: skip
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def power(frame: pd.DataFrame) -> pd.Series:
    """Watts that energy and time of a prefill imply, by row."""
    seconds = frame["prefill_ms"].astype(float) / frame["batch_size"].astype(float) / 1000
    return frame["joules"].astype(float) / seconds


def _whole(comparison: Comparison) -> pd.DataFrame:
    frame = comparison.frame()
    return frame[frame["mean"].notna()]


def _families(frame: pd.DataFrame) -> list[str]:
    present = set(frame["family"])
    return [f for f in (*FAMILIES, "other") if f in present]


def _family_title(family: str) -> str:
    return {
        "no choice": "no choice (blind to the picture)", "both": "before and inside the decoder",
        "other": "studies",
    }.get(family, family)  # fmt: skip


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    with sns.axes_style("whitegrid"):
        figure = plt.figure(figsize=(width * columns, height * rows), layout="constrained")
        return figure, list(np.atleast_1d(figure.subplots(rows, columns)).ravel())


def _styles(frame: pd.DataFrame) -> dict[str, tuple[Any, str]]:
    """Colour and marker of every label; markers go on where the ten colours begin again."""
    palette = sns.color_palette("colorblind", 10)
    labels = list(dict.fromkeys(frame.sort_values(["family", "label"])["label"]))
    return {label: (palette[i % 10], MARKERS[i % len(MARKERS)])
            for i, label in enumerate(labels)}  # fmt: skip


def _lines(ax: Axes, frame: pd.DataFrame, name: str, comparison: Comparison) -> None:
    styles = _styles(_whole(comparison))
    for label, own in frame.groupby("label"):
        own = own.sort_values("tokens")
        color, marker = styles[str(label)]
        error = [own[name] - own[f"{name}_low"], own[f"{name}_high"] - own[name]]
        ax.errorbar(own["tokens"], own[name], yerr=error, color=color, marker=marker, capsize=2,
                    label=str(label), zorder=2)  # fmt: skip


def _tokens_axis(ax: Axes, frame: pd.DataFrame, total: int | None) -> None:
    ax.axhline(100, color="0.4", linewidth=1)
    ax.set_xscale("log")
    ticks = [t for t in (2, 4, 8, 16, 32, 64, 128, 256, 512) if t >= frame["tokens"].min() / 2]
    ticks = [t for t in ticks if t <= (total or 512)]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel(f"visual tokens, mean over decoder layers (of {total})")
