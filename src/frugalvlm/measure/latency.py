"""Latency: warmed up, synchronised, interleaved.

Machines drift (clocks, temperature, neighbours), so runs that are to be compared take turns:
A B, B A, A B, ... Round i of every run happens within the same moment, which makes the ratio of
two runs a paired quantity, see `ratio`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
class Ratio:
    """Median of the per-round ratios with its bootstrap interval."""

    median: float
    low: float
    high: float
    n: int


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
    for name, keep in turns(runs, repeats, warmup):
        with quiet():
            ms = time_ms(runs[name], device)
        if keep:
            samples[name].append(ms)
    return {name: Latency(tuple(ms)) for name, ms in samples.items()}


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


def turns(names: Mapping[str, Any], repeats: int, warmup: int) -> Iterator[tuple[str, bool]]:
    """Yield (name, keep this sample) in the order A B, B A, A B, ..."""
    if not names or repeats < 1 or warmup < 0:
        raise ValueError(
            f"need a run, repeats >= 1 and warmup >= 0; got {len(names)} runs, {repeats}, {warmup}"
        )
    for i in range(-warmup, repeats):
        for name in list(names) if i % 2 == 0 else reversed(list(names)):
            yield name, i >= 0


def time_ms(fn: Callable[[], object], device: str | torch.device) -> float:
    """Wall-clock milliseconds of one synchronised call."""
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
def quiet() -> Iterator[None]:
    """No garbage collection inside a sample (as timeit does)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
