"""Memory: peak of live tensor bytes while something runs, and bytes of a key-value cache."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Parts of a cache layer that hold state outside its keys and values.
_OTHER_STATE = ("_quantized_keys", "conv_states", "recurrent_states", "indexer_keys")


@dataclass(frozen=True)
class PeakMemory:
    """Peak of live tensor bytes above what was live at the start, and how it was found."""

    bytes: int
    method: str

    @property
    def mib(self) -> float:
        """Peak in MiB (2**20 bytes)."""
        return self.bytes / 2**20


@dataclass(frozen=True)
class KVCacheBytes:
    """Bytes of the keys and values of every layer.

    ``allocated`` counts the memory behind them: a cache that was cut by a slice alone still holds
    the whole buffer, so there ``allocated`` exceeds ``total``.
    """

    total: int
    per_layer: tuple[int, ...]
    allocated: int


def peak_memory_bytes(fn: Callable[[], object], device: str | torch.device = "cpu") -> PeakMemory:
    """Run ``fn`` once and return the peak of tensor memory above the start.

    On CUDA it is the caching allocator's ``max_memory_allocated`` after a reset (it rounds each
    block up to 512 bytes). On the CPU it is the running sum over the profiler's allocation events,
    temporaries inside operators included, memory that libraries such as oneDNN allocate themselves
    excluded. Freeing what existed before the start lowers the CUDA figure but not the CPU one.

    The profiler makes ``fn`` slow: never time and profile in the same run.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - start
        return PeakMemory(peak, "torch.cuda.max_memory_allocated")
    return PeakMemory(_peak(_allocation_events(fn)), "torch.profiler CPU allocation events")


def kv_cache_bytes(cache: Any) -> KVCacheBytes:
    """Exact bytes of a transformers ``Cache``; layers may differ in length or be empty.

    Works on meta tensors. A static cache counts its full buffers, used or not.

    Raises:
        TypeError: not a cache of plain key and value layers (quantised, linear-attention and
            encoder-decoder caches hold state elsewhere, and would be undercounted).
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise TypeError(
            f"{type(cache).__name__} has no layers; for an encoder-decoder cache pass its "
            "self_attention_cache and cross_attention_cache one by one"
        )
    per_layer: list[int] = []
    storages: dict[int, int] = {}
    for layer in layers:
        if any(getattr(layer, name, None) is not None for name in _OTHER_STATE):
            raise TypeError(f"{type(layer).__name__} holds more than keys and values")
        tensors = [t for t in (layer.keys, layer.values) if t is not None]
        per_layer.append(sum(t.numel() * t.element_size() for t in tensors))
        # _cdata identifies a storage also on the meta device, where every address is 0.
        storages |= {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return KVCacheBytes(sum(per_layer), tuple(per_layer), sum(storages.values()))


def _allocation_events(fn: Callable[[], object]) -> list[dict[str, Any]]:
    """The profiler's CPU "[memory]" events in time order, each with Addr and Bytes (< 0: freed)."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else kineto writes lines to stderr
    with (
        _without_allocator_lines(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        fn()
    # The exported trace is the only public place that lists single allocations.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    return [e["args"] for e in sorted(memory, key=lambda e: e["ts"])]


@contextmanager
def _without_allocator_lines() -> Iterator[None]:
    """Drop what torch's C++ allocator writes about blocks older than the profile.

    They are meant to be ignored here, and its log level can be set before torch is loaded only.
    All else that is written to stderr meanwhile comes out at the end.
    """
    try:
        real = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            for line in held:
                if b"CPUAllocator.cpp" not in line:
                    os.write(2, line)


def _peak(events: list[dict[str, Any]]) -> int:
    """Largest sum of live bytes. Only addresses allocated here count when they are freed.

    "Total Allocated" of the events is not used: it carries over blocks of earlier profiles.
    """
    live: dict[int, int] = {}
    now = peak = 0
    for event in events:
        if event["Bytes"] > 0:
            live[event["Addr"]] = event["Bytes"]
            now += event["Bytes"]
            peak = max(peak, now)
        else:
            now -= live.pop(event["Addr"], 0)
    return peak
