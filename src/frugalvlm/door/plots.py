"""The figure of a comparison: accuracy against tokens, counted FLOPs or measured time."""

from __future__ import annotations

from textwrap import fill
from typing import Any

from matplotlib.axes import Axes

from frugalvlm.door.request import BASELINE, RequestError
from frugalvlm.door.rows import Compared
from frugalvlm.report.plots import MARKERS, colors_of, new_axes

AXES = {
    "tokens": ("tokens_mean", "visual tokens, mean over decoder layers"),
    "flops": ("flops_share", "prefill FLOPs, % of the untouched model's (counted)"),
    "time": ("prefill_ms", "prefill of a batch, ms (measured)"),
}


def accuracy_plot(
    result: Compared, kind: str, benchmark: str | None, value: str, ax: Axes | None
) -> Axes:
    """See `ComparisonResult.plot`."""
    if kind not in AXES or value not in ("retention", "score"):
        raise RequestError(
            f"No plot of {value!r} against {kind!r}: kind is one of {', '.join(AXES)}, value is "
            "retention or score."
        )
    frame, (column, axis) = result.frame, AXES[kind]
    known = list(dict.fromkeys(frame["benchmark"]))
    usual = "mean" if "mean" in known and value == "retention" else known[0]
    name = benchmark or usual
    if name not in known:
        raise RequestError(f"No benchmark '{name}' in this comparison: {', '.join(known)}.")
    rows = frame[(frame["benchmark"] == name) & frame[value].notna()]
    if not rows[column].notna().any():
        raise RequestError("Costs were not measured: compare with costs=True.")
    ax = ax or new_axes((7.2, 4.4))
    others = rows[rows["method"] != BASELINE]
    lines = _lines(others)
    colors = colors_of(list(lines))
    for i, (label, own) in enumerate(lines.items()):
        own = own.sort_values(column)
        error = [own[value] - own[f"{value}_low"], own[f"{value}_high"] - own[value]]
        style: dict[str, Any] = {"color": colors[label], "marker": MARKERS[i % len(MARKERS)]}
        # A little apart, or points at the same place would hide each other.
        x = own[column] * (1 + 0.014 * (i - (len(lines) - 1) / 2))
        ax.errorbar(x, own[value], yerr=error, label=fill(label, 30), capsize=3, **style)
    whole = rows[rows["method"] == BASELINE].iloc[0]
    ax.plot(whole[column], whole[value], marker="*", markersize=13, color="0.2", linestyle="none",
            label="untouched")  # fmt: skip
    ax.axhline(whole[value], color="0.4", linewidth=1, linestyle=":")
    ax.set_xlabel(axis)
    if value == "retention":
        mean = "\n(mean over benchmarks)" if name == "mean" else ""
        ax.set_ylabel(f"score retained, % of untouched model{mean}")
    else:
        ax.set_ylabel(str(rows.iloc[0].get("metric", "score")))
    ax.set_title(
        f"{result.table.facts['model']}, {name}, n = {int(rows['n'].max())}; bars: 95 % interval",
        fontsize=10, loc="left",
    )  # fmt: skip
    ax.legend(fontsize=8, frameon=True, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def _lines(rows: Any) -> dict[str, Any]:
    """Rows by line: classes at several budgets share one, an object with its own values has one."""
    return {str(label): own for label, own in rows.groupby("label", sort=False)}
