"""G-Search beyond its main table: do layers rank tokens alike, and which keep rates are found.

- ranking (Figure 1a, 1b): Kendall's tau of the visual-token rankings of every two decoder layers.
- search: G-Search (Scenario I) and P-Sigmoid (Scenario II), on questions of the dev split alone.
- accuracy records, on the test split, of what was found, and of rivals at G-Search's mean.

What the paper optimises with is not known. Ours: the share of calibration questions that are
answered as the untouched model answers them. G-Search may lose `TOLERATED` of it and looks for the
smallest rate by bisection, as the share is taken to fall with the rate; deeper layers get the rate
that is tried. P-Sigmoid maximises it over k at a fixed mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import optuna
import pandas as pd
import torch
from scipy.stats import kendalltau
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import load_benchmark
from frugalvlm.benchmarks.asking import BATCH_SIZE, Batches, answer_all, chunks, prepare
from frugalvlm.digest import request_hash
from frugalvlm.engine.tower_once import tower_once
from frugalvlm.hosts import host_for
from frugalvlm.methods import Method, method_class
from frugalvlm.methods.base import RUNTIME, LooksBehind
from frugalvlm.methods.gsearch import (
    FULL,
    GSearch,
    GSearchBayes,
    GSearchGreedy,
    printed_k,
    text_attention,
)
from frugalvlm.methods.schedules import at_mean
from frugalvlm.papers import Paper, load_paper
from frugalvlm.runs import records
from frugalvlm.runs.accuracy import answer_cells
from frugalvlm.runs.analysis import analysis_run
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.options import Options
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting
from frugalvlm.studies.base import Study
from frugalvlm.verdicts.scored import Scored
from frugalvlm.views import BudgetError, Kept, LayerView

CALIBRATION = 24  # dev questions per benchmark; 144 over the six of the table
TOLERATED = 0.01  # share of calibration answers that may change
STEP = 1 / 32  # of a keep rate
TRIALS = 16  # of the Bayesian optimisation, per budget
K_RANGE = (0.05, 2.0)  # k in 32 layers; scaled to other depths, as the paper's are
IMAGES = 100  # prompts whose rankings are compared, at most
RIVALS = ("random", "fastv", "pyramiddrop", "gsearch")
DEPTHS = {"InternVL2-1B": 24, "InternVL2-2B": 24, "InternVL2-4B": 32, "InternVL2-8B": 32}


def run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    options: Options,
    reporter: Reporter,
) -> list[Record]:
    """All records of these analyses, measured or found."""
    layout = load_paper("gsearch").table("table3")
    names = options.benchmarks or tuple(column.id for column in layout.columns)
    patches = host_for(model).shape.patches
    kept = [layout.model.kept(budget, patches) for budget in layout.budgets]
    budgets = [budget for budget in kept if budget is not None][: options.budgets]
    ranking = ranking_run(setting, model, processor, reporter, min(IMAGES, setting.n))
    search = search_run(setting, model, processor, names, budgets, reporter)
    plan = found_plan(search, model)
    return [ranking, search, *answer_cells(setting, model, processor, names, plan, reporter)]


# -- searches --------------------------------------------------------------------------------------


def g_search(
    effect: Callable[[tuple[float, ...]], float],
    decoder_layers: int,
    tolerated: float = TOLERATED,
    step: float = STEP,
) -> tuple[float, ...]:
    """Scenario I: from shallow to deep, each layer's smallest keep rate that does no harm.

    While a layer is searched, deeper ones have its rate: rates do not grow with depth.

    Args:
        effect: of a list of keep rates, one per layer; larger is better.
        decoder_layers: how many.
        tolerated: how much less than that of the untouched model the effect may be.
        step: rates are multiples of it.

    Returns:
        The rates; their effect is at least that of all ones less `tolerated`.
    """
    rates: list[float] = [1.0] * min(FULL, decoder_layers)
    least = effect((1.0,) * decoder_layers) - tolerated
    rate = round(1 / step)
    for layer in range(len(rates), decoder_layers):
        harmful = 0  # no token at all
        while rate - harmful > 1:
            middle = (rate + harmful) // 2
            tried = (*rates, *[middle * step] * (decoder_layers - layer))
            harmful, rate = (harmful, middle) if effect(tried) >= least else (middle, rate)
        rates.append(rate * step)
    return tuple(rates)


def search_p_sigmoid(
    effect: Callable[[float], float],
    decoder_layers: int,
    first: float,
    trials: int = TRIALS,
    seed: int = 0,
) -> tuple[float, list[tuple[float, float]]]:
    """Scenario II: the steepness k with the largest effect, by Bayesian optimisation (TPE).

    Args:
        effect: of a k, at a mean keep rate that does not change.
        decoder_layers: to whose depth K_RANGE is scaled.
        first: the k that is tried first: the paper's.
        trials: how often the effect is asked for.
        seed: of the sampler.

    Returns:
        The best k, of equals the first; and every k tried with its effect, in order.
    """
    low, high = (k * 32 / decoder_layers for k in K_RANGE)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed)
        )
        study.enqueue_trial({"k": first})
        study.optimize(
            lambda trial: effect(trial.suggest_float("k", low, high, log=True)), n_trials=trials
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
    tried = [(float(t.params["k"]), float(t.value)) for t in study.trials if t.value is not None]
    return max(tried, key=lambda pair: pair[1])[0], tried


class Calibration:
    """Questions of the dev split, and what the untouched model answers to them."""

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, names: Sequence[str], device: str
    ) -> None:
        benchmarks = [load_benchmark(name) for name in names]
        self._model = model
        self._asked = [
            (Batches(b, processor, "dev", CALIBRATION, device), b.max_new_tokens)
            for b in benchmarks
        ]
        self.data_hash = request_hash([batches.data_hash for batches, _ in self._asked])
        self._untouched = self._answers(None)

    def agreement(self, method: Method) -> float:
        """Share of the questions that are answered as without the method."""
        pairs = zip(self._answers(method), self._untouched, strict=True)
        return float(np.mean([own == untouched for own, untouched in pairs]))

    def _answers(self, method: Method | None) -> list[str | None]:
        with nullcontext() if method is None else method.on(self._model):
            return [a for asked in self._asked for a in answer_all(self._model, *asked)]


def search_run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    names: Sequence[str],
    budgets: Sequence[int],
    reporter: Reporter,
) -> Record:
    """Both searches; a record.

    `rates` and their `mean` are G-Search's, `k` holds P-Sigmoid's by budget, each with
    `agreement`; `tried` lists all that was asked for.
    """
    shape = host_for(model).shape
    layers, patches = shape.decoder_layers, shape.patches
    more = {
        "from_split": "dev", "benchmarks": list(names), "questions": CALIBRATION,
        "tolerated": TOLERATED, "step": STEP, "trials": TRIALS, "budgets": list(budgets),
    }  # fmt: skip

    def measured() -> dict[str, Any]:
        calibration = Calibration(model, processor, names, setting.device)
        tried: list[tuple[tuple[float, ...], float]] = []

        def effect(rates: tuple[float, ...]) -> float:
            tried.append((rates, calibration.agreement(GSearchGreedy(rates=rates))))
            return tried[-1][1]

        rates = g_search(effect, layers, TOLERATED, STEP)
        counts = GSearchGreedy(rates=rates).counts(patches, layers)
        reporter.advance(1)
        found = {}
        for budget in budgets:
            kept = GSearchBayes.for_mean(budget, patches, layers).kept_tokens
            assert kept is not None
            k, asked = search_p_sigmoid(
                lambda k, kept=kept: calibration.agreement(GSearchBayes(kept, k)),  # type: ignore[misc]
                layers, printed_k(kept / patches, layers), TRIALS,
            )  # fmt: skip
            found[str(budget)] = {
                "k": k, "agreement": max(value for _, value in asked), "tried": asked,
                "rates": [n / patches for n in GSearchBayes(kept, k).counts(patches, layers)],
                "default_rates": [n / patches for n in GSearch(kept).counts(patches, layers)],
            }  # fmt: skip
            reporter.advance(1)
        return {
            "rates": rates, "mean": sum(counts) / layers, "tried": tried,
            "agreement": dict(tried)[rates], "k": found, "data_hash": calibration.data_hash,
        }  # fmt: skip

    reporter.start("G-Search and P-Sigmoid on the dev split", 1 + len(budgets))
    with tower_once(model):  # the same pictures a hundred times
        return _analysis(setting, model, "search", more, measured, reporter, 1 + len(budgets))


def costed_plan(made: Sequence[Record], model: PreTrainedModel) -> list[tuple[Method, int]]:
    """Whose costs are measured beside those of the table: what was found, and its rivals."""
    return found_plan(analysis(made, "search"), model)


def found_plan(search: Record, model: PreTrainedModel) -> list[tuple[Method, int]]:
    """What was found, and at G-Search's mean the rivals that can keep so few, with budgets."""
    shape, rates = host_for(model).shape, tuple(search["rates"])
    mean = round(search["mean"])
    plan: list[tuple[Method, int]] = [(GSearchGreedy(rates=rates), mean)]
    for key in RIVALS:
        try:
            rival = at_mean(method_class(key), mean, shape.patches, shape.decoder_layers)
        except BudgetError:
            continue
        plan.append((rival, mean))
    for budget, found in search["k"].items():
        own = GSearchBayes.for_mean(int(budget), shape.patches, shape.decoder_layers)
        plan.append((GSearchBayes(own.kept_tokens, found["k"]), int(budget)))
    return plan


# -- rankings --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watch(LooksBehind):
    """Keeps everything and notes the score by which G-Search would rank, of every layer."""

    key: ClassVar[str] = "gsearch_watch"
    scores: dict[int, Tensor] = field(default_factory=dict, compare=False, metadata=RUNTIME)

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        return cls()

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        return tuple(range(1, decoder_layers))

    def keep(self, view: LayerView) -> Kept:
        assert self.behind is not None
        if view.layer == 1:
            self.scores[0] = text_attention(view)
        self.scores[view.layer] = text_attention(self.behind(view))
        every = torch.arange(view.visual.shape[1], device=view.visual.device)
        return Kept(every.expand(len(view.counts), -1), view.counts)


def kendall(scores: np.ndarray) -> np.ndarray:
    """Kendall's tau [layers, layers] of the rankings by scores [layers, tokens]."""
    layers = len(scores)
    tau = np.eye(layers)
    for a in range(layers):
        for b in range(a):
            tau[a, b] = tau[b, a] = kendalltau(scores[a], scores[b]).statistic
    return tau


@torch.inference_mode()
def ranking_run(
    setting: Setting, model: PreTrainedModel, processor: ProcessorMixin, reporter: Reporter,
    images: int,
) -> Record:  # fmt: skip
    """Rankings of the untouched model, one pocket-gqa question per picture; a record.

    `neighbours` [prompts, layers - 1] is tau of each layer and the next, `tau` [layers, layers] the
    mean over prompts.
    """

    def measured() -> dict[str, Any]:
        benchmark = load_benchmark("pocket-gqa")
        data = benchmark.dataset(setting.split, images * benchmark.per_image)  # type: ignore[arg-type]
        rows = range(0, len(data), benchmark.per_image)
        taus = []
        for part in chunks(rows, BATCH_SIZE):
            pictures, asked = ([data[i][name] for i in part] for name in ("image", "question"))
            watch = _Watch()
            with watch.on(model):
                model(**prepare(processor, pictures, asked, setting.device), logits_to_keep=1)
            scores = torch.stack([watch.scores[i] for i in range(len(watch.scores))], 1)
            taus += [kendall(own) for own in scores.float().cpu().numpy()]
            reporter.advance(len(part))
        each = np.array(taus)
        return {
            "neighbours": np.diagonal(each, offset=1, axis1=1, axis2=2).round(5).tolist(),
            "tau": each.mean(0).round(5).tolist(),
            "data_hash": request_hash([data[i]["question_id"] for i in rows]),
        }

    reporter.start("rankings of the decoder's layers", images)
    more = {"from_split": setting.split, "images": images}
    return _analysis(setting, model, "ranking", more, measured, reporter, images)


def _analysis(
    setting: Setting, model: PreTrainedModel, name: str, more: Mapping[str, Any],
    measured: Callable[[], dict[str, Any]], reporter: Reporter, steps: int,
) -> Record:  # fmt: skip
    """The record of an analysis, found or made; what it measured has its own `data_hash`."""
    request = {
        "scale": setting.scale, "model": setting.model_name, "n": setting.n, "analysis": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "device": torch.device(setting.device).type, **more,
    }  # fmt: skip
    code = code_hash("methods.gsearch", "studies.gsearch")
    return analysis_run(setting, request, code, measured, reporter, steps)


# -- shown -----------------------------------------------------------------------------------------


def analysis(made: Sequence[Record], name: str) -> Record:
    """The newest record of one of these analyses."""
    return records.latest(records.select(made, "analysis", analysis=name))[-1]


def paper_rates(paper: Paper) -> dict[str, tuple[list[float], list[float]]]:
    """Keep rates that the paper found: by model, depth (0 to 1) and rate. Read off its figures."""
    shown = {}
    for model, layers in {"LLaVA-1.5-7B": 32, **DEPTHS}.items():
        where, shift = ("Figure 1c", 0) if model not in DEPTHS else ("Figure 3", 1)
        rows = paper.figures
        rows = rows[
            (rows["table"] == where) & (rows["model"] == model) & (rows["metric"] == "keep rate")
        ]
        at = [int(s.split()[-1]) + shift for s in rows["setting"]]
        first = min(at)  # all layers before it are full
        depth = [*range(first), *at] if where == "Figure 1c" else at
        rates = [*[1.0] * (len(depth) - len(at)), *rows["value"]]
        shown[model] = ([(i + 0.5) / layers for i in depth], rates)
    return shown


def found_frame(made: Sequence[Record]) -> pd.DataFrame:
    """Retention of what was found, and of the others at the same mean; one row each.

    Returns:
        `budget` and `tokens` (visual tokens per crop, mean over layers: asked for, and actual),
        `method`, `retention` in percent with `low` and `high`, mean over benchmarks, and `n`.
    """
    search, scored = analysis(made, "search"), Scored(made)
    runs = {(int(b), key) for b in search["k"] for key in (*RIVALS, GSearchBayes.key)}
    runs |= {(round(search["mean"]), key) for key in (*RIVALS, GSearchGreedy.key)}
    lines = []
    for budget, key in sorted(runs, key=lambda run: (-run[0], run[1])):
        found = scored.retention(key, budget, search["request"]["benchmarks"])
        tokens = scored.tokens(key, budget)
        if found is None or tokens is None:
            continue
        lines.append({
            "budget": budget, "method": key, "tokens": tokens[0], "retention": found.value,
            "low": found.low, "high": found.high, "n": found.n_questions,
        })  # fmt: skip
    return pd.DataFrame(lines)


STUDY = Study("gsearch", analysis=run, more_costs=costed_plan)
