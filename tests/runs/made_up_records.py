"""Records as runs write them, two questions each."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

ROW = {
    "method": "vanilla", "budget": 144, "tokens_mean": 144.0, "tokens_after": 144.0,
    "flops": 1000, "flops_parts": {"decoder": 1000}, "kv_bytes": 10, "kv_visual_bytes": 5.0,
    "prefill_ms": {"p50": 1.0, "p95": 2.0, "n": 9}, "decode_ms": {"p50": 1.0, "p95": 2.0, "n": 9},
    "prefill_speedup": {"median": 1.0, "low": 1.0, "high": 1.0, "n": 9},
    "energy": {"joules_per_question": 0.5, "modelled": True, "reliable": False, "methods": {}},
}  # fmt: skip


def made_at(hours: float = -1) -> str:
    """A time so many hours from now."""
    return (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")


def accuracy(method: str = "visionzip", budget: int = 16, *, n: int = 2, hours: float = -1,
             code: str = "code", machine: str = "0123456789ab", answer: str = "yes",
             model: str = "pocket-llava-base") -> dict[str, Any]:  # fmt: skip
    """A finished accuracy record of two questions."""
    return {
        "kind": "accuracy", "status": "complete",
        "request": {"scale": "pocket", "model": model, "method": {"method": method},
                    "budget": budget, "benchmark": "pocket-gqa", "split": "test", "n": n,
                    "dtype": "float32", "attn_implementation": "sdpa", "device": "cpu"},
        "provenance": {"created": made_at(hours), "machine": machine, "code": code,
                       "model_hash": "weights", "data_hash": None, "hardware": {}},
        "tokens": {"requested": budget, "per_layer": [float(budget)] * 3,
                   "spread": [[budget, budget]] * 3},
        "counts": {"asked": 2, "answered": 2, "failed": 0}, "metrics": {},
        "answers": [["q1", answer], ["q2", "no"]],
    }  # fmt: skip


def efficiency() -> dict[str, Any]:
    """A finished cost record of one method."""
    return {
        "kind": "efficiency", "status": "complete",
        "request": {"scale": "pocket", "model": "m", "device": "cpu", "methods": [{}]},
        "provenance": {"created": made_at(), "machine": "0123456789ab", "code": "code"},
        "rows": [ROW],
    }  # fmt: skip
