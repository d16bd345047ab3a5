"""Which energy counters this machine offers, and why a component has none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugalvlm.measure.counters import Counter, NvmlEnergy, NvmlPower, Rapl

POWERCAP = Path("/sys/class/powercap")


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
    """
    if nvml is None:
        import pynvml  # from nvidia-ml-py

        nvml = pynvml
    nvml.nvmlInit()
    # By UUID: torch counts only the devices in CUDA_VISIBLE_DEVICES, NVML counts all.
    return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{_uuid(device)}")


def _uuid(device: str | torch.device) -> str:
    return str(torch.cuda.get_device_properties(torch.device(device)).uuid)


def _gpu_counters(nvml: Any, handle: Any, counters: list[Counter], checks: list[Counter]) -> None:
    if _mig_is_on(nvml, handle):
        raise RuntimeError("MIG is on: the board's energy is not the slice's")
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


def _mig_is_on(nvml: Any, handle: Any) -> bool:
    try:
        return nvml.nvmlDeviceGetMigMode(handle)[0] == 1
    except nvml.NVMLError:  # boards without MIG do not support the question
        return False


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
