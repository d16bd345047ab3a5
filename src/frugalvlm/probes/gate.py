"""May a small model stand in for LLaVA-1.5? Six conditions, measured on development questions.

What papers about visual tokens find depends on where a decoder reads its picture and on how much
of the picture its questions need. A model that has read everything in its first layer rewards
late cuts, whatever is cut. So a model is let in by what it does with pictures, never by the
order in which methods come out:

1. it answers well with the picture, and every benchmark needs the picture;
2. early layers have not read it: without it behind a quarter of the depth little is left;
3. late layers are done with it: without it behind three quarters nothing is lost;
4. FastV's ranking, at FastV's own depth, is worth more than a random one behind the same layer;
5. where a question is about what stands out, [CLS] attention finds about what an oracle finds;
6. with ever fewer random tokens answers get worse step by step, not all at once.

Shares are shares of the *visual gain*: (score - blank) / (untouched - blank), means over the
benchmarks. Intervals are bootstrap intervals over pictures, all runs paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import Benchmark, stats
from frugalvlm.benchmarks.asking import Batches, answer
from frugalvlm.benchmarks.base import EvalSplit, Sheet, mean_sheet
from frugalvlm.engine.tower_once import tower_once
from frugalvlm.hosts import host_for
from frugalvlm.methods import FasterVLM, FastV, Method, NoImageAfter, Random, Vanilla
from frugalvlm.probes.controls import RandomCut, blanked, oracle_for

SALIENT = "salient"  # categories that begin so ask about what stands out
UNTOUCHED, GAP = 85.0, 20.0  # percent; points over the blank picture
EARLY, LATE = 0.25, 0.75  # of the depth
EARLY_SHARE, LATE_SHARE = 100 / 3, 95.0  # percent of the visual gain
CUT = 2 / 32  # of the depth: FastV's K = 2 in LLaVA-1.5
NINTH = 1 / 9  # of the visual tokens: 64 of 576
ORACLE_GAP = 10.0  # points
RANDOM_SHARES = (3 / 4, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18)  # of the visual tokens
STEP, RISE = 50.0, 3.0  # percent of the visual gain lost in one step; points gained in one


@dataclass(frozen=True)
class Condition:
    """One measured condition of the gate."""

    key: str
    says: str
    value: float
    low: float
    high: float
    bound: float
    at_least: bool = True  # else: at most

    @property
    def passed(self) -> bool:
        """Whether the measured value keeps the bound."""
        return self._keeps(self.value)

    @property
    def certain(self) -> bool:
        """Whether the whole interval says so."""
        return self._keeps(self.low) == self._keeps(self.high) == self.passed

    def _keeps(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Gate:
    """What the gate found.

    Attributes:
        split: the questions' split.
        n: questions per benchmark that were asked for.
        conditions: the six, the first and the last in two halves.
        curve: share of the visual gain, in percent, by the last layer that sees the picture.
        scores: mean score in percent, by run and benchmark.
        salient: share of the questions that are about what stands out; None: nobody labelled
            them, and condition 5 is about all questions.
    """

    split: str
    n: int
    conditions: tuple[Condition, ...]
    curve: dict[int, float]
    scores: dict[str, dict[str, float]]
    salient: float | None = None

    @property
    def passed(self) -> bool:
        """Whether all conditions are kept."""
        return all(c.passed for c in self.conditions)

    def frame(self) -> pd.DataFrame:
        """One row per condition: what it says, value, interval, bound, verdict."""
        rows = [
            {
                **asdict(c),
                "bound": f"{'at least' if c.at_least else 'at most'} {c.bound:.1f}",
                "passed": c.passed,
                "certain": c.certain,
            }
            for c in self.conditions
        ]
        return pd.DataFrame(rows).drop(columns="at_least").set_index("key").round(1)

    def record(self) -> dict[str, Any]:
        """Everything as plain values, for a card or a JSON file."""
        conditions = [{**asdict(c), "passed": c.passed, "certain": c.certain}
                      for c in self.conditions]  # fmt: skip
        return {**asdict(self), "conditions": conditions, "passed": self.passed}


def gate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    benchmarks: Mapping[str, Benchmark],
    n: int = 150,
    *,
    split: EvalSplit = "dev",
    device: str = "cpu",
    every_layer: bool = False,
) -> Gate:
    """Measure the six conditions.

    Args:
        model: any model that the kit's methods run on.
        processor: of the model.
        benchmarks: what to ask, by name.
        n: questions per benchmark.
        split: "dev"; the gate is part of the development of a model.
        device: "cpu" or "cuda".
        every_layer: measure the curve behind every layer, not behind the two of the conditions.
    """
    shape = host_for(model).shape
    places = Places(shape.decoder_layers, shape.patches)
    plan = _plan(places, every_layer)
    found: Runs = {name: {} for name in (*plan, "blank", "oracle")}
    for name, benchmark in benchmarks.items():
        batches = Batches(benchmark, processor, split, n, device)
        ask = _asker(model, benchmark, batches)
        with tower_once(model):
            for key, method in plan.items():
                found[key][name] = ask(batches, _always(method))
            found["blank"][name] = ask(blanked(batches), _always(Vanilla()))
            oracle = oracle_for(batches, split, shape.grid, places.ninth, benchmark.make)
            found["oracle"][name] = ask(batches, oracle)
    return judge(found, places, split, n)


@dataclass(frozen=True)
class Places:
    """Where the conditions look in a model of a depth and a number of visual tokens."""

    depth: int  # decoder layers
    patches: int  # visual tokens

    @property
    def early(self) -> int:
        """The last layer that sees the picture in condition 2."""
        return max(1, round(self.depth * EARLY))

    @property
    def late(self) -> int:
        """The same in condition 3."""
        return max(1, round(self.depth * LATE))

    @property
    def cut(self) -> int:
        """FastV's K."""
        return max(1, round(self.depth * CUT))

    @property
    def ninth(self) -> int:
        """The budget of conditions 4 and 5, visual tokens."""
        return round(self.patches * NINTH)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Visual tokens that random dropping leaves, step by step."""
        return tuple(round(self.patches * share) for share in RANDOM_SHARES)


def _plan(places: Places, every_layer: bool) -> dict[str, Method]:
    """All runs but those that need other pictures or the scenes."""
    behind = range(1, places.depth) if every_layer else (places.early, places.late)
    return {
        "untouched": Vanilla(),
        **{none_behind(k): NoImageAfter(k) for k in behind},
        "fastv": FastV(places.ninth, places.cut),
        "random cut": RandomCut(places.ninth, places.cut),
        "cls": FasterVLM(places.ninth),
        **{random_of(b): Random(b) for b in places.budgets},
    }


def none_behind(layer: int) -> str:
    """Name of the run whose picture is gone behind a layer."""
    return f"none behind {layer}"


def random_of(budget: int) -> str:
    """Name of the run that keeps so many random tokens."""
    return f"random {budget}"


def judge(found: Runs, places: Places, split: str, n: int) -> Gate:
    """The conditions from scored runs.

    Args:
        found: by run and benchmark; the runs "untouched", "blank", "oracle", "cls", "fastv",
            "random cut" and those of `none_behind` and `random_of`.
        places: where the conditions look.
        split: of the questions.
        n: questions per benchmark that were asked for.
    """
    runs = {key: _Run({b: s.sheet() for b, s in by.items()}) for key, by in found.items()}
    share = float(np.concatenate([s.salient for s in found["untouched"].values()]).mean())
    main = {
        key: _Run({b: sheet for b, s in found[key].items() if (sheet := s.sheet(share > 0))})
        for key in ("oracle", "cls")
    }
    layers = [k for k in range(1, places.depth) if none_behind(k) in runs]
    gains = {k: _gain(runs[none_behind(k)], runs) for k in layers}
    lasts = f"of {places.depth}, %"
    conditions = (
        *_seeing(runs),
        _condition("early", f"visual gain without the picture behind layer {places.early} {lasts}",
                   gains[places.early], EARLY_SHARE, at_least=False),
        _condition("late", f"visual gain without the picture behind layer {places.late} {lasts}",
                   gains[places.late], LATE_SHARE),
        _condition("ranking", f"FastV minus random tokens, both {places.ninth} behind layer "
                   f"{places.cut}, points", runs["fastv"].draws - runs["random cut"].draws, 0.0),
        _condition("salience", f"oracle minus [CLS] attention, {places.ninth} tokens, salient "
                   "questions, points", main["oracle"].draws - main["cls"].draws, ORACLE_GAP,
                   at_least=False),
        *_smooth(runs, places.budgets),
    )  # fmt: skip
    return Gate(
        split, n, conditions,
        {0: 0.0, **{k: round(float(g[0]), 1) for k, g in gains.items()}, places.depth: 100.0},
        {key: {b: round(s.accuracy, 1) for b, s in run.sheets.items()}
         for key, run in runs.items()},
        share if share > 0 else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """A run on one benchmark: its rows, the score of each, which ones are salient."""

    rows: Sequence[Mapping[str, Any]]
    correct: np.ndarray
    salient: np.ndarray

    def sheet(self, salient_only: bool = False) -> Sheet | None:
        """Mean scores of all questions, or of the salient ones; None where there are none."""
        every = range(len(self.rows))
        kept = [i for i in every if self.salient[i]] if salient_only else list(every)
        if not kept:
            return None
        return mean_sheet([self.rows[i] for i in kept], [float(self.correct[i]) for i in kept])


Runs = dict[str, dict[str, Scored]]


class _Run:
    """A run on all benchmarks. `draws` begins with the value: [1 + resamples], percent."""

    def __init__(self, sheets: Mapping[str, Sheet | None]) -> None:
        self.sheets = {name: sheet for name, sheet in sheets.items() if sheet is not None}
        each = [self.of(name) for name in self.sheets]
        self.draws = np.mean(each, axis=0)

    def of(self, name: str) -> np.ndarray:
        sheet = self.sheets[name]
        return np.concatenate([[sheet.accuracy], stats.draws(sheet, name)])


Ask = Callable[[Batches, Callable[[Sequence[str]], Method]], Scored]


def _asker(model: PreTrainedModel, benchmark: Benchmark, batches: Batches) -> Ask:
    """Answers all questions of a benchmark with a method (of the ids of a batch), and scores."""
    salient = np.array([row["category"].startswith(SALIENT) for row in batches.rows])

    def ask(shown: Batches, method_for: Callable[[Sequence[str]], Method]) -> Scored:
        said: dict[str, str | None] = {}
        for ids, inputs in shown.batches:
            with method_for(ids).on(model):
                answers = answer(model, shown.processor, inputs, benchmark.max_new_tokens)
            said.update(zip(ids, answers, strict=True))
        sheet = benchmark.sheet(batches.rows, [said[i] for i in batches.ids])
        return Scored(batches.rows, sheet.correct, salient)

    return ask


def _always(method: Method) -> Callable[[Sequence[str]], Method]:
    return lambda ids: method


def _gain(run: _Run, runs: Mapping[str, _Run]) -> np.ndarray:
    """Share of the visual gain that a run keeps, in percent; value and draws."""
    blank, untouched = runs["blank"].draws, runs["untouched"].draws
    whole = untouched - blank
    out = np.full_like(whole, np.nan)
    return np.divide(100 * (run.draws - blank), whole, out=out, where=whole > 0)


def _condition(
    key: str, says: str, figures: np.ndarray, bound: float, at_least: bool = True
) -> Condition:
    low, high = np.nanquantile(figures[1:], [0.025, 0.975])
    return Condition(key, says, float(figures[0]), float(low), float(high), bound, at_least)


def _seeing(runs: Mapping[str, _Run]) -> tuple[Condition, Condition]:
    seen, blank = runs["untouched"], runs["blank"]
    gaps = {name: seen.of(name) - blank.of(name) for name in seen.sheets}
    least = min(gaps, key=lambda name: gaps[name][0])
    return (
        _condition("untouched", "mean score of the untouched model, %", seen.draws, UNTOUCHED),
        _condition("gap", f"smallest gain over the blank picture ({least}), points", gaps[least],
                   GAP),
    )  # fmt: skip


def _smooth(runs: Mapping[str, _Run], budgets: Sequence[int]) -> tuple[Condition, Condition]:
    """The largest loss in one step of random dropping, and the largest rise."""
    names = ["untouched", *map(random_of, budgets)]
    gains = [_gain(runs[name], runs) for name in names]
    points = [runs[name].draws for name in names]
    losses = [before - after for before, after in pairwise(gains)]
    rises = [after - before for before, after in pairwise(points)]
    worst, up = (max(steps, key=lambda step: step[0]) for steps in (losses, rises))
    budget = "/".join(str(b) for b in budgets)
    return (
        _condition("smooth", f"largest loss in one step of random dropping to {budget}, % of the "
                   "visual gain", worst, STEP, at_least=False),
        _condition("falling", "largest rise in one step of random dropping, points", up, RISE,
                   at_least=False),
    )  # fmt: skip
