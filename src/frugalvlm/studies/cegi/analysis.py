"""Two sizes of one family, untouched: what they score on two tasks, and what a question costs.

The paper's second conclusion is about sizes and needs no fine-tuning: are the points that a larger
model scores worth what its questions cost more? One record, `sizes`: both models answer the same
questions of a visual question answering and a captioning benchmark. A question's cost is that of
its whole answer, decoding included: FLOPs are counted, seconds are measured in turns, energy is
read from counters or marked as modelled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm import measure
from frugalvlm.benchmarks import Benchmark, load_benchmark, stats
from frugalvlm.benchmarks.asking import Batches, answer, answer_all, prepare
from frugalvlm.digest import request_hash
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.runs import records
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.options import Options
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting, find_run, write_run

TASKS = ("pocket-gqa", "pocket-caption")  # visual question answering, captioning
ASKED = 200  # questions per task, at most
BATCH = 8  # questions that are timed at once
Loaded = tuple[PreTrainedModel, ProcessorMixin]


def run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    options: Options,
    reporter: Reporter,
) -> list[Record]:
    """What the model and a smaller one (`options.guide`) score and cost; one record.

    The record measures time, so where none may be measured there is none.
    """
    if not setting.timed:
        return []
    n = min(setting.n, ASKED)
    request = {
        "scale": setting.scale, "model": setting.model_name, "analysis": "sizes",
        "small": options.guide, "small_weights": model_hash(options.guide), "tasks": list(TASKS),
        "split": setting.split, "n": n, "batch_size": BATCH, "repeats": options.repeats,
        "energy_window_s": options.energy_window_s, "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "device": torch.device(setting.device).type,
    }  # fmt: skip
    code = code_hash("measure", "studies.cegi.analysis")
    found = find_run(setting, "analysis", request, code)
    reporter.start("sizes", 2 * len(TASKS))
    if found is not None:
        reporter.advance(2 * len(TASKS))
        return [found]
    started = time.monotonic()
    small = load_vlm(options.guide, device=setting.device)
    pair: dict[str, Loaded] = {"small": small, "large": (model, processor)}
    tasks = {}
    for name in TASKS:
        task = load_benchmark(name)
        scored = _scores(task, pair, setting, n)
        reporter.advance(1)
        tasks[name] = scored | {"costs": _costs(task, pair, setting.device, options)}
        reporter.advance(1)
    record = {
        "kind": "analysis", "status": "complete", "request": request, "tasks": tasks,
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, (m, _) in pair.items()},
        "provenance": records.provenance(
            code=code, model_hash=setting.model_hash, data_hash=request_hash([n, list(TASKS)]),
            seconds=time.monotonic() - started, device=setting.device,
        ),
    }  # fmt: skip
    write_run(setting, record)
    return [record]


def _scores(task: Benchmark, pair: Mapping[str, Loaded], setting: Setting, n: int) -> dict:
    """Scores of both models on the same questions, and their paired difference in points."""
    sheets = {}
    for size, (model, processor) in pair.items():
        batches = Batches(task, processor, setting.split, n, setting.device)
        answers = answer_all(model, batches, task.max_new_tokens)
        sheets[size] = task.sheet(batches.rows, answers)
    gained = stats.mean_difference({task.id: (sheets["large"], sheets["small"])})
    return {
        "metric": task.metric, "max": task.headline_max,
        "scores": {size: _noted(stats.interval(sheet)) for size, sheet in sheets.items()},
        "points": _noted(gained),
    }  # fmt: skip


def _noted(found: stats.Estimate) -> dict:
    """An estimate as a record can hold it: without NaN."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in found.plain().items()
    }


def _costs(task: Benchmark, pair: Mapping[str, Loaded], device: str, options: Options) -> dict:
    """By size what a question costs, its whole answer included."""
    data = task.dataset("dev", BATCH)
    places = [i % len(data) for i in range(BATCH)]
    images, questions = [data[i]["image"] for i in places], [data[i]["question"] for i in places]
    runs: dict[str, Callable[[], object]] = {}
    for size, (model, processor) in pair.items():
        inputs = prepare(processor, images, questions, device)
        runs[size] = lambda m=model, p=processor, i=inputs: answer(m, p, i, task.max_new_tokens)  # type: ignore[misc]
    flops = {size: measure.count_flops(fn).total / BATCH for size, fn in runs.items()}
    timed = measure.interleaved_latency(runs, repeats=options.repeats, warmup=1, device=device)
    energy = _energy(runs, device, options.energy_window_s)
    return {
        size: {
            "flops": flops[size], "energy": energy[size],
            "seconds": [ms / 1000 / BATCH for ms in timed[size].samples_ms],
        }
        for size in runs
    }  # fmt: skip


def _energy(runs: Mapping[str, Callable[[], object]], device: str, window_s: float) -> dict:
    """Joules per question in each window: by counters, or one modelled window."""
    found = measure.measure_energy(runs, device=device)
    if not all(result.n for result in found.values()):
        with measure.ModelledMeter() as meter:
            found = measure.measure_energy(
                runs, meter=meter, device=device, min_window_s=window_s, repeats=1, warmup=0,
                idle_s=0.0, cooldown_s=0.0,
            )  # fmt: skip
    return {
        size: {
            "joules": [joules / BATCH for joules in result.joules_per_call],
            "rankable": result.rankable, "modelled": result.modelled,
            "methods": dict(result.methods), "reasons": list(result.reasons),
        }
        for size, result in found.items()
    }  # fmt: skip
