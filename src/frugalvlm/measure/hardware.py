"""What a measurement ran on, for the record's provenance."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from frugalvlm.measure.detect import nvml_device


def describe(device: str | torch.device | None = None) -> dict[str, Any]:
    """Hardware and software of this machine as plain JSON values.

    Args:
        device: the device of the run; default: the current CUDA device if there is one. ``gpu`` is
            None for a CPU run, so that a record does not name a GPU that did nothing.

    Returns:
        os, python, torch, transformers (versions), cpu (model, physical and logical cores, memory
        in GiB, usable cores), threads (intra-operator threads of torch) and gpu (name, memory in
        GiB, capability, driver, power cap in W; unknown values are None).
    """
    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": {**_cpu(), "usable_cores": _usable_cores()},
        "threads": torch.get_num_threads(),
        "gpu": _gpu(device),
    }


def machine_id(device: str | torch.device | None = None) -> str:
    """Short stable hash of the hardware (CPU model, cores, memory, GPU), not of the host name.

    Two machines of the same make share it: timings under one id may be compared.
    """
    gpu = _gpu(device)
    # Driver, power cap and core limits may change on one machine, so they are left out.
    parts = [_cpu(), gpu and [gpu["name"], gpu["memory_gib"]]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _cpu() -> dict[str, Any]:
    return {
        "model": _cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }


def _usable_cores() -> int | None:
    """Cores this process may use, e.g. under Slurm or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.exists():  # platform.processor() is empty or only "x86_64" on Linux
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(device: str | torch.device | None) -> dict[str, Any] | None:
    cuda = torch.device("cuda") if device is None else torch.device(device)
    if cuda.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(cuda)
    gpu: dict[str, Any] = {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": None,
        "power_cap_w": None,
    }
    try:
        nvml, handle = nvml_device(cuda)
        gpu["driver"] = str(nvml.nvmlSystemGetDriverVersion())
        gpu["power_cap_w"] = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    except Exception:  # NVML is optional: no driver library, no permission, a MIG slice
        pass
    return gpu
