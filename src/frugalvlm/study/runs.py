"""Running methods on benchmarks and measuring them; each run leaves one record.

Answers are appended to a log as they come, so a run that was killed continues where it stopped.
A complete record of the same request, made by the same code on the same machine, is used again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm import measure
from frugalvlm.benchmarks import Benchmark, load_benchmark, prompt
from frugalvlm.benchmarks.base import without_pictures
from frugalvlm.hosts import host_for
from frugalvlm.methods import Method, method_class
from frugalvlm.study import records, stats
from frugalvlm.study.costs import prefill_costs
from frugalvlm.study.tower_once import tower_once
from frugalvlm.trace import Trace
from frugalvlm.views import UnsupportedError

BATCH_SIZE = 32
CODE_ALWAYS = (
    "surgery.py", "subset.py", "guidance.py", "lookahead.py", "views.py", "trace.py", "loading.py",
    "hosts", "methods/base.py", "methods/schedules.py", "benchmarks", "pocket/scenes.py",
    "pocket/questions.py", "pocket/clips.py", "study/runs.py", "study/tower_once.py",
)  # fmt: skip


class Reporter(Protocol):
    """Told of progress: a rich progress bar, a notebook's, or nothing."""

    def start(self, description: str, total: int) -> None:
        """A run of `total` questions or rounds begins."""

    def advance(self, steps: int) -> None:
        """So many are done."""


class Silent:
    """A reporter that shows nothing."""

    def start(self, description: str, total: int) -> None:
        """Ignored."""

    def advance(self, steps: int) -> None:
        """Ignored."""


@dataclass(frozen=True)
class Setting:
    """What all runs of one table share.

    Attributes:
        scale: "pocket" or "full".
        model_name: what `load_vlm` was given.
        model_hash: identifies the weights.
        folder: where records go (`results/SCALE/KEY/records`).
        split: "dev" to choose anything with, "test" to report.
        n: questions per benchmark.
        device: where the model is.
        force: run again although a complete record exists.
        since: with `force`, records made from this moment on count all the same.
        others: folders of records that other tables left; one of the same request, code, weights,
            questions and machine is copied and not made a second time.
        timed: whether times may be measured now. Without it, what measures any is left out.
    """

    scale: str
    model_name: str
    model_hash: str
    folder: Path
    split: str = "test"
    n: int = 200
    device: str = "cpu"
    force: bool = False
    since: datetime | None = None
    others: tuple[Path, ...] = ()
    timed: bool = True


def budgeted(key: str, budget: int | None, total: int) -> Method:
    """A method at a budget; None keeps everything."""
    cls = method_class(key)
    return cls.for_budget(total if budget is None else budget, total)


def accuracy_run(
    setting: Setting,
    model: PreTrainedModel,
    benchmark: Benchmark,
    batches: Batches,
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
    request = {
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
        "batch_size": BATCH_SIZE,
    }
    code = code_of(method)
    found = find_run(setting, "accuracy", request, code, batches.data_hash)
    reporter.start(f"{benchmark.id}: {method.key} {budget}", len(batches.rows))
    if found is not None:
        reporter.advance(len(batches.rows))
        return found
    log = records.AnswerLog(
        setting.folder / f"{_name(setting, request, code)}.answers.jsonl",
        request, code, setting.model_hash,
    )  # fmt: skip
    if setting.force:
        log.clear()
    done = log.read()
    reporter.advance(len(done))
    started = time.monotonic()
    method_for = method_for or (lambda ids: method)
    kept = _KeptTokens()
    with tower_once(model, batches.towers.setdefault(model, {})):
        for ids, inputs in batches.pending(done):
            with method_for(ids).on(model) as trace:
                answers = _answer(model, batches.processor, inputs, benchmark.max_new_tokens)
            log.append(zip(ids, answers, strict=True))
            done.update(zip(ids, answers, strict=True))
            kept.add(trace, len(ids))
            reporter.advance(len(ids))
        # What an interrupted run kept is not in its log. An adaptive method must see every picture
        # again for that; of any other, one batch says it.
        for ids, inputs in batches.batches:
            if kept.prompts >= (len(batches.ids) if method.adaptive else 1):
                break
            with method_for(ids).on(model) as trace, torch.inference_mode():
                model(**inputs)
            kept.add(trace, len(ids))
    tokens = {"requested": budget, **kept.summary(budget)}
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


class _KeptTokens:
    """Visual tokens per decoder layer over the batches of a run."""

    def __init__(self) -> None:
        self.prompts = 0
        self.sums: list[float] = []
        self.spread: list[tuple[int, int]] = []
        self.layers = 0

    def add(self, trace: Trace, prompts: int) -> None:
        """Count a batch in."""
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

    def summary(self, budget: int) -> dict[str, Any]:
        """Mean per layer, and the fewest and most that one image kept there."""
        mean = [s / self.prompts for s in self.sums]
        return {
            "per_layer": mean or [float(budget)] * self.layers,
            "spread": [list(s) for s in self.spread],
        }


class Batches:
    """A benchmark's questions, tokenised and padded once, the same for every method.

    `towers` holds what each model's vision tower made of the pictures (see `tower_once`).

    Raises:
        UnsupportedError: the questions are about clips, and the processor takes none.
    """

    def __init__(
        self, benchmark: Benchmark, processor: ProcessorMixin, split: str, n: int, device: str
    ) -> None:
        self.processor, self.device = processor, device
        self._data: Dataset = benchmark.dataset(split, n)  # type: ignore[arg-type]
        self._shown = "frames" if "frames" in self._data.column_names else "image"
        _check_shown(processor, self._shown == "frames")
        self.rows: list[dict[str, Any]] = list(without_pictures(self._data))
        self.ids: list[str] = [row["question_id"] for row in self.rows]
        self.data_hash = records.request_hash(self.rows)
        self.towers: WeakKeyDictionary[PreTrainedModel, dict[bytes, Tensor]] = WeakKeyDictionary()

    @cached_property
    def batches(self) -> list[tuple[list[str], dict[str, Any]]]:
        """Question ids and model inputs; prepared when the first answer is missing."""
        # Questions of similar length share a batch, so little is spent on padding.
        order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]["question"]))
        return [
            (
                [self.ids[i] for i in part],
                prepare(self.processor, [self._data[i][self._shown] for i in part],
                        [self.rows[i]["question"] for i in part], self.device),
            )
            for part in chunks(order, BATCH_SIZE)
        ]  # fmt: skip

    def pending(self, done: dict[str, str | None]) -> Iterable[tuple[list[str], dict]]:
        """Batches with a question that is not answered yet."""
        return [b for b in self.batches if any(i not in done for i in b[0])]


def chunks(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """`order` cut into pieces of `size`; the last one may be shorter."""
    return [order[i : i + size] for i in range(0, len(order), size)]


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention, which returns its maps, in tower and decoder."""
    host = host_for(model)
    before = {
        "vision_config": host.tower.config._attn_implementation,
        "text_config": host.language_model.config._attn_implementation,
    }
    model.set_attn_implementation(dict.fromkeys(before, "eager"))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _check_shown(processor: ProcessorMixin, clips: bool) -> None:
    if clips and getattr(processor, "video_processor", None) is None:
        raise UnsupportedError(
            f"{type(processor).__name__} takes no videos: ask about clips with a model that does, "
            "such as one of the LLaVA-OneVision family."
        )


def prepare(
    processor: ProcessorMixin, images: list, questions: list[str], device: str
) -> dict[str, Any]:
    """Model inputs for questions about pictures, or about clips: lists of frames.

    One prompt per question, padded to the longest, on `device`.
    """
    clips = bool(images) and isinstance(images[0], list)
    texts = [prompt(q, "<video>" if clips else "<image>") for q in questions]
    shown = {"videos" if clips else "images": images}
    inputs = processor(**shown, text=texts, return_tensors="pt", padding=True)
    return dict(inputs.to(device))


@torch.inference_mode()
def _answer(
    model: PreTrainedModel, processor: ProcessorMixin, inputs: dict, max_new_tokens: int
) -> list[str | None]:
    """Greedy answers of a batch."""
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]


def answer_all(
    model: PreTrainedModel, batches: Batches, max_new_tokens: int, blank: bool = False
) -> list[str | None]:
    """Answers of the untouched model to all questions, in order; `blank` hides the pictures."""
    done: dict[str, str | None] = {}
    for ids, inputs in batches.batches:
        if blank:
            inputs = {
                name: torch.zeros_like(value) if name.startswith("pixel_values") else value
                for name, value in inputs.items()
            }
        done.update(
            zip(ids, _answer(model, batches.processor, inputs, max_new_tokens), strict=True)
        )
    return [done[i] for i in batches.ids]


def code_of(method: Method) -> str:
    """Hash of the source that decides this method's answers."""
    return code_hash(type(method).__module__.removeprefix("frugalvlm.").replace(".", "/") + ".py")


def code_of_kit() -> str:
    """Hash of all source that decides a cost."""
    return code_hash("methods", "measure", "study/costs.py")


def code_hash(*more: str) -> str:
    """Hash of what decides every answer, and of more source files or folders of the package."""
    root = Path(__file__).resolve().parents[1]
    return records.code_hash(root / p for p in (*CODE_ALWAYS, *more))


def _name(setting: Setting, request: dict[str, Any], code: str) -> str:
    """File name of a run; other weights or another machine give another name."""
    machine = measure.machine_id(setting.device)
    return records.record_name(request, f"{code}-{setting.model_hash}", machine)


def find_run(
    setting: Setting, kind: str, request: dict[str, Any], code: str, data_hash: str | None = None
) -> dict[str, Any] | None:
    """The record of a run that need not be made: this table's own, or a copy of another one's.

    Args:
        setting: what all runs of the table share; `force`, `since` and `others` say what counts.
        kind: of the record.
        request: the configuration after defaults.
        code: `code_hash` of the source that decides the result.
        data_hash: when given, a record made with other questions does not count.
    """
    if setting.force and setting.since is None:
        return None
    since = setting.since if setting.force else None
    known = {"model_hash": setting.model_hash, "data_hash": data_hash}
    pattern = f"*--{_name(setting, request, code).rsplit('--', 1)[-1]}.json"
    for folder in (setting.folder, *setting.others):
        record = records.find(folder, kind, request, code, pattern=pattern, **known)
        if record is None or (since and records.created(record) < since):
            continue
        if folder != setting.folder:
            write_run(setting, record)
        return record
    return None


def write_run(setting: Setting, record: records.Record, label: str = "") -> Path:
    """Write the record of a run where `find_run` finds it.

    Args:
        setting: what all runs of the table share.
        record: with its request and, in its provenance, the hash of the code.
        label: what the file name begins with.

    Returns:
        The file.

    Raises:
        RecordError: as by `records.write`.
    """
    name = _name(setting, record["request"], record["provenance"]["code"])
    return records.write(setting.folder / f"{label and label + '--'}{name}.json", record)


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
) -> dict[str, Any]:
    """Measure cost of several methods side by side; returns the record.

    FLOPs and KV bytes are counted for one prompt; latency and peak memory are measured for a batch,
    the methods taking turns. Vanilla must come first: it is the reference of every ratio.
    """
    names = [f"{m.key}-{b}" for m, b in methods]
    request = {
        "scale": setting.scale, "model": setting.model_name, "batch_size": batch,
        "methods": [{**m.describe(), "budget": b} for m, b in methods],
        "repeats": repeats, "decode_steps": decode_steps, "energy_window_s": energy_window_s,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "device": torch.device(setting.device).type, "threads": torch.get_num_threads(),
    }  # fmt: skip
    code = code_of_kit()
    found = find_run(setting, "efficiency", request, code)
    reporter.start("efficiency", len(methods) + 2)
    if found is not None:
        reporter.advance(len(methods) + 2)
        return found
    started = time.monotonic()
    data = load_benchmark("pocket-gqa").dataset("dev", batch)
    images = [data[i]["image"] for i in range(batch)]
    one = prepare(processor, images[:1], data["question"][:1], setting.device)
    many = prepare(processor, images, data["question"][:batch], setting.device)
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
            data_hash=records.request_hash(data["question"]),
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


@torch.inference_mode()
def attention_run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    reporter: Reporter,
    *,
    images: int = 100,
    patches_fraction: float = 1 / 9,
) -> dict[str, Any]:
    """How much of the [CLS] attention the most attended patches hold, per layer of the tower.

    The observation that [CLS]-guided methods rest on. Heads are averaged; the mass is the share of
    the attention on patches (the [CLS] column is left out) that falls on the top fraction.
    """
    request = {
        "scale": setting.scale, "model": setting.model_name, "split": setting.split,
        "images": images, "patches_fraction": patches_fraction,
        "device": torch.device(setting.device).type,
    }  # fmt: skip
    code = code_hash()
    found = find_run(setting, "attention", request, code)
    reporter.start("attention of the vision tower", images)
    if found is not None:
        reporter.advance(images)
        return found
    started = time.monotonic()
    benchmark = load_benchmark("pocket-gqa")
    data = benchmark.dataset(setting.split, images)  # type: ignore[arg-type]
    tower = host_for(model).tower
    per_image: list[list[float]] = []
    with eager_attention(model):
        for part in chunks(range(len(data)), BATCH_SIZE):
            batch = [data[i]["image"] for i in part]
            inputs = prepare(processor, batch, ["what is this?"] * len(batch), setting.device)
            maps = tower(pixel_values=inputs["pixel_values"], output_attentions=True).attentions
            if not maps:
                raise RuntimeError("The vision tower returned no attention maps.")
            top = max(1, round(patches_fraction * (maps[0].shape[-1] - 1)))
            rows = [weights[:, :, 0, 1:].float().mean(1) for weights in maps]
            shares = [row.topk(top, dim=-1).values.sum(-1) / row.sum(-1) for row in rows]
            per_image += torch.stack(shares, 1).tolist()
            reporter.advance(len(batch))
    record = {
        "kind": "attention", "status": "complete", "request": request,
        "patches_fraction": patches_fraction, "images": len(data),
        "mass_per_layer": [sum(layer) / len(data) for layer in zip(*per_image, strict=True)],
        "mass_per_image": per_image,
        "provenance": records.provenance(
            code=code, model_hash=setting.model_hash, seconds=time.monotonic() - started,
            data_hash=records.request_hash(data["question_id"]), device=setting.device,
        ),
    }  # fmt: skip
    write_run(setting, record)
    return record


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
