"""What methods save and what it costs in points; when a training would have paid for itself."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from frugalvlm import carbon, measure
from frugalvlm.carbon import Figure, Spent
from frugalvlm.formats import between, plus_minus
from frugalvlm.paths import data_dir
from frugalvlm.report.comparison import FRONT, Comparison
from frugalvlm.report.comparison_runs import Run, method_of
from frugalvlm.report.cost_tables import rankable
from frugalvlm.report.display import Block, Cell, Table

__all__ = ["learnt_costs", "payback_table", "saving_table"]

PER = 1000  # questions
NOT_COMPARED = "not compared"
ROW = ("method", "budget", "tokens")  # of a frame, what names a run
QUANTITIES = {"s": "s", "TFLOPs": "TFLOPs", "g": "g CO2e"}


def saving_table(
    comparison: Comparison, grid: float = measure.GRID_FACTOR_G_PER_KWH,
    budgets: Collection[int] = (),
) -> Table:  # fmt: skip
    """Points that each run loses for what it saves: per TFLOP, second and gram, never sorted by it.

    Args:
        comparison: of recorded runs.
        grid: grams of CO2e per kWh.
        budgets: visual tokens asked for; none: all.
    """
    data = [
        _saving(run, comparison, grid) for run in comparison.whole
        if run.cost is not None and (not budgets or run.budget in budgets)
    ]  # fmt: skip
    blocks = []
    for budget in dict.fromkeys(d["budget"] for d in data):
        rows = tuple(_saving_row(d) for d in data if d["budget"] == budget)
        blocks.append(Block(f"{budget} of {comparison.total} visual tokens asked for", rows))
    return Table(
        title="Points lost for what is saved, by methods that train nothing",
        headers=("method", "tokens\nasked/mean", "points lost", "TFLOPs saved\n(counted)",
                 "lost per\nTFLOP", "s saved [95 %]\n(measured)", "lost per s",
                 "g CO2e saved", "lost per g"),
        blocks=tuple(blocks),
        caption=(
            *comparison.caption(),
            f"Saved: in a prefill of {PER} questions, against the untouched model of the same "
            "record. Points: of the mean score retained (100: the untouched model), with half of "
            "their 95 % interval; lost per unit: its interval takes the worst corners of both "
            "intervals, so it is never too narrow. \"-\" in place of an end: the saving may be "
            "nothing, so there is no end.",
            f"Grams: {grid:g} g CO2e per kWh. They are compared only where the energy of both was "
            "read from counters, in the same way; a modelled joule is time in disguise.",
            "Losing little for each unit says nothing of how much is saved: a method that saves "
            "next to nothing may stand best in these columns.",
        ),
        data=pd.DataFrame([_flat(d) for d in data]),
        facts=comparison.setting,
    )  # fmt: skip


def payback_table(
    comparison: Comparison, assumed_s: float = 3600.0, trained: Mapping[str, Spent] | None = None
) -> Table:
    """After how many questions a training has paid for itself, in time and in FLOPs.

    Rows are the methods that were trained, and the runs on the front of FLOPs.

    Args:
        comparison: of recorded runs.
        assumed_s: seconds of training that a method is given of which no training is recorded.
        trained: by method what its recorded training took; default: what lies with the installed
            weights (`learnt_costs`).
    """
    known = learnt_costs(str(comparison.setting["model"])) if trained is None else trained
    data, front = [], comparison.front()
    best = set(zip(*(front.loc[front["state"] == FRONT, c] for c in ROW), strict=True))
    for run in comparison.whole:
        paid = known.get(run.key)
        if run.cost is None or (paid is None and (run.key, run.budget, run.tokens) not in best):
            continue
        own, untouched = _times(run)
        seconds = assumed_s if paid is None or paid.seconds is None else paid.seconds
        back = carbon.break_even(seconds, own, untouched)
        counted = None
        if paid is not None and paid.flops is not None:
            counted = carbon.break_even(
                paid.flops, float(run.cost["flops"]), float(run.cost["untouched"]["flops"])
            )
        rival, against = _free_rival(run, comparison, known, seconds)
        data.append({
            "method": run.key, "label": run.label, "budget": run.budget, "tokens": run.tokens,
            "training_s": seconds, "recorded": paid is not None, "saved_s": back.saved,
            "questions": back, "questions_by_flops": counted, "rival": rival, "against": against,
        })  # fmt: skip
    blocks = [
        Block(title, tuple(_payback_row(d) for d in data if d["recorded"] == recorded))
        for recorded, title in (
            (True, "training recorded"),
            (
                False,
                f"on the front of FLOPs, free of training: as if one of {assumed_s:,.0f} s had "
                "been needed",
            ),
        )
        if any(d["recorded"] == recorded for d in data)
    ]
    return Table(
        title="How many questions pay for a training",
        headers=("method", "tokens\nasked/mean", "training s", "ms saved per\nquestion [95 %]",
                 "pays from question\n(against untouched)", "pays from question\n(by FLOPs)",
                 "pays from question\n(against a free method)"),
        blocks=tuple(blocks),
        caption=(
            *comparison.caption()[:1],
            "N = training / (a question's cost without it - with it): prefill times on this "
            "machine, interval by the worst corners. \"no end\": the saving may be nothing. Time "
            "of a training on another machine counts as if it were this one's.",
            "Free method: of the training-free runs at the same budget the fastest one. A training "
            "that is never paid for against it may still be worth its points.",
            *([] if any(d["recorded"] for d in data) else
              ["No method here has a recorded training, so all rows answer the question: if what "
               "this method saves had cost a training, when would it be paid?"]),
        ),
        data=pd.DataFrame([_flat(d) for d in data]),
        facts=comparison.setting,
    )  # fmt: skip


def learnt_costs(model: str, folder: Path | None = None) -> dict[str, Spent]:
    """By method what its training on a model took, from the log beside its installed weights.

    Args:
        model: that the method was trained on.
        folder: of all methods' weights; default: the installed ones.
    """
    place = data_dir() / "methods" if folder is None else folder
    logs = {path.parents[1].name: path for path in sorted(place.glob("*/*/training_log.json"))
            if path.parent.name == model}  # fmt: skip
    return {key: carbon.spent_of(json.loads(path.read_text())) for key, path in logs.items()}


# -- numbers ---------------------------------------------------------------------------------------


def _saving(run: Run, comparison: Comparison, grid: float) -> dict[str, Any]:
    """Points lost, and per currency what is saved and what a unit of it costs in points."""
    cost, found = run.cost, run.retention(comparison.benchmarks)
    assert cost is not None
    assert found is not None
    lost = Figure(100 - found.value, 100 - found.high, 100 - found.low, found.reason)
    untouched = cost["untouched"]
    costs = {
        "TFLOPs": tuple(Figure.exact(PER * c["flops"] / 1e12) for c in (cost, untouched)),
        "s": tuple(_times(run, PER)),
    }
    energies = cost["energy"], untouched["energy"]
    if all(rankable(e) for e in energies) and method_of(energies[0]) == method_of(energies[1]):
        costs["g"] = tuple(_grams(e, grid) for e in energies)
    line: dict[str, Any] = {"method": run.key, "label": run.label, "budget": run.budget,
                            "tokens": run.tokens, "lost": lost}  # fmt: skip
    for name in QUANTITIES:
        own, whole = costs.get(name, (None, None))
        line |= {f"saved_{name}": None, f"lost_per_{name}": None}
        if own is not None and whole is not None:
            line[f"saved_{name}"] = carbon.difference(whole, own)
            line[f"lost_per_{name}"] = carbon.lost_per_saved(lost, own, whole)
    return line


def _times(run: Run, questions: int = 1) -> tuple[Figure, Figure]:
    """Prefill seconds of so many questions with the method and without, paired by rounds.

    The untouched model's time is taken as it is; the spread is in the speed-up.
    """
    assert run.cost is not None
    speed, untouched = run.cost["prefill_speedup"], run.cost["untouched"]
    whole = questions * untouched["prefill_ms"]["p50"] / 1000 / run.cost["batch_size"]
    low, high = speed["low"], speed["high"]
    own = Figure(
        whole / speed["median"], None if high is None else whole / high,
        None if low is None else whole / low,
    )  # fmt: skip
    return own, Figure.exact(whole)


def _grams(energy: Mapping[str, Any], grid: float) -> Figure:
    """Grams of so many questions; two standard errors of the windows on each side."""
    mean, windows = energy["joules_per_question"], len(energy.get("window_s") or [1])
    half = 1.96 * (energy.get("sd") or 0.0) / windows**0.5
    value, low, high = (
        PER * measure.carbon_g(j, grid) for j in (mean, max(0.0, mean - half), mean + half)
    )
    return Figure(value, low, high)


def _free_rival(
    run: Run, comparison: Comparison, known: Mapping[str, Spent], seconds: float
) -> tuple[str, carbon.BreakEven | None]:
    """Of the training-free runs at the same budget the fastest, and when the training beats it."""
    if run.key not in known:
        return "", None
    free = [
        other for other in comparison.whole
        if other.cost is not None and other.budget == run.budget and other.key not in known
    ]  # fmt: skip
    if not free:
        return "", None
    best = max(free, key=lambda other: other.cost["prefill_speedup"]["median"])  # type: ignore[index]
    # Each was timed against its own untouched rounds: the speed-ups are carried to this one's.
    assert best.cost is not None
    assert run.cost is not None
    speed, whole = best.cost["prefill_speedup"], _times(run)[1].value
    assert whole is not None
    other = Figure(whole / speed["median"], whole / speed["high"], whole / speed["low"])
    return best.label, carbon.break_even(seconds, _times(run)[0], other)


# -- cells -----------------------------------------------------------------------------------------


def _saving_row(d: Mapping[str, Any]) -> tuple[Cell, ...]:
    lost: Figure = d["lost"]
    cells = []
    for name in ("TFLOPs", "s", "g"):
        saved, each = d[f"saved_{name}"], d[f"lost_per_{name}"]
        cells += [_cell(saved), _cell(each)]
    assert lost.value is not None
    return (
        Cell(d["label"]), Cell(f"{d['budget']}/{d['tokens']:.4g}"),
        Cell(plus_minus(lost.value, lost.low, lost.high, 1)), *cells,
    )  # fmt: skip


def _cell(figure: Figure | None) -> Cell:
    if figure is None:
        return Cell(NOT_COMPARED)
    if figure.value is None:
        return Cell("saves nothing")
    if figure.low is not None and figure.low == figure.high:
        return Cell(f"{figure.value:.3g}")
    if figure.low is None or figure.high is None:
        ends = ("-" if v is None else f"{v:.3g}" for v in (figure.low, figure.high))
        return Cell(f"{figure.value:.3g} [{', '.join(ends)}]")
    digits = 1 if abs(figure.value) >= 10 else 2
    return Cell(f"{figure.value:.{digits}f} {between(figure.low, figure.high, digits)}")


def _payback_row(d: Mapping[str, Any]) -> tuple[Cell, ...]:
    saved = d["saved_s"]
    against = d["against"]
    return (
        Cell(d["label"]), Cell(f"{d['budget']}/{d['tokens']:.4g}"), Cell(f"{d['training_s']:,.0f}"),
        _cell(carbon.product_of(saved, 1000)), _questions(d["questions"]),
        _questions(d["questions_by_flops"]),
        Cell("") if against is None else Cell(f"{_questions(against).short}\n({d['rival']})"),
    )  # fmt: skip


def _questions(found: carbon.BreakEven | None) -> Cell:
    if found is None:
        return Cell("")
    return Cell(found.numbers)


def _flat(d: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as three columns."""
    flat: dict[str, Any] = {}
    for name, value in d.items():
        figure = value.questions if isinstance(value, carbon.BreakEven) else value
        if isinstance(figure, Figure):
            flat |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        else:
            flat[name] = value
    return flat
