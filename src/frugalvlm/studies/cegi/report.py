"""Tables and figures about the index: its options, its paradox, its noise; and two sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Drawing
from torch import nn

from frugalvlm import carbon
from frugalvlm.carbon import Cegi, Figure, Spent
from frugalvlm.formats import NOT_MEASURED
from frugalvlm.pocket.installed import models_dir
from frugalvlm.report.display import Block, Cell, Table, facts_of, setting_lines
from frugalvlm.report.plots import MARKERS, colors_of
from frugalvlm.runs.records import Record

__all__ = [
    "FACTORS", "RANKS", "break_even_table", "grid_table", "made_up", "noise_plot", "options_table",
    "paradox_plot", "paradox_table", "sizes_table",
]  # fmt: skip

RANKS = (4, 8, 16, 32)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
FACTORS = {"clean": 25.0, "the kit's": 475.0, "coal": 800.0}  # round numbers, not countries
MADE_UP = "Made-up numbers, to show how the index behaves; nothing here was measured."
CURRENCIES = {"TFLOPs": "TFLOPs\n(counted)", "s": "s\n(measured)", "g": "g CO2e"}
PER = 1000  # questions


# -- the index -------------------------------------------------------------------------------------


def options_table(base: float, tuned: float, joules: float, parameters: int) -> Table:
    """One fine-tuning under every reading of what the paper leaves open."""
    readings: dict[str, dict[str, Any]] = {
        "as this kit reads it": {},
        "gain in points, not in percent of the base": {"gain": "points"},
        "E in kg": {"unit": "kg"},
        "E with evaluation (as much as a tenth of the training)":
            {"scope": "training+evaluation", "evaluation": joules / 10},
        "a building that takes half as much again (PUE 1.5)": {"pue": 1.5},
        "a clean grid (25 g per kWh)": {"grid_g_per_kwh": 25.0},
    }  # fmt: skip
    found = {
        name: carbon.cegi(base, tuned, joules, parameters, **options)
        for name, options in readings.items()
    }
    rows = tuple(
        (Cell(name), Cell(f"{one.emission['carbon']} {one.options['unit']}"),
         Cell(f"{one.gain} {'%' if one.options['gain'] == 'relative' else 'points'}"),
         Cell(f"{one.parameters_m:.4g}"), Cell(str(one.per_percent["carbon"])),
         Cell(str(one.index["carbon"])))
        for name, one in found.items()
    )  # fmt: skip
    return Table(
        title="One run, several readings of the abstract",
        headers=("reading", "E", "G", "P\nmillion", "E / G", "CEGI"),
        blocks=(Block("", rows),),
        caption=(
            "The abstract gives the index in words. None of these readings is known to be the "
            "paper's, so values of different sources cannot be compared.",
        ),
        data=_frame(found),
    )


def made_up(model: nn.Module, joules: float = 4e5, gain: float = 12.0) -> dict[str, Cegi]:
    """Planted fine-tunings of four LoRA ranks: each doubling costs 3 % more and gains nothing.

    Args:
        model: whose attention would be adapted; only its shapes are used.
        joules: of rank 4.
        gain: in points, on a base of 60.
    """
    return {
        f"rank {rank}": carbon.cegi(
            60.0, 60.0 + gain, Spent(joules * 1.03**i), carbon.lora_parameters(model, rank, TARGETS)
        )
        for i, rank in enumerate(RANKS)
    }


def paradox_table(results: Mapping[str, Cegi]) -> Table:
    """E, G, P, the index and the emission per percent, with the ranks that each gives."""
    index, plain = carbon.ranking(results), carbon.ranking(results, "per_percent")
    rows = tuple(
        (Cell(name), Cell(f"{r.emission['carbon']}"), Cell(f"{r.gain}"),
         Cell(f"{r.parameters_m:.4f}"), Cell(f"{r.per_percent['carbon']}"),
         Cell(f"{plain[name]:.0f}"), Cell(f"{r.index['carbon']}"), Cell(f"{index[name]:.0f}"))
        for name, r in results.items()
    )  # fmt: skip
    return Table(
        title="The paradox: larger adapters look greener",
        headers=("adapter", "E\ng CO2e", "G\n%", "P\nmillion", "E / G\ng per %", "rank\nby E / G",
                 "CEGI", "rank\nby CEGI"),
        blocks=(Block("", rows),),
        caption=(
            MADE_UP + " P alone is real: it is counted on the loaded model. Each doubling of the "
            "rank costs 3 % more energy and gains nothing, so the smallest adapter is the best "
            f"buy. Kendall's tau between the two orders: {carbon.agreement(results):.0f}.",
        ),
        data=_frame(results),
    )  # fmt: skip


def paradox_plot(results: Mapping[str, Cegi]) -> Drawing:
    """The index and the emission per percent over the trainable parameters, both from 1."""
    first, frame = next(iter(results.values())), _frame(results)
    millions = list(frame["parameters_m"])
    lines = {
        name: list(values / values.iloc[0])
        for name, values in {
            "CEGI = E / (G P)": frame["index"],
            "E / G": frame["per_percent"],
            "1 / P, with E and G fixed": carbon.by_parameters(first, millions)["index"],
        }.items()
    }
    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (label, values), marker, color in zip(
        lines.items(), MARKERS, colors_of(list(lines)).values(), strict=False
    ):
        ax.plot(millions, values, marker=marker, color=color, label=label,
                linestyle=":" if "fixed" in label else "-")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="trainable parameters, million",
           ylabel="relative to the smallest adapter")  # fmt: skip
    for axis, ticks in ((ax.xaxis, millions), (ax.yaxis, [0.125, 0.25, 0.5, 1])):
        axis.set_ticks(ticks, [f"{t:.3g}" for t in ticks])
        axis.set_ticks([], minor=True)
    ax.set_title("made-up runs: nothing is saved, and the index falls", fontsize=10, loc="left")
    ax.legend(frameon=False, fontsize=9)
    return figure


def noise_plot(items: Sequence[int] = (25, 50, 100, 200, 400, 800), seed: int = 0) -> Drawing:
    """Intervals of one planted fine-tuning's index over the number of questions it is scored on.

    Each number is a new draw of questions. The base answers 60 % right; fine-tuning mends a quarter
    of the wrong answers and spoils 3 % of the right ones.
    """
    found = [_planted(n, seed) for n in items]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    top = 2.5 * _truth()
    for n, one in zip(items, found, strict=True):
        index = one.index["carbon"]
        low, high = (index.low, index.high) if index.value is not None else (None, None)
        if low is not None:
            left.plot([n, n], [low, top if high is None else high], color="0.3", linewidth=1.6)
            if high is None or high > top:
                left.plot(n, top, marker="^", color="0.3", clip_on=False)
        gained = index.value is not None
        left.plot(n, index.value if gained else top, marker="o" if gained else "x",
                  color="#d55e00", clip_on=gained)  # fmt: skip
    left.axhline(_truth(), color="#0173b2", linestyle="--", linewidth=1, label="true value")
    left.set(xscale="log", ylim=(0, top), xlabel="questions", ylabel="CEGI with 95 % interval")
    left.set_title("a planted run; arrow: the interval goes on; x: no gain, no index", fontsize=9,
                   loc="left")  # fmt: skip
    left.legend(frameon=False, fontsize=9)
    noisy = [(n, 100 * r.noise) for n, r in zip(items, found, strict=True) if r.noise is not None]
    right.plot(*zip(*noisy, strict=True), marker="o", color="#d55e00", label="bootstrap")
    # Var of the difference of paired answers: p(change) - gain^2, over n.
    changed, gain = 0.4 * 0.25 + 0.6 * 0.03, _gain()
    curve = [100 * ((changed - gain**2) / n) ** 0.5 / gain for n in items]
    right.plot(items, curve, color="0.3", linestyle="--", label="s(G) / G, in points")
    right.set(xscale="log", yscale="log", xlabel="questions", ylabel="noise from the gain, %")
    right.set_title("relative error of the index", fontsize=9, loc="left")
    right.legend(frameon=False, fontsize=9)
    for ax in (left, right):
        ax.xaxis.set_ticks(list(items), [str(n) for n in items])
        ax.xaxis.set_ticks([], minor=True)
    right.yaxis.set_ticks([10, 20, 50, 100], ["10", "20", "50", "100"])
    right.yaxis.set_ticks([], minor=True)
    return figure


def grid_table(results: Mapping[str, Cegi]) -> Table:
    """The same runs on grids of several factors: values scale, ranks within a grid stay."""
    frames = {name: carbon.by_grid(result, FACTORS) for name, result in results.items()}
    rows = tuple(
        (Cell(name), *(Cell(f"{v:.3g}") for v in frame["index"])) for name, frame in frames.items()
    )
    return Table(
        title="CEGI of the same runs on other grids",
        headers=("adapter", *(f"{name}\n{factor:g} g/kWh" for name, factor in FACTORS.items())),
        blocks=(Block("", rows),),
        caption=(
            f"{MADE_UP} Down a column the order is the same in every column. Across columns any "
            "order can be had: the dearest run on a clean grid has a lower index than the cheapest "
            "one on coal, although it took more energy.",
        ),
        data=pd.concat([f.assign(adapter=name) for name, f in frames.items()], ignore_index=True),
    )


# -- two sizes -------------------------------------------------------------------------------------


def sizes_table(record: Record) -> Table:
    """Scores and costs of two sizes, and what each further point costs per thousand questions."""
    rows, data = [], []
    names = {"small": record["request"]["small"], "large": record["request"]["model"]}
    for task, own in record["tasks"].items():
        for size, label in names.items():
            score, costs = own["scores"][size], _cost(own["costs"][size])
            cells = [_of(costs[c]) for c in CURRENCIES]
            rows.append((Cell(f"{task}\n{label}"),
                         Cell(f"{_parameters(record, size)}"),
                         Cell(str(_noted(score))), *cells))  # fmt: skip
            data.append({"task": task, "size": size, "score": score["value"],
                         **{c: f and f.value for c, f in costs.items()}})  # fmt: skip
        extra = _marginal(own)
        points = _noted(own["points"])
        rows.append((Cell(f"{task}\neach further point"), Cell(""),
                     Cell(f"large - small:\n{points}"),
                     *(_of(extra[c]) for c in CURRENCIES)))  # fmt: skip
        data.append({"task": task, "size": "per point", "score": points.value,
                     **{c: f and f.value for c, f in extra.items()}})  # fmt: skip
    energy = record["tasks"][next(iter(record["tasks"]))]["costs"]["large"]["energy"]
    return Table(
        title=f"Two sizes, untouched: {PER} questions",
        headers=("task", "parameters\nmillion", "score", *CURRENCIES.values()),
        blocks=(Block("", tuple(rows)),),
        caption=(
            *_setting(record),
            f"n = {record['request']['n']} questions per task, whole answers, batches of "
            f"{record['request']['batch_size']}. Each further point: what {PER} questions cost "
            "more with the large model, over the points that it scores more (paired), by the worst "
            "corners of both intervals.",
            "Grams are compared only where energy was read from counters. "
            + ("Here it is modelled, and not shown." if energy["modelled"] else
               f"Here: {'; '.join(energy['reasons'])}." if energy["reasons"] else ""),
        ),
        data=pd.DataFrame(data),
        facts=facts_of([record], "pocket", record["request"]["n"]),
    )  # fmt: skip


def break_even_table(record: Record) -> Table:
    """From how many questions on the small model, with all that was spent on it, is cheaper."""
    training = training_of(record["request"]["small"])
    rows, data = [], []
    for task, own in record["tasks"].items():
        if training is None or training.seconds is None:
            continue
        each, instead = (
            carbon.figure_of(own["costs"][size]["seconds"]) for size in ("small", "large")
        )
        found = carbon.break_even(training.seconds, each, instead)
        points = _noted(own["points"])
        rows.append((Cell(task), Cell(f"{training.seconds:,.0f}"), Cell(found.numbers),
                     Cell(f"{points}")))  # fmt: skip
        data.append({"task": task, "training_s": training.seconds,
                     "questions": found.questions.value, "low": found.questions.low,
                     "high": found.questions.high, "points": points.value})  # fmt: skip
    missing = () if rows else (f"No training log lies beside {record['request']['small']}.",)
    return Table(
        title="From which question on the small model has paid for its training, in seconds",
        headers=("task", "training of the\nsmall model, s", "cheaper from\nquestion [95 %]",
                 "points given up\n(large - small)"),
        blocks=(Block("", tuple(rows)),),
        caption=(
            *_setting(record), *missing,
            "The training is the whole one, from scratch, as recorded beside the weights, on a "
            "machine that need not be this one. A fine-tuning costs less and pays sooner; the "
            "large model's own training is taken as paid. It answers for time only: no energy was "
            "read in that training.",
        ),
        data=pd.DataFrame(data),
        facts=facts_of([record], "pocket", record["request"]["n"]),
    )  # fmt: skip


def training_of(model: str) -> Spent | None:
    """What the training of an embedded model took, from the log beside its weights."""
    folder = Path(model) if Path(model).is_dir() else models_dir() / model
    path = folder / "training_log.json"
    return carbon.spent_of(json.loads(path.read_text())) if path.is_file() else None


# -- helpers ---------------------------------------------------------------------------------------


def _planted(n: int, seed: int) -> Cegi:
    rng = np.random.default_rng([seed, n])
    base = rng.random(n) < 0.6
    after = np.where(base, rng.random(n) >= 0.03, rng.random(n) < 0.25)
    return carbon.cegi(base.astype(float), after.astype(float), Spent(4e5), 10**6, best=1.0)


def _gain() -> float:
    """The planted gain, as a share of all questions."""
    return 0.4 * 0.25 - 0.6 * 0.03


def _truth() -> float:
    """The planted run's index with endless questions."""
    value = carbon.cegi(0.6, 0.6 + _gain(), Spent(4e5), 10**6, best=1.0).value
    assert value is not None
    return value


def _cost(costs: Mapping[str, Any]) -> dict[str, Figure | None]:
    """By currency what so many questions cost; None where it may not be compared."""
    energy = costs["energy"]
    grams = [Spent(j).amount("g") for j in energy["joules"]] if energy["rankable"] else []
    known: dict[str, Any] = {
        "TFLOPs": [costs["flops"] / 1e12], "s": costs["seconds"], "g": grams,
    }  # fmt: skip
    return {
        name: carbon.product_of(carbon.figure_of(values), PER) if len(values) else None
        for name, values in known.items()
    }


def _marginal(own: Mapping[str, Any]) -> dict[str, Figure | None]:
    small, large = (_cost(own["costs"][size]) for size in ("small", "large"))
    points = _noted(own["points"])
    return {
        name: None if a is None or b is None else carbon.marginal(a, b, points)
        for (name, a), b in zip(small.items(), large.values(), strict=True)
    }


def _noted(estimate: Mapping[str, Any]) -> Figure:
    return Figure(estimate["value"], estimate["low"], estimate["high"], estimate["reason"])


def _of(figure: Figure | None) -> Cell:
    if figure is None:
        return Cell(NOT_MEASURED)
    return Cell("no point more" if figure.value is None else str(figure))


def _parameters(record: Record, size: str) -> str:
    return f"{record['parameters'][size] / 1e6:.1f}"


def _setting(record: Record) -> tuple[str, ...]:
    return setting_lines(facts_of([record], "pocket", record["request"]["n"]))


def _frame(results: Mapping[str, Cegi]) -> pd.DataFrame:
    return pd.DataFrame([
        {"run": name, "emission": r.emission["carbon"].value, "gain": r.gain.value,
         "parameters_m": r.parameters_m, "per_percent": r.per_percent["carbon"].value,
         "index": r.value}
        for name, r in results.items()
    ])  # fmt: skip
