"""The energy protocol: long windows, interleaved, repeated, with stated rules of acceptance.

A counter that ticks every 0.1 s cannot see one answer. So each run is repeated until a window of
`min_window_s` is full, the runs take turns (A B, B A, ...), and a result says why it is unreliable
when it is. The relative quantisation error of a window of T seconds is about 0.041 s / T.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from frugalvlm.measure.energy import Energy
from frugalvlm.measure.energy_result import EnergyResult
from frugalvlm.measure.latency import synchronize, turns
from frugalvlm.measure.meter import EnergyMeter

MIN_WINDOW_S = 10.0
MIN_WINDOWS = 5
MIN_TICKS = 100
MAX_CV = 0.03
MAX_CHECK_GAP = 0.05


class Meter(Protocol):
    """What `measure_energy` needs: an `EnergyMeter` or a `ModelledMeter`."""

    modelled: bool

    @property
    def methods(self) -> Mapping[str, str]:
        """Method per component."""

    @property
    def tick_s(self) -> float:
        """Update interval of the slowest counter, in seconds."""

    def exclusive(self) -> bool | None:
        """Whether the device is this process's alone; None if unknown."""

    def begin_window(self, name: str = ..., restart: bool = ...) -> None:
        """Open a window."""

    def end_window(self, name: str = ..., cancel: bool = ...) -> Energy | None:
        """Close a window."""


def measure_energy(
    runs: Mapping[str, Callable[[], object]],
    *,
    meter: Meter | None = None,
    device: str = "cpu",
    min_window_s: float = MIN_WINDOW_S,
    repeats: int = MIN_WINDOWS,
    warmup: int = 10,
    idle_s: float = 30.0,
    cooldown_s: float = 10.0,
) -> dict[str, EnergyResult]:
    """Energy per call of every run, in interleaved windows; the defaults are the full protocol.

    For a quick look set ``min_window_s``, ``idle_s``, ``cooldown_s`` and ``warmup`` small: the
    numbers come out the same way and are marked unreliable. Without any counter nothing is run and
    every result is empty (n = 0).

    Args:
        runs: name to a function without argument, e.g. one fixed batch of questions.
        meter: default: the hardware counters for ``device``; a `ModelledMeter` where the caller
            wants a modelled figure.
        device: synchronised after every call, so that a window never ends before its work.
        min_window_s: a run is called again until its window is at least that long.
        repeats: windows per run.
        warmup: calls of every run before the first window.
        idle_s: idle windows before and after; 0 skips them.
        cooldown_s: pause before each window.

    Raises:
        ValueError: no run or no window.
    """
    if not runs or repeats < 1:
        raise ValueError(f"need a run and repeats >= 1; got {len(runs)} runs, {repeats} repeats")
    meter = EnergyMeter(device) if meter is None else meter
    if set(meter.methods.values()) == {"none"}:
        reason = ("no energy counter is readable on this machine",)
        return {
            name: EnergyResult((), (), meter.methods, meter.modelled, None, reason) for name in runs
        }
    for fn in runs.values():
        for _ in range(warmup):
            fn()
    shared = meter.exclusive() is False
    idle_before = _idle_watts(meter, idle_s)
    windows: dict[str, list[tuple[Energy, int]]] = {name: [] for name in runs}
    for name, _ in turns(runs, repeats, warmup=0):
        time.sleep(cooldown_s)
        windows[name].append(_window(meter, runs[name], min_window_s, device))
    idle_after = _idle_watts(meter, idle_s)
    shared = shared or meter.exclusive() is False
    idle = None if idle_before is None or idle_after is None else (idle_before, idle_after)
    return {name: _result(meter, taken, idle, shared) for name, taken in windows.items()}


def _window(
    meter: Meter, fn: Callable[[], object], min_window_s: float, device: str
) -> tuple[Energy, int]:
    calls = 0
    meter.begin_window("measure_energy", restart=True)
    try:
        start = time.perf_counter()
        while calls == 0 or time.perf_counter() - start < min_window_s:
            fn()
            synchronize(device)
            calls += 1
    except BaseException:
        meter.end_window("measure_energy", cancel=True)
        raise
    energy = meter.end_window("measure_energy")
    assert energy is not None  # only a cancelled window has none
    return energy, calls


def _idle_watts(meter: Meter, seconds: float) -> float | None:
    if seconds <= 0:
        return None
    energy, _ = _window(meter, lambda: time.sleep(seconds), 0.0, "cpu")
    return None if energy.total_joules is None else energy.total_joules / energy.seconds


def _result(
    meter: Meter, taken: list[tuple[Energy, int]], idle: tuple[float, float] | None, shared: bool
) -> EnergyResult:
    windows, calls = zip(*taken, strict=True)
    result = EnergyResult(windows, calls, meter.methods, meter.modelled, idle, ())
    return replace(result, reasons=_reasons(result, meter.tick_s, shared))


def _reasons(result: EnergyResult, tick_s: float, shared: bool) -> tuple[str, ...]:
    """The rules of acceptance, each with the figure that broke it."""
    reasons = []
    shortest = min(result.window_s)
    gaps = [w.check_gap for w in result.windows if w.check_gap is not None]
    if result.modelled:
        reasons.append("modelled, not measured")
    if shared:
        reasons.append("another process computes on the GPU")
    if result.n < MIN_WINDOWS:
        reasons.append(f"{result.n} windows, fewer than {MIN_WINDOWS}")
    if shortest < MIN_WINDOW_S:
        reasons.append(f"shortest window {shortest:.2f} s, below {MIN_WINDOW_S:g} s")
    if shortest < MIN_TICKS * tick_s:
        reasons.append(f"shortest window {shortest:.2f} s, below {MIN_TICKS} ticks of {tick_s:g} s")
    if result.cv is None:
        reasons.append("no spread: fewer than two windows or zero energy")
    elif result.cv > MAX_CV:
        reasons.append(f"coefficient of variation {result.cv:.1%}, above {MAX_CV:.0%}")
    if gaps and max(gaps) > MAX_CHECK_GAP:
        reasons.append(f"counter and power integral differ by {max(gaps):.1%}")
    if result.methods.get("gpu") != "none" and not gaps:
        reasons.append("no second measurement of the GPU to check the first")
    return tuple(reasons)
