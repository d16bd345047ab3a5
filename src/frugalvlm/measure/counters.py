"""Hardware energy counters, read directly: NVML for an NVIDIA GPU, RAPL for CPU and memory.

A counter is anything with ``component`` ("gpu", "cpu", "ram"), ``method``, ``tick_s`` (how often
the hardware updates), ``poll_s`` (how often it must be read while a window is open; None: only at
the two ends) and ``joules()``, a total since some origin of which only differences mean something.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """A source of joules, see the module's docstring."""

    component: str
    method: str
    tick_s: float
    poll_s: float | None

    def joules(self) -> float:
        """Energy in joules since some fixed origin."""


class NvmlEnergy:
    """NVML's total energy counter (mJ since the driver was loaded; Volta and newer, whole board)."""

    component, method, poll_s = "gpu", "counter", None
    tick_s = 0.1  # ml.energy, "Thermally stable profiling": updated about every 100 ms

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    def joules(self) -> float:
        """Energy in joules since the driver was loaded."""
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3

    def processes(self) -> int:
        """Compute processes on the board; more than one means that the reading is shared."""
        return len(self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle))


class NvmlPower(NvmlEnergy):
    """NVML's board power (a running average, in mW) integrated by the trapezoidal rule."""

    method = "power_integral"  # type: ignore[assignment]
    poll_s = 0.1  # type: ignore[assignment]

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

    method = "rapl"
    tick_s = 1e-3
    poll_s = 30.0  # the smallest range in use, 65 kJ, lasts 160 s at 400 W

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


@dataclass(frozen=True)
class Detected:
    """Counters of this machine, second opinions on them, and why a component has none."""

    counters: tuple[Counter, ...]
    checks: tuple[Counter, ...]
    missing: dict[str, str]


def detect(
    device: str | torch.device = "cpu", nvml: Any = None, powercap: Path = POWERCAP
) -> Detected:
    """Find what can be read for a run on ``device``: the board of a CUDA device, and RAPL.

    Args:
        device: a CPU run has no GPU component, whatever the machine holds.
        nvml: stands in for the pynvml module (tests).
        powercap: stands in for the kernel's folder (tests).
    """
    counters: list[Counter] = []
    checks: list[Counter] = []
    missing: dict[str, str] = {}
    if torch.device(device).type == "cuda":
        try:
            module, handle = nvml_device(device, nvml)
            _gpu_counters(module, handle, counters, checks)
        except Exception as error:  # no driver, not permitted, MIG: whatever NVML raises
            missing["gpu"] = f"{type(error).__name__}: {error}"
    else:
        missing["gpu"] = f"the run is on {torch.device(device).type}"
    for component, zones in _rapl_zones(powercap).items():
        try:
            if zones:
                counters.append(Rapl(component, zones))
            else:
                missing[component] = f"no RAPL zone under {powercap}"
        except PermissionError as error:
            missing[component] = f"RAPL is not readable ({error.filename}): needs root or a mount"
        except (OSError, ValueError) as error:
            missing[component] = f"RAPL cannot be read: {error}"
    return Detected(tuple(counters), tuple(checks), missing)


def nvml_device(device: str | torch.device, nvml: Any = None) -> tuple[Any, Any]:
    """NVML, initialised, and the handle of the board that torch calls ``device``.

    Raises:
        pynvml.NVMLError: no driver, or no such board.
        RuntimeError: the device is a MIG slice, whose energy the board's counter cannot tell apart.
    """
    if nvml is None:
        import pynvml as nvml  # from nvidia-ml-py
    nvml.nvmlInit()
    # By UUID: torch counts only the devices in CUDA_VISIBLE_DEVICES, NVML counts all.
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{_uuid(device)}")
    try:
        mig = nvml.nvmlDeviceGetMigMode(handle)[0] == 1
    except nvml.NVMLError:  # boards without MIG do not support the question
        mig = False
    if mig:
        raise RuntimeError("MIG is on: the board's energy is not the slice's")
    return nvml, handle


def _uuid(device: str | torch.device) -> str:
    return str(torch.cuda.get_device_properties(torch.device(device)).uuid)


def _gpu_counters(nvml: Any, handle: Any, counters: list[Counter], checks: list[Counter]) -> None:
    try:
        power: NvmlPower | None = NvmlPower(nvml, handle)
    except nvml.NVMLError:
        power = None
    try:
        counter = NvmlEnergy(nvml, handle)
        counter.joules()
    except nvml.NVMLError:  # older than Volta
        if power is None:
            raise
        counters.append(power)
        return
    counters.append(counter)
    if power is not None:
        checks.append(power)


def _rapl_zones(powercap: Path) -> dict[str, list[Path]]:
    """Package zones are the CPU and dram zones the memory; psys would count both twice."""
    found: dict[str, list[Path]] = {"cpu": [], "ram": []}
    seen: set[tuple[str, str]] = set()
    # intel-rapl-mmio:* repeats the same packages, so it is not matched. AMD uses these names too.
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
        except OSError:
            continue
        component = {"package": "cpu", "dram": "ram"}.get(name.split("-")[0])
        # Some multi-die machines list a package twice under one name; dram repeats per package.
        key = (name, zone.name.rsplit(":", 1)[0] if component == "ram" else "")
        if component and key not in seen:
            seen.add(key)
            found[component].append(zone)
    return found


def _read(zone: Path, name: str) -> int:
    return int((zone / name).read_text())
