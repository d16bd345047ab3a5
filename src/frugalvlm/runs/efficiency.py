"""What methods cost, measured side by side: FLOPs, cache, time, memory and energy; one record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm import measure
from frugalvlm.benchmarks import Benchmark
from frugalvlm.benchmarks.asking import prepare
from frugalvlm.benchmarks.pocket_gqa import POCKET_GQA
from frugalvlm.digest import request_hash
from frugalvlm.methods import Method
from frugalvlm.runs import records
from frugalvlm.runs.costs import prefill_costs
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.setting import Reporter, Setting, find_run, write_run


def efficiency_run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    methods: Sequence[tuple[Method, int]],
    reporter: Reporter,
    *,
    batch: int = 8,
    repeats: int = 9,
    decode_steps: int = 8,
    energy_window_s: float = 1.0,
    benchmark: Benchmark = POCKET_GQA,
) -> dict[str, Any]:
    """Measure cost of several methods side by side; returns the record.

    FLOPs and KV bytes are counted for one prompt; latency and peak memory are measured for a batch,
    the methods taking turns. Vanilla must come first: it is the reference of every ratio.

    Args:
        setting: what all runs of the table share.
        model: the untouched model.
        processor: of the model.
        methods: with their budgets, the untouched model first.
        reporter: told of progress.
        batch: prompts that are timed at once.
        repeats: rounds of the latency measurement.
        decode_steps: decoding passes of a round.
        energy_window_s: length of a modelled energy window, per method.
        benchmark: whose first questions of the dev split are the prompts.
    """
    names = [f"{i}-{m.key}-{b}" for i, (m, b) in enumerate(methods)]
    request = {
        "scale": setting.scale, "model": setting.model_name, "batch_size": batch,
        "methods": [{**m.describe(), "budget": b} for m, b in methods],
        "repeats": repeats, "decode_steps": decode_steps, "energy_window_s": energy_window_s,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "device": torch.device(setting.device).type, "threads": torch.get_num_threads(),
    }  # fmt: skip
    if benchmark is not POCKET_GQA:
        request["questions_of"] = benchmark.id
    code = code_hash("measure", "runs.costs", "runs.efficiency", *(m for m, _ in methods))
    found = find_run(setting, "efficiency", request, code)
    reporter.start("efficiency", len(methods) + 2)
    if found is not None:
        reporter.advance(len(methods) + 2)
        return found
    started = time.monotonic()
    data = benchmark.dataset("dev", batch)
    shown = "frames" if "frames" in data.column_names else "image"
    places = [i % len(data) for i in range(batch)]  # a small set of one's own may hold fewer
    images, questions = [data[i][shown] for i in places], [data[i]["question"] for i in places]
    one = prepare(processor, images[:1], questions[:1], setting.device)
    many = prepare(processor, images, questions, setting.device)
    rows = []
    for method, budget in methods:
        rows.append(_counted(model, method, budget, one, many, setting.device))
        reporter.advance(1)
    arms = {
        name: measure.Arm(model, many, lambda m=method: m.on(model))  # type: ignore[misc]
        for name, (method, _) in zip(names, methods, strict=True)
    }
    timed = measure.prefill_decode_ms(
        arms, decode_steps=decode_steps, repeats=repeats, device=setting.device
    )
    reporter.advance(1)
    energy = _energy(model, methods, names, many, setting.device, energy_window_s)
    reporter.advance(1)
    reference = timed[names[0]].prefill
    for row, name in zip(rows, names, strict=True):
        speedup = measure.ratio(reference, timed[name].prefill)
        row["prefill_ms"] = _percentiles(timed[name].prefill)
        row["decode_ms"] = _percentiles(timed[name].decode)
        row["prefill_speedup"] = {
            "median": speedup.median, "low": speedup.low, "high": speedup.high, "n": speedup.n,
        }  # fmt: skip
        row["energy"] = energy[name]
    record = {
        "kind": "efficiency", "status": "complete", "request": request, "rows": rows,
        "provenance": records.provenance(
            code=code, model_hash=setting.model_hash,
            data_hash=request_hash(data["question"]),
            seconds=time.monotonic() - started, device=setting.device,
        ),
    }  # fmt: skip
    write_run(setting, record)
    return record


def _percentiles(latency: measure.Latency) -> dict[str, float]:
    return {"p50": latency.p50_ms, "p95": latency.p95_ms, "n": latency.n}


@torch.inference_mode()
def _counted(
    model: PreTrainedModel, method: Method, budget: int, one: dict, many: dict, device: str
) -> dict[str, Any]:
    """What does not depend on the clock: tokens, FLOPs by part, KV bytes, peak memory."""

    with method.on(model) as trace:
        costs = prefill_costs(model, one, trace, budget)
        peak = measure.peak_memory_bytes(
            lambda: model(**many, use_cache=True, logits_to_keep=1), device
        )
    return {
        "method": method.key,
        "budget": budget,
        **costs,
        "peak_mib": peak.mib,
        "peak_method": peak.method,
    }


def _energy(
    model: PreTrainedModel, methods: Sequence[tuple[Method, int]], names: list[str], inputs: dict,
    device: str, window_s: float,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Joules per question: by hardware counters where there are any, else marked as modelled."""
    batch = len(inputs["input_ids"])

    def prefill(method: Method) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode(), method.on(model):
                return model(**inputs, logits_to_keep=1)

        return run

    runs = {name: prefill(method) for name, (method, _) in zip(names, methods, strict=True)}
    measured = measure.measure_energy(runs, device=device, min_window_s=max(10.0, window_s))
    if all(result.n for result in measured.values()):
        return {name: _measured_energy(result, batch) for name, result in measured.items()}
    reasons = next(iter(measured.values())).reasons
    return _modelled_energy(runs, batch, window_s, list(reasons))


def _measured_energy(result: measure.EnergyResult, batch: int) -> dict[str, Any]:
    """Hardware counters, repeated windows."""
    each = None if result.mean_joules is None else result.mean_joules / batch
    return {
        "joules_per_question": each,
        "sd": None if result.sd_joules is None else result.sd_joules / batch,
        "modelled": result.modelled,
        "reliable": result.reliable,
        "methods": dict(result.methods),
        "reasons": list(result.reasons),
        "window_s": result.window_s,
        "carbon_g_per_1000": None if each is None else measure.carbon_g(each) * 1000,
    }


def _modelled_energy(
    runs: dict[str, Callable[[], object]], batch: int, window_s: float, reasons: list[str]
) -> dict[str, dict[str, Any]]:
    """codecarbon's load model over one window per method; never ranked."""
    results = {}
    for name, run in runs.items():
        calls, started = 0, time.monotonic()
        with measure.ModelledMeter() as meter, meter.window(name) as window:
            while calls == 0 or time.monotonic() - started < window_s:
                run()
                calls += 1
        energy = window.energy
        joules = None if energy is None else energy.total_joules
        each = None if joules is None else joules / (calls * batch)
        results[name] = {
            "joules_per_question": each,
            "modelled": True,
            "reliable": False,
            "methods": {} if energy is None else dict(energy.methods),
            "reasons": reasons,
            "window_s": time.monotonic() - started,
            "carbon_g_per_1000": None if each is None else measure.carbon_g(each) * 1000,
        }
    return results
