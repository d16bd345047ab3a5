"""Right and wrong answers of a method on a benchmark; each run leaves one record.

Answers are appended to a log as they come, so a run that was killed continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import Benchmark, asking, load_benchmark, stats
from frugalvlm.benchmarks.asking import Batches
from frugalvlm.benchmarks.official import Official
from frugalvlm.benchmarks.official.asking import Streamed
from frugalvlm.engine.tower_once import tower_once
from frugalvlm.hosts import host_for
from frugalvlm.methods import Method
from frugalvlm.runs import records
from frugalvlm.runs.identity import code_of
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting, find_run, run_name, write_run
from frugalvlm.trace import Trace


def answer_cells(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    benchmarks: Sequence[str],
    plan: Sequence[tuple[Method, int]],
    reporter: Reporter,
) -> list[Record]:
    """Run, or find, the accuracy of every cell.

    Args:
        setting: what all runs of the table share.
        model: the untouched model.
        processor: of the model.
        benchmarks: ids, the columns.
        plan: methods and budgets, the rows.
        reporter: told of progress.

    Returns:
        The records, column by column.
    """
    made = []
    for name in benchmarks:
        batches = _batches(name, processor, setting.split, setting.n, setting.device)
        made += [
            accuracy_run(setting, model, load_benchmark(name), batches, method, budget, reporter)
            for method, budget in plan
        ]
    return made


@lru_cache(maxsize=8)
def _batches(benchmark: str, processor: ProcessorMixin, split: str, n: int, device: str) -> Batches:
    """A benchmark's questions, prepared once for all papers."""
    return Batches(load_benchmark(benchmark), processor, split, n, device)


def accuracy_run(
    setting: Setting,
    model: PreTrainedModel,
    benchmark: Benchmark | Official,
    batches: Batches | Streamed,
    method: Method,
    budget: int,
    reporter: Reporter,
    method_for: Callable[[list[str]], Method] | None = None,
) -> dict[str, Any]:
    """Answer a benchmark's questions with a method; returns the record.

    Args:
        setting: what all runs of the table share.
        model: the untouched model.
        benchmark: whose questions.
        batches: these questions, prepared once for all methods.
        method: the method.
        budget: visual tokens per crop that were asked for.
        reporter: told of every answered question.
        method_for: `method` for a batch of question ids, where it must know them (an oracle).
    """
    request = _request(setting, model, benchmark, batches, method, budget)
    code = code_of(method, host_for(model), *batches.code)
    found = find_run(setting, "accuracy", request, code, batches.data_hash)
    reporter.start(f"{benchmark.id}: {method.key} {budget}", len(batches.rows))
    if found is not None:
        reporter.advance(len(batches.rows))
        return found
    file = setting.folder / f"{run_name(setting, request, code)}.answers.jsonl"
    with records.AnswerLog(file, request, code, setting.model_hash) as log:
        if setting.force:
            log.clear()
        started = time.monotonic()
        choose = method_for or (lambda ids: method)
        done, kept = _ask(log, model, benchmark, batches, choose, method.adaptive, reporter)
        tokens = {"requested": budget, **kept.summary()}
        answers = [done[i] for i in batches.ids]
        sheet = benchmark.sheet(batches.rows, answers)
        headline = stats.interval(sheet)
        record = {
            "kind": "accuracy",
            "status": "complete",
            "request": request,
            "counts": {
                "asked": len(answers),
                "answered": sum(a is not None for a in answers),
                "failed": sum(a is None for a in answers),
            },
            "tokens": tokens,
            "metrics": {
                "headline": {
                    "name": benchmark.metric,
                    "value": headline.value,
                    "low": headline.low,
                    "high": headline.high,
                    "max": benchmark.headline_max,
                    "n": headline.n_questions,
                    "images": headline.n_images,
                },
                "accuracy": {"value": sheet.accuracy},
                "details": sheet.details,
            },
            "answers": [[i, a] for i, a in zip(batches.ids, answers, strict=True)],
            "provenance": records.provenance(
                code=code,
                model_hash=setting.model_hash,
                data_hash=batches.data_hash,
                seconds=time.monotonic() - started,
                device=setting.device,
            ),
        }
        write_run(setting, record)
        log.clear()
    return record


def recorded(
    setting: Setting,
    model: PreTrainedModel,
    benchmark: Benchmark | Official,
    batches: Batches | Streamed,
    method: Method,
    budget: int,
) -> int:
    """How many of a run's answers are there already; arguments as for `accuracy_run`."""
    request = _request(setting, model, benchmark, batches, method, budget)
    code = code_of(method, host_for(model), *batches.code)
    if find_run(setting, "accuracy", request, code, batches.data_hash) is not None:
        return len(batches.rows)
    file = setting.folder / f"{run_name(setting, request, code)}.answers.jsonl"
    return len(records.AnswerLog(file, request, code, setting.model_hash).read())


def _request(
    setting: Setting,
    model: PreTrainedModel,
    benchmark: Benchmark | Official,
    batches: Batches | Streamed,
    method: Method,
    budget: int,
) -> dict[str, Any]:
    """What a run is asked for, as its record says."""
    return {
        "scale": setting.scale,
        "model": setting.model_name,
        "method": method.describe(),
        "budget": budget,
        "benchmark": benchmark.id,
        "split": setting.split,
        "n": setting.n,
        "max_new_tokens": benchmark.max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "device": torch.device(setting.device).type,
        "batch_size": batches.size,
        **batches.request,
    }


def _ask(
    log: records.AnswerLog,
    model: PreTrainedModel,
    benchmark: Benchmark | Official,
    batches: Batches | Streamed,
    method_for: Callable[[list[str]], Method],
    adaptive: bool,
    reporter: Reporter,
) -> tuple[dict[str, str | None], _KeptTokens]:
    """The answers by question id, those of a log included, and the visual tokens that were kept."""
    done, kept = log.read(), _KeptTokens()
    reporter.advance(len(done))
    with tower_once(model, batches.kept(model)):
        for ids, inputs in batches.pending(done):
            with method_for(ids).on(model) as trace:
                answers = asking.answer(model, batches.processor, inputs, benchmark.max_new_tokens)
            log.append(zip(ids, answers, strict=True))
            done.update(zip(ids, answers, strict=True))
            kept.add(trace, len(ids), _visual_tokens(model, inputs))
            reporter.advance(len(ids))
        # What an interrupted run kept is not in its log. An adaptive method must see every picture
        # again for that; of any other, one batch says it.
        for ids, inputs in batches.batches:
            if kept.prompts >= (len(batches.ids) if adaptive else 1):
                break
            with method_for(ids).on(model) as trace, torch.inference_mode():
                model(**inputs)
            kept.add(trace, len(ids), _visual_tokens(model, inputs))
    return done, kept


class _KeptTokens:
    """Visual tokens per decoder layer over the batches of a run."""

    def __init__(self) -> None:
        self.prompts = 0
        self.sums: list[float] = []
        self.spread: list[tuple[int, int]] = []
        self.layers = 0
        self.untouched = 0

    def add(self, trace: Trace, prompts: int, visual: int) -> None:
        """Count a batch in, whose prompts hold so many visual tokens if nothing touches them."""
        self.untouched += visual
        if not self.prompts:
            self.layers, self.sums = trace.decoder_layers, [0.0] * len(trace.tokens_per_layer)
            self.spread = list(trace.spread)
        self.prompts += prompts
        self.sums = [
            s + prompts * t for s, t in zip(self.sums, trace.tokens_per_layer, strict=True)
        ]
        self.spread = [
            (min(a, c), max(b, d)) for (a, b), (c, d) in zip(self.spread, trace.spread, strict=True)
        ]

    def summary(self) -> dict[str, Any]:
        """Mean per layer, and the fewest and most that one image kept there.

        Of the untouched model, which traces nothing, what it reads: of tiles and clips more than
        what was asked for per crop.
        """
        mean = [s / self.prompts for s in self.sums]
        return {
            "per_layer": mean or [self.untouched / self.prompts] * self.layers,
            "spread": [list(s) for s in self.spread],
        }


def _visual_tokens(model: PreTrainedModel, inputs: dict[str, Any]) -> int:
    return int(host_for(model).placeholders(inputs["input_ids"]).sum())
