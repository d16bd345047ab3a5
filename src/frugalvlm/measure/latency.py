"""Latency: warmed up, synchronised, interleaved, prefill and decode apart.

Machines drift (clocks, temperature, neighbours), so runs that are to be compared take turns:
A B, B A, A B, ... Round i of every run happens within the same moment, which makes the ratio of
two runs a paired quantity, see `ratio`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap


@dataclass(frozen=True)
class Latency:
    """Wall-clock samples in milliseconds, one per round, in the order of the rounds."""

    samples_ms: tuple[float, ...]

    @property
    def n(self) -> int:
        """Number of rounds."""
        return len(self.samples_ms)

    @property
    def p50_ms(self) -> float:
        """Median, in ms."""
        return float(np.percentile(self.samples_ms, 50))

    @property
    def p95_ms(self) -> float:
        """95th percentile, in ms. With fewer than 20 rounds it is close to the maximum."""
        return float(np.percentile(self.samples_ms, 95))


@dataclass(frozen=True)
class PrefillDecode:
    """Prefill in ms per prompt batch; decode in ms per step (one token for each batch row)."""

    prefill: Latency
    decode: Latency


@dataclass(frozen=True)
class Ratio:
    """Median of the per-round ratios with its bootstrap interval."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Arm:
    """One run to time: a model, its inputs, and the method that is active while it runs.

    Attributes:
        model: any Hugging Face causal or vision-language model, or a callable like one.
        inputs: the processor's output: input_ids, attention_mask, pixel_values, ...
        context: makes the context manager of the method, e.g. ``lambda: method.on(model)``.
            It is entered outside the timed region.
    """

    model: Callable[..., Any]
    inputs: Mapping[str, Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def interleaved_latency(
    runs: Mapping[str, Callable[[], object]],
    repeats: int = 20,
    warmup: int = 3,
    device: str | torch.device = "cpu",
) -> dict[str, Latency]:
    """Time every run in turns; the order is reversed in every second round.

    Args:
        runs: name to a function without argument; what it returns is dropped.
        repeats: timed rounds.
        warmup: rounds before them whose times are dropped.
        device: where the work happens; a CUDA device is synchronised around every sample.

    Raises:
        ValueError: no run, no timed round, or a negative warm-up.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for name, keep in _turns(runs, repeats, warmup):
        with _quiet():
            ms = _time_ms(runs[name], device)
        if keep:
            samples[name].append(ms)
    return {name: Latency(tuple(ms)) for name, ms in samples.items()}


@torch.no_grad()
def prefill_decode_ms(
    arms: Mapping[str, Arm],
    decode_steps: int = 16,
    repeats: int = 20,
    warmup: int = 3,
    device: str | torch.device = "cpu",
) -> dict[str, PrefillDecode]:
    """Time prefill and decode apart, the arms in turns.

    Prefill is one forward of the whole prompt that fills the cache and gives the logits of the last
    position only. Decode is ``decode_steps`` greedy forwards of one token with that cache, timed as
    one block (so CUDA is not synchronised per token) and divided by their number. The mask grows by
    one column per step from the full prompt's, as ``generate`` does. The number of steps is fixed:
    an end-of-sequence token does not stop it, so all arms generate equally many tokens.

    Raises:
        ValueError: no arm, no timed round, a negative warm-up, or no decode step.
    """
    if decode_steps < 1:
        raise ValueError(f"decode_steps must be at least 1, got {decode_steps}")
    prefill: dict[str, list[float]] = {name: [] for name in arms}
    decode: dict[str, list[float]] = {name: [] for name in arms}
    for name, keep in _turns(arms, repeats, warmup):
        with _quiet(), arms[name].context():
            steps = _Steps(arms[name])
            prefill_ms = _time_ms(steps.prefill, device)
            decode_ms = _time_ms(lambda steps=steps: steps.decode(decode_steps), device)
        if keep:
            prefill[name].append(prefill_ms)
            decode[name].append(decode_ms / decode_steps)
    return {
        name: PrefillDecode(Latency(tuple(prefill[name])), Latency(tuple(decode[name])))
        for name in arms
    }


def ratio(a: Latency, b: Latency, confidence: float = 0.95, seed: int = 0) -> Ratio:
    """Time of ``a`` over time of ``b``: median of the per-round ratios, percentile bootstrap.

    Raises:
        ValueError: the two were not timed in the same rounds (different n), or n < 2.
    """
    if a.n != b.n:
        raise ValueError(f"not paired: {a.n} and {b.n} rounds; time both in one interleaved call")
    if a.n < 2:
        raise ValueError("a bootstrap interval needs at least 2 rounds")
    ratios = np.asarray(a.samples_ms) / np.asarray(b.samples_ms)
    interval = bootstrap(
        (ratios,), np.median, confidence_level=confidence, method="percentile", rng=seed
    ).confidence_interval
    return Ratio(float(np.median(ratios)), float(interval.low), float(interval.high), a.n)


class _Steps:
    """One prompt's prefill and the greedy steps after it."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm

    def prefill(self) -> None:
        inputs = {**self.arm.inputs, "use_cache": True, "logits_to_keep": 1}
        self._accept(self.arm.model(**inputs))
        self.mask = self.arm.inputs.get("attention_mask")

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            step = {"input_ids": self.token, "past_key_values": self.cache, "use_cache": True}
            if self.mask is not None:
                one = self.mask.new_ones(self.mask.shape[0], 1)
                self.mask = torch.cat([self.mask, one], dim=1)
                step["attention_mask"] = self.mask
            self._accept(self.arm.model(**step, logits_to_keep=1))

    def _accept(self, output: Any) -> None:
        self.cache = output.past_key_values
        self.token = output.logits[:, -1:].argmax(dim=-1)


def _turns(names: Mapping[str, Any], repeats: int, warmup: int) -> Iterator[tuple[str, bool]]:
    """Yield (name, keep this sample) in the order A B, B A, A B, ..."""
    if not names or repeats < 1 or warmup < 0:
        raise ValueError(
            f"need a run, repeats >= 1 and warmup >= 0; got {len(names)} runs, {repeats}, {warmup}"
        )
    for i in range(-warmup, repeats):
        for name in list(names) if i % 2 == 0 else reversed(list(names)):
            yield name, i >= 0


def _time_ms(fn: Callable[[], object], device: str | torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def synchronize(device: str | torch.device) -> None:
    """Wait until a CUDA device is idle; other devices need no waiting."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection inside a sample (as timeit does)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
