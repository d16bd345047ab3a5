"""Figures of the comparison: accuracy over tokens, Pareto fronts, the methods' tax, energy.

A colour says where a method acts. There are more methods than colours that can be told apart, so
each has a panel of its own, or is named beside its points; all others stay grey. Every title says
scale, model and n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

_GREY = "0.82"
# Of seaborn's colourblind palette; the last is for studies.
_FAMILY_COLORS = ("#d55e00", "#0173b2", "#029e73", "#cc78bc", "#56b4e9")
INTERVALS = "bars: 95 % interval over pictures"


def tokens_plot(comparison: Comparison) -> Figure:
    """Mean retention over visual tokens, one panel per method; the others are grey there."""
    frame, colors = _whole(comparison), _colors(comparison)
    methods = list(dict.fromkeys(_ordered(frame)["label"]))
    columns = min(5, max(1, len(methods)))
    rows = max(1, -(-len(methods) // columns))
    figure, axes = _panels(rows, columns, 2.9, 2.3, share=True)
    for ax, label in zip(axes, methods, strict=False):
        for _, other in frame[frame["label"] != label].sort_values("tokens").groupby("label"):
            ax.plot(other["tokens"], other["mean"], color=_GREY, linewidth=0.8, zorder=1)
        own = frame[frame["label"] == label].sort_values("tokens")
        color = colors[str(own["family"].iloc[0])]
        _with_bars(ax, own, "mean", color, marker="o", markersize=4, linewidth=1.8, capsize=2)
        _tokens_axis(ax, frame, comparison.total)
        ax.set_title(str(label), fontsize=10, loc="left", color=color, fontweight="bold")
    for ax in axes[len(methods) :]:
        ax.remove()
    for ax in axes[max(0, len(methods) - columns) : len(methods)]:  # nothing stands below them
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(f"visual tokens (of {comparison.total})", fontsize=9)
    figure.supylabel("score retained, % of untouched model (mean over benchmarks)", fontsize=10)
    questions = int(frame["mean_n"].max())
    figure.suptitle(
        f"Accuracy over visual tokens: {comparison.title()}, {questions:,} in all\n"
        f"tokens: mean over decoder layers; {INTERVALS}; grey: all other methods",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    figure.legend(handles=_family_handles(colors, "o"), loc="outside lower center", frameon=False,
                  ncols=len(colors), fontsize=9)  # fmt: skip
    return figure


def benchmarks_plot(comparison: Comparison) -> Figure:
    """Retention over visual tokens, one panel per benchmark; few methods in colour, others grey.

    In colour is, of each place where methods act, the one with most runs.
    """
    frame, names = comparison.frame(), comparison.benchmarks
    columns = min(3, len(names))
    figure, axes = _panels(-(-len(names) // columns), columns, 4.4, 3.4)
    colors, strong = _colors(comparison), leaders(comparison)
    for ax, name in zip(axes, names, strict=False):
        known = frame[frame[name].notna()]
        for label, own in known.sort_values("tokens").groupby("label"):
            if label not in strong:
                single = len(own) == 1
                ax.plot(own["tokens"], own[name], color=_GREY, linewidth=0.8, zorder=1,
                        marker="." if single else "")  # fmt: skip
                continue
            _with_bars(ax, own, name, colors[strong[str(label)]], marker="o", markersize=4,
                       linewidth=1.8, elinewidth=0.8)  # fmt: skip
        _tokens_axis(ax, known, comparison.total)
        ax.set_xlabel(f"visual tokens, mean over decoder layers (of {comparison.total})")
        title = f"{name} (n = {int(known[f'{name}_n'].max())})"
        ax.set_title(title, fontsize=10, loc="left")
    for ax in axes[len(names) :]:
        ax.remove()
    for ax in axes[::columns]:
        ax.set_ylabel("score retained, %")
    handles = [Line2D([], [], color=colors[family], marker="o", markersize=4,
                      label=f"{label} ({_family_title(family)})")
               for label, family in strong.items()]  # fmt: skip
    handles.append(Line2D([], [], color=_GREY, label="all other methods"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        f"The same per benchmark: {comparison.title()}\n{INTERVALS}; in colour: of each place "
        "where methods act, the one with most runs",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def leaders(comparison: Comparison) -> dict[str, str]:
    """Of each place where methods act, the method with most runs; of several the higher mean.

    Returns:
        By label its family.
    """
    whole, found = _whole(comparison), {}
    for family in _families(whole):
        runs = whole[whole["family"] == family].groupby("label")["mean"].agg(["size", "mean"])
        found[str(runs.sort_values(["size", "mean"]).index[-1])] = family
    return found


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
    frame, colors = comparison.front(), _colors(comparison)
    frame = frame.assign(time_share=100 / frame["speedup"].astype(float)).sort_values(column)
    figure, (ax,) = _panels(1, 1, 9.2, 5.6)
    looks = {DOMINATED: (18, 0.3), CLOSE: (26, 0.9), FRONT: (42, 1.0)}  # size, opacity
    for line in frame.to_dict("records"):
        strong, (size, alpha) = line["state"] == FRONT, looks[line["state"]]
        color = colors[line["family"]] if strong else "0.45"
        ends = [[line["mean"] - line["mean_low"]], [line["mean_high"] - line["mean"]]]
        ax.errorbar(line[column], line["mean"], yerr=ends, fmt="none", ecolor=color,
                    elinewidth=0.9 if strong else 0.5, alpha=alpha, zorder=1)  # fmt: skip
        ax.scatter(line[column], line["mean"], s=size, edgecolors=color, alpha=alpha,
                   facecolors=color if strong else "white", zorder=3 if strong else 2)  # fmt: skip
    best = frame[frame["state"] == FRONT]
    if column == "flops_share" and len(best):
        ax.step([*best[column], 100], [*best["mean"], best["mean"].iloc[-1]], where="post",
                color="0.3", linewidth=1, zorder=1)  # fmt: skip
    named = _numbered(ax, best, column, colors)
    ax.plot(100, 100, marker="*", markersize=13, color="0.2", linestyle="none")
    ax.annotate("untouched", (100, 100), xytext=(-6, 6), textcoords="offset points", ha="right",
                fontsize=8)  # fmt: skip
    ax.set_xlabel(axis)
    ax.set_ylabel("score retained, % of untouched model\n(mean over benchmarks)")
    ax.set_title(
        f"{title}: {comparison.title()}\n{remark}; {INTERVALS}", fontsize=10, loc="left"
    )  # fmt: skip
    grey: dict[str, Any] = {"color": "0.45", "marker": "o", "linestyle": "none"}
    handles = [
        *named,
        Line2D([], [], markerfacecolor="white", label=f"{CLOSE} from the front", **grey),
        Line2D([], [], markerfacecolor="white", alpha=0.4, label=DOMINATED, **grey),
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False,
                  title=f"{FRONT}, cheapest first", title_fontsize=9, alignment="left")  # fmt: skip
    figure.legend(handles=_family_handles(colors, "o"), loc="outside lower center", ncols=4,
                  fontsize=9, frameon=False)  # fmt: skip
    return figure


def _numbered(ax: Axes, best: pd.DataFrame, column: str, colors: Mapping[str, Any]) -> list[Line2D]:
    """Number the front, cheapest first, neighbours of one method once; returns the key to it."""
    named: list[tuple[str, str]] = []
    for line in best.to_dict("records"):
        if named and named[-1][0] == line["label"]:
            continue
        named.append((str(line["label"]), str(line["family"])))
        ax.annotate(str(len(named)), (line[column], line["mean"]), xytext=(-4, 4), ha="right",
                    textcoords="offset points", fontsize=8,
                    color=colors[line["family"]])  # fmt: skip
    return [Line2D([], [], color=colors[family], marker="o", linestyle="none",
                   label=f"{i}  {label}")
            for i, (label, family) in enumerate(named, start=1)]  # fmt: skip


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
    for family, color in _colors(comparison).items():
        own = frame["family"] == family
        ax.plot(ms[own], frame.loc[own, "joules"], color=color, marker="o", markersize=4,
                linestyle="none", label=_family_title(family))  # fmt: skip
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


def _colors(comparison: Comparison) -> dict[str, Any]:
    """The colour of every place where methods act, the same in all figures of a comparison."""
    return dict(zip(_families(_whole(comparison)), _FAMILY_COLORS, strict=False))


def _family_handles(colors: Mapping[str, Any], marker: str, prefix: str = "") -> list[Line2D]:
    return [Line2D([], [], color=color, marker=marker, label=prefix + _family_title(family))
            for family, color in colors.items()]  # fmt: skip


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """By family, then by name."""
    place = {family: i for i, family in enumerate((*FAMILIES, "other"))}
    return frame.assign(place=frame["family"].map(place)).sort_values(["place", "label"])


def _with_bars(ax: Axes, own: pd.DataFrame, name: str, color: Any, **style: Any) -> None:
    error = [own[name] - own[f"{name}_low"], own[f"{name}_high"] - own[name]]
    ax.errorbar(own["tokens"], own[name], yerr=np.array(error, dtype=float), color=color, zorder=3,
                **style)  # fmt: skip


def _panels(
    rows: int, columns: int, width: float, height: float, share: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    with sns.axes_style("whitegrid"):
        figure = plt.figure(figsize=(width * columns, height * rows + 0.8), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=share, sharey=share)
        return figure, list(np.atleast_1d(axes).ravel())


def _tokens_axis(ax: Axes, frame: pd.DataFrame, total: int | None) -> None:
    ax.axhline(100, color="0.4", linewidth=1)
    ax.set_xscale("log")
    ticks = [t for t in (2, 4, 8, 16, 32, 64, 128, 256, 512) if t >= frame["tokens"].min() / 2]
    ticks = [t for t in ticks if t <= (total or 512)]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
