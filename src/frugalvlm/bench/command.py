"""The speed benchmark: each method's own tax on prefill, and what scores cost; with its records."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from rich.console import Console

from frugalvlm.bench import score_costs, tax
from frugalvlm.loading import load_vlm
from frugalvlm.paths import work_dir
from frugalvlm.runs import records
from frugalvlm.runs.identity import code_hash

__all__ = ["print_bench", "run_score_costs", "run_tax"]


def run_tax(device: str = "cpu", rounds: int = 24) -> records.Record:
    """Tax of every method at 16 of 144 tokens (pocket model) and 64 of 576; writes the record.

    Args:
        device: where to run.
        rounds: timed ones; half as many for the larger model.
    """

    def rows() -> list[dict[str, Any]]:
        pocket, guide = (
            load_vlm(name, device=device)[0] for name in ("pocket-llava-base", "pocket-llava-small")
        )
        large, small = (tax.clip_sized_model(*size).to(device) for size in ((512, 8), (256, 4)))
        return [
            {"model": name, **row}
            for name, model, small_model, kept, repeats in (
                ("pocket-llava-base", pocket, guide, 16, rounds),
                ("random weights, 576 patches", large, small, 64, rounds // 2),
            )
            for row in tax.measure_tax(model, small_model, kept, repeats)
        ]

    return _recorded(tax.RECORD, "tax", device, rows)


def run_score_costs(
    device: str = "cpu", sides: Sequence[int] = score_costs.SIDES
) -> records.Record:
    """Time and memory of scores by rows and by attention maps; writes the record.

    Args:
        device: where to run.
        sides: patches a side of the picture, size by size.
    """

    def rows() -> list[dict[str, Any]]:
        return score_costs.measure_scores(sides, device=device)

    return _recorded(score_costs.RECORD, "scores", device, rows)


def print_bench(device: str = "cpu", console: Console | None = None) -> None:
    """Measure, record and print both."""
    console = console or Console()
    console.print(tax.tax_table(run_tax(device)))
    console.print(score_costs.score_table(run_score_costs(device)))


def _recorded(
    name: str, what: str, device: str, measured: Callable[[], list[dict[str, Any]]]
) -> records.Record:
    """Measure, and write the rows with what they ran on and what else ran meanwhile."""
    began, others = time.perf_counter(), _others_seconds()
    rows = measured()
    seconds = time.perf_counter() - began
    request = {
        "scale": "benchmark", "model": what, "device": device, "dtype": "float32",
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    code = code_hash("methods", "measure", "bench")
    record: records.Record = {
        "kind": "efficiency", "status": "complete", "request": request,
        "other_work_cores": max(0.0, (_others_seconds() - others) / seconds), "rows": rows,
        "provenance": records.provenance(code=code, seconds=seconds, device=device),
    }  # fmt: skip
    records.write(work_dir() / "benchmark" / name, record)
    return record


def _others_seconds() -> float:
    """Processor seconds that other programs of this machine have used so far."""
    used, own = psutil.cpu_times(), psutil.Process().cpu_times()
    busy = used.user + used.system + getattr(used, "nice", 0.0)
    return busy - own.user - own.system
