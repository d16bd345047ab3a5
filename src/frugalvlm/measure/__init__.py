"""Measuring honestly: FLOPs, latency, memory, energy and carbon of what really runs."""

from frugalvlm.measure.energy import (
    GRID_FACTOR_G_PER_KWH,
    GRID_FACTOR_SOURCE,
    Energy,
    carbon_g,
)
from frugalvlm.measure.energy_result import EnergyResult
from frugalvlm.measure.flops import FlopCount, count_flops
from frugalvlm.measure.hardware import describe, machine_id
from frugalvlm.measure.latency import (
    Latency,
    Ratio,
    interleaved_latency,
    ratio,
)
from frugalvlm.measure.memory import (
    KVCacheBytes,
    PeakMemory,
    kv_cache_bytes,
    peak_memory_bytes,
)
from frugalvlm.measure.meter import EnergyMeter
from frugalvlm.measure.modelled import ModelledMeter
from frugalvlm.measure.prefill_decode import Arm, PrefillDecode, prefill_decode_ms
from frugalvlm.measure.protocol import measure_energy

__all__ = [
    "GRID_FACTOR_G_PER_KWH",
    "GRID_FACTOR_SOURCE",
    "Arm",
    "Energy",
    "EnergyMeter",
    "EnergyResult",
    "FlopCount",
    "KVCacheBytes",
    "Latency",
    "ModelledMeter",
    "PeakMemory",
    "PrefillDecode",
    "Ratio",
    "carbon_g",
    "count_flops",
    "describe",
    "interleaved_latency",
    "kv_cache_bytes",
    "machine_id",
    "measure_energy",
    "peak_memory_bytes",
    "prefill_decode_ms",
    "ratio",
]
