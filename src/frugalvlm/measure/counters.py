"""Hardware energy counters, read directly: NVML for an NVIDIA GPU, RAPL for CPU and memory.

A counter is anything with ``component`` ("gpu", "cpu", "ram"), ``method``, ``tick_s`` (how often
the hardware updates), ``poll_s`` (how often it must be read while a window is open; None: only at
the two ends) and ``joules()``, a total since some origin of which only differences mean something.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class Counter(Protocol):
    """A source of joules, see the module's docstring."""

    component: str
    method: str
    tick_s: float
    poll_s: float | None

    def joules(self) -> float:
        """Energy in joules since some fixed origin."""


class NvmlEnergy:
    """NVML's total energy counter: mJ since the driver was loaded, whole board, Volta or newer."""

    component: str = "gpu"
    method: str = "counter"
    tick_s: float = 0.1  # ml.energy, "Thermally stable profiling": updated about every 100 ms
    poll_s: float | None = None

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    def joules(self) -> float:
        """Energy in joules since the driver was loaded."""
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3

    def processes(self) -> int | None:
        """Compute processes on the board (more than one: a shared reading); None if not told."""
        try:
            return len(self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle))
        except self.nvml.NVMLError:
            return None


class NvmlPower(NvmlEnergy):
    """NVML's board power (a running average, in mW) integrated by the trapezoidal rule."""

    method = "power_integral"
    poll_s: float | None = 0.1

    def __init__(
        self, nvml: Any, handle: Any, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__(nvml, handle)
        self._clock, self._lock = clock, threading.Lock()
        self._total, self._last = 0.0, (clock(), self._watts())

    def joules(self) -> float:
        """Energy in joules since this object was made."""
        with self._lock:  # the meter's polling thread reads too
            now, watts = self._clock(), self._watts()
            then, before = self._last
            self._total += (now - then) * (watts + before) / 2
            self._last = now, watts
            return self._total

    def _watts(self) -> float:
        return self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1e3


class Rapl:
    """The sum of some RAPL zones, their wrap-around at ``max_energy_range_uj`` undone."""

    method: str = "rapl"
    tick_s: float = 1e-3
    poll_s: float | None = 30.0  # the smallest range in use, 65 kJ, lasts 160 s at 400 W

    def __init__(self, component: str, zones: Sequence[Path]) -> None:
        self.component, self._lock = component, threading.Lock()
        self._zones = [(zone, _read(zone, "max_energy_range_uj")) for zone in zones]
        self._last = [_read(zone, "energy_uj") for zone in zones]
        self._total_uj = 0

    def joules(self) -> float:
        """Energy in joules since this object was made."""
        with self._lock:
            for i, (zone, full) in enumerate(self._zones):
                now = _read(zone, "energy_uj")
                step = now - self._last[i]
                self._total_uj += step if step >= 0 else step + full
                self._last[i] = now
            return self._total_uj / 1e6


def _read(zone: Path, name: str) -> int:
    return int((zone / name).read_text())
