"""CEGI: emission per percent of improvement and per million trainable parameters.

Paper: Kumar et al., arXiv:2412.02602, abstract; its equations and tables could not be read. Written
out from the abstract's words:

    CEGI = E / (G * P)

with E the emission of fine-tuning, G the percentage gain of the task's metric over the base model,
P the trainable parameters in millions. Lower is better. What the abstract leaves open is an option
of `cegi`, and E, G and P always stand beside the index, with E / G, the emission per percent.

The index has a dimension: values can be ranked only within one task, one metric, one grid and one
definition of gain. It rewards trainable parameters (`carbon.ranks`), and it is silent about methods
that train nothing (`carbon.saving`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from torch import nn

from frugalvlm.benchmarks import ALL_BENCHMARKS
from frugalvlm.benchmarks.base import Sheet
from frugalvlm.benchmarks.stats import draws, share
from frugalvlm.carbon.figure import CarbonError, Figure, numbers_of
from frugalvlm.carbon.spent import PARTS, Spent, SpentLike, spent_of
from frugalvlm.measure import GRID_FACTOR_G_PER_KWH
from frugalvlm.runs.records import Record
from frugalvlm.verdicts.scored import question_rows

__all__ = ["Cegi", "Gain", "Scope", "cegi", "lora_parameters", "trainable_parameters"]

Gain: TypeAlias = Literal["relative", "points"]
Scope: TypeAlias = Literal["training", "training+evaluation"]
Unit: TypeAlias = Literal["g", "kg"]
Scores: TypeAlias = float | Sequence[float] | np.ndarray | Sheet | Record
COSTS = ("carbon", "J", "s", "TFLOPs")

NO_GAIN = "There is no gain: the fine-tuned model scores no better than the base model."
NO_PARAMETERS = "Nothing was trained: the index divides by the number of trainable parameters."
NO_BASE = "The base model scores zero, so a relative gain is undefined: ask for gain='points'."


@dataclass(frozen=True, eq=False)
class Cegi:
    """The index with all that it is made of.

    Costs are told in several currencies, by name: "carbon" (in `unit` of CO2e), "J", "s" and
    "TFLOPs"; those that are not known are missing.

    Attributes:
        emission: E by currency, mean over seeds.
        gain: G, in percent of the base score or in points.
        parameters_m: P, in millions.
        index: E / (G P) by currency; undefined where there is no gain or nothing was trained.
        per_percent: E / G by currency.
        rankable: whether the emission may be ranked: its energy was measured, not modelled.
        options: how the open choices were made.
        n_items: pictures (or items) that the scores rest on; 1: no interval from them.
        n_seeds: trainings.
        no_gain: share of bootstrap draws without a gain.
        noise: standard deviation of the gain over its value; this much of the index is noise from
            the gain alone. None without a gain or an interval.
        draws: the index by currency per bootstrap draw, infinite where there is no gain; for
            comparisons of results on the same items. None where nothing was trained.
    """

    emission: Mapping[str, Figure]
    gain: Figure
    parameters_m: float
    index: Mapping[str, Figure]
    per_percent: Mapping[str, Figure]
    rankable: bool
    options: Mapping[str, Any]
    n_items: int
    n_seeds: int
    no_gain: float
    noise: float | None
    draws: Mapping[str, np.ndarray] = field(repr=False)

    @property
    def value(self) -> float | None:
        """The index in mass of CO2e; None where it is undefined or no energy is known."""
        return self.index["carbon"].value if "carbon" in self.index else None

    @property
    def reason(self) -> str:
        """Why the index, or its interval, is not whole; "" if it is."""
        if "carbon" not in self.index:
            return "No energy is known: read the index per second or per FLOP, and do not rank it."
        return self.index["carbon"].reason

    def __str__(self) -> str:
        unit, lines = {"carbon": f"{self.options['unit']} CO2e"}, []
        percent = "%" if self.options["gain"] == "relative" else "point"
        mark = "" if self.rankable else " (modelled: never ranked)"
        for name in self.index:
            of = unit.get(name, name)
            energy = mark if name in ("carbon", "J") else ""
            lines.append(
                f"CEGI {self.index[name]} {of} per {percent} and million parameters{energy}; "
                f"E {self.emission[name]} {of}, E/G {self.per_percent[name]} {of} per {percent}"
            )
        lines.append(
            f"G {self.gain} {percent}, P {self.parameters_m:.4g} million; "
            + (f"{self.n_items} items" if self.n_items > 1 else "no items apart")
            + f", {self.n_seeds} seed{'' if self.n_seeds == 1 else 's'}"
        )
        reasons = dict.fromkeys(f.reason for f in self.index.values() if f.reason)
        return "\n".join([*lines, *reasons])


def cegi(
    base: Scores,
    tuned: Scores | Sequence[Any],
    spent: SpentLike | Sequence[SpentLike],
    trainable_parameters: int | nn.Module,
    *,
    gain: Gain = "relative",
    scope: Scope = "training",
    evaluation: SpentLike | None = None,
    unit: Unit = "g",
    grid_g_per_kwh: float = GRID_FACTOR_G_PER_KWH,
    pue: float = 1.0,
    parts: Sequence[str] = PARTS,
    best: float = 100.0,
    resamples: int = 2000,
    seed: int = 0,
) -> Cegi:
    """The Carbon Efficient Gain Index of a fine-tuned model, with intervals.

    Intervals are 95 % percentile intervals of a bootstrap over items, the same ones for base and
    tuned model, and over seeds, whose scores and energies are drawn together. A draw without a gain
    counts as worse than any with one, so an index whose gain may be nothing has no upper end. With
    one seed the interval leaves the spread between trainings out; with three it is still too
    narrow.

    Args:
        base: the base model's score, higher is better: a number; one score per item; a scored
            sheet; an accuracy record of this kit.
        tuned: the same of the fine-tuned model, on the same items in the same order. Several seeds:
            an array [seeds, items], or a list of sheets or records.
        spent: what fine-tuning took (see `spent_of`): joules, a measured window, a training log, a
            `Spent`; for several seeds a list of as many, or one that stands for all.
        trainable_parameters: their number, or the model as it was trained: what requires gradients
            is counted.
        gain: "relative" is 100 (tuned - base) / base, as "percentage gain" suggests, and flatters
            a weak base; "points" is the difference in points of 100. The paper's is not known.
        scope: what E covers, "training" alone or "training+evaluation". The paper's is not known.
        evaluation: what evaluating the fine-tuned model took, for the second scope.
        unit: of the mass, "g" or "kg". The paper's is not known; its tool reports kg.
        grid_g_per_kwh: grams of CO2e per kWh. One factor for all that is compared.
        pue: power usage effectiveness of the building; the paper's tool takes 1.
        parts: which parts of the machine count: "gpu", "cpu", "ram".
        best: the largest score that the metric can give, where scores are plain numbers (1 for
            shares); decides what a point is.
        resamples: bootstrap draws.
        seed: of the draws.

    Returns:
        The index with E, G, P and E / G beside it. A gain of zero or below, or no trainable
        parameter, makes the index None with a `reason`, neither infinite nor negative.

    Raises:
        CarbonError: an unknown option, scores of different items, no finite numbers.
    """
    _known("gain", gain, get_args(Gain))
    _known("scope", scope, get_args(Scope))
    _known("unit", unit, get_args(Unit))
    for name, number in (("grid_g_per_kwh", grid_g_per_kwh), ("pue", pue), ("best", best)):
        if not numbers_of(number, name) > 0:
            raise CarbonError(f"{name} is a number above 0; got {number!r}.")
    before, top = _sheet(base, best)
    runs = _runs(tuned, best)
    after = [sheet for sheet, _ in runs]
    if any(s.image_ids != before.image_ids for s in after) or any(t != top for _, t in runs):
        raise CarbonError(
            "Base and fine-tuned scores are about different items: give both for the same ones, in "
            "the same order."
        )
    costs = _costs(spent, len(after), parts)
    if scope == "training+evaluation":
        if evaluation is None:
            raise CarbonError("scope='training+evaluation' needs evaluation=, its energy.")
        costs = [cost + spent_of(evaluation, parts) for cost in costs]

    drawn = _drawn_seeds(len(after), resamples, seed)
    value = np.mean([s.headline for s in after])
    scores = np.stack([draws(s, "cegi", resamples, seed) for s in after])
    gains = _gain(
        scores[drawn, np.arange(resamples)[:, None]].mean(1),
        draws(before, "cegi", resamples, seed), gain, top,
    )  # fmt: skip
    g = float(_gain(value, before.headline, gain, top))
    gained = Figure.undefined(NO_BASE) if math.isnan(g) else _figure(g, gains)
    millions = _count(trainable_parameters) / 1e6

    emission, index, per_percent, per_draw = {}, {}, {}, {}
    for name in COSTS:
        currency = unit if name == "carbon" else name
        known = [c.amount(currency, grid_g_per_kwh, pue) for c in costs]
        if any(k is None for k in known):
            continue
        each = np.asarray(known, dtype=np.float64)
        mean, means = float(each.mean()), each[drawn].mean(1)
        emission[name] = _figure(mean, means)
        per_percent[name] = _over_gain(mean, means, g, gains)
        index[name] = (
            Figure.undefined(NO_PARAMETERS) if millions == 0
            else _over_gain(mean / millions, means / millions, g, gains)
        )  # fmt: skip
        if millions:
            per_draw[name] = _divided(means / millions, gains)
    if not emission:
        raise CarbonError(
            "Nothing is known of what the training took: give joules, seconds or FLOPs (`Spent`)."
        )
    spread = float(np.std(gains[np.isfinite(gains)])) if len(before.image_ids) > 1 else 0.0
    return Cegi(
        emission, gained, millions, index, per_percent,
        all(c.rankable for c in costs) and len({c.methods for c in costs}) == 1,
        {"gain": gain, "scope": scope, "unit": unit, "grid_g_per_kwh": grid_g_per_kwh, "pue": pue,
         "parts": tuple(parts)},
        len(before.image_ids), len(after), float(np.mean(~(gains > 0))),
        spread / g if g > 0 and spread else None, per_draw,
    )  # fmt: skip


def trainable_parameters(model: nn.Module) -> int:
    """How many parameters of a model are trained: those that require gradients.

    Packed weights of few bits hold several numbers an element. They take no gradient, so they are
    not among these, and counting them by elements would be wrong anyway.
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora_parameters(model: nn.Module, rank: int, targets: Sequence[str]) -> int:
    """How many parameters LoRA adapters of a rank have: rank (inputs + outputs) per linear layer.

    Args:
        model: with the layers as they are before adapters are put in.
        rank: of both matrices of an adapter.
        targets: last parts of the names of the adapted layers, for example "q_proj".

    Raises:
        CarbonError: no linear layer has such a name.
    """
    found = [
        module for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]  # fmt: skip
    if not found or isinstance(targets, str):
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules()
                        if isinstance(m, nn.Linear)})  # fmt: skip
        raise CarbonError(f"targets is a list of some of {', '.join(names)}; got {targets!r}.")
    return sum(rank * (m.in_features + m.out_features) for m in found)


# -- scores ----------------------------------------------------------------------------------------


def _sheet(scores: Any, best: float) -> tuple[Sheet, float]:
    """Scores of one model as a sheet, and the largest value of its metric."""
    if isinstance(scores, Sheet):
        return scores, scores.headline_max
    if isinstance(scores, Mapping):
        sheet = _record_sheet(dict(scores))
        return sheet, sheet.headline_max
    items = numbers_of(scores, "scores").ravel()
    sums = np.stack([items, np.ones(len(items))], 1)
    return Sheet(tuple(map(str, range(len(items)))), sums, items, share, best), best


def _runs(tuned: Any, best: float) -> list[tuple[Sheet, float]]:
    """One sheet per seed."""
    several = isinstance(tuned, Sequence) and len(tuned) > 0
    if several and isinstance(tuned[0], Sheet | Mapping):
        return [_sheet(one, best) for one in tuned]
    if isinstance(tuned, Sheet | Mapping):
        return [_sheet(tuned, best)]
    numbers = numbers_of(tuned, "scores")
    if numbers.ndim > 2:
        raise CarbonError("Scores of several seeds are an array [seeds, items].")
    return [_sheet(row, best) for row in np.atleast_2d(numbers)]


def _record_sheet(record: Record) -> Sheet:
    """The sheet of an accuracy record about one of the kit's benchmarks."""
    request = record.get("request", {})
    name = request.get("benchmark")
    if record.get("kind") != "accuracy" or name not in ALL_BENCHMARKS:
        raise CarbonError(
            "Only accuracy records about the kit's own benchmarks can be scored here: give scores "
            "per item instead."
        )
    rows, made = question_rows(name, request["split"], request["n"])
    asked = [question for question, _ in record["answers"]]
    if record["provenance"].get("data_hash") not in (None, made) or asked != [
        row["question_id"] for row in rows
    ]:
        raise CarbonError(f"The record answers other questions than {name} asks now: run it again.")
    return ALL_BENCHMARKS[name].sheet(rows, [answer for _, answer in record["answers"]])


# -- numbers ---------------------------------------------------------------------------------------


def _costs(spent: Any, seeds: int, parts: Sequence[str]) -> list[Spent]:
    """What each seed's training took."""
    many = isinstance(spent, Sequence | np.ndarray) and not isinstance(spent, str)
    costs = [spent_of(one, parts) for one in (spent if many else [spent])]
    if len(costs) not in (1, seeds):
        raise CarbonError(
            f"{len(costs)} costs for {seeds} trainings: give one for each, or one for all."
        )
    return costs * seeds if len(costs) == 1 else costs


def _drawn_seeds(seeds: int, resamples: int, seed: int) -> np.ndarray:
    """Which trainings a draw holds, [resamples, seeds]."""
    return np.random.default_rng([seed, 1]).integers(seeds, size=(resamples, seeds))


def _gain(after: Any, before: Any, gain: Gain, top: float) -> np.ndarray:
    """Gain in percent of the base or in points of 100; NaN over a base of zero."""
    whole = np.asarray(before if gain == "relative" else np.full_like(before, top), np.float64)
    out = np.full(np.broadcast(after, whole).shape, np.nan)
    return 100 * np.divide(np.subtract(after, before), whole, out=out, where=whole > 0)


def _divided(top: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Cost over gain per draw; infinite, thus worse than all others, where there is no gain."""
    gained = gains > 0
    return np.divide(top, gains, out=np.full(top.shape, np.inf), where=gained)


def _over_gain(mean: float, means: np.ndarray, g: float, gains: np.ndarray) -> Figure:
    """A cost over the gain, with the interval of its draws."""
    if math.isnan(g) or g <= 0:
        return Figure.undefined(NO_BASE if math.isnan(g) else NO_GAIN)
    return _figure(mean / g, _divided(means, gains))


def _figure(value: float, drawn: np.ndarray) -> Figure:
    """A value and the 2.5th and 97.5th percentile of its draws, the infinite ones counted in."""
    drawn = np.sort(drawn[~np.isnan(drawn)])
    if not len(drawn):
        return Figure(value, None, None, "no draw is defined")
    # Without interpolation, which infinity would spoil: the outer of the two neighbours.
    low = float(drawn[math.floor(0.025 * (len(drawn) - 1))])
    high = float(drawn[math.ceil(0.975 * (len(drawn) - 1))])
    if math.isfinite(high):
        return Figure(value, low, high)
    lost = 100 * float(np.mean(np.isinf(drawn)))
    return Figure(
        value, low if math.isfinite(low) else None, None,
        f"In {lost:.0f} % of the draws there is no gain, so the interval has no upper end.",
    )  # fmt: skip


def _count(trained: int | nn.Module) -> int:
    if isinstance(trained, nn.Module):
        return trainable_parameters(trained)
    number = float(numbers_of(trained, "the number of trainable parameters"))
    if number < 0 or number != int(number):
        raise CarbonError(f"The number of trainable parameters is a whole one; got {trained!r}.")
    return int(number)


def _known(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise CarbonError(f"{name} is one of {', '.join(known)}; got {value!r}.")
