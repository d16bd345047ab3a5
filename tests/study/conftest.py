"""Made-up records and benchmarks, a tiny model, and the printed numbers that claims quote."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from frugalvlm.benchmarks.base import Sheet, mean_sheet
from frugalvlm.digest import request_hash
from frugalvlm.door import beside
from frugalvlm.loading import load_vlm
from frugalvlm.papers import Paper, load_paper
from frugalvlm.pocket.installed import save_vlm
from frugalvlm.pocket.models import build_model, build_processor

COLUMNS = ("pocket-gqa", "pocket-pope", "pocket-mme", "pocket-textvqa", "pocket-sqa",
           "pocket-vqav2")  # fmt: skip
BUDGETS = (48, 32, 16)
METHODS = ("random", "uniform", "avgpool", "downsample", "fastv", "fastervlm", "visionzip")
TOTAL = 144
VISIONZIP = load_paper("visionzip")


@dataclass(frozen=True)
class FakeBenchmark:
    """Two questions a picture; the right answer is always "yes"; the score is the mean."""

    id: str

    def dataset(self, split: str, n: int) -> list[dict[str, Any]]:
        return [
            {
                "question_id": f"{self.id}-{split}-{i // 2}-{i % 2}",
                "image_id": f"{self.id}-{i // 2}",
                "answer": "yes",
                "category": "all",
            }
            for i in range(n)
        ]

    def sheet(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str | None]) -> Sheet:
        return mean_sheet(
            rows, [float(a == r["answer"]) for r, a in zip(rows, answers, strict=True)]
        )


@dataclass
class Maker:
    """Makes valid records; every argument that is named changes just that."""

    machine: str = "0123456789ab"
    created: str = "2026-01-01T00:00:00+00:00"
    model_hash: str = "weights"
    benchmarks: dict[str, FakeBenchmark] = field(
        default_factory=lambda: {name: FakeBenchmark(name) for name in COLUMNS}
    )

    def provenance(self, **changes: Any) -> dict[str, Any]:
        hardware = {"gpu": None, "cpu": {"model": "Test CPU", "usable_cores": 2}}
        return {
            "created": self.created, "commit": None, "dirty": None, "code": "code",
            "machine": self.machine, "hardware": hardware, "versions": {},
            "model_hash": self.model_hash, "data_hash": None, "seconds": 1.0, **changes,
        }  # fmt: skip

    def accuracy(
        self,
        method: str,
        budget: int,
        benchmark: str = "pocket-gqa",
        right: float | Sequence[bool] = 1.0,
        *,
        n: int = 40,
        failed: int = 0,
        rows: Sequence[Mapping[str, Any]] | None = None,
        hyper: Mapping[str, Any] | None = None,
        status: str = "complete",
        per_layer: Sequence[float] | None = None,
        **request: Any,
    ) -> dict[str, Any]:
        """`right`: share of right answers, spread evenly, or one bool per question.

        The right ones of a smaller share are among those of a larger one. The first `failed`
        answers never came.
        """
        made_up = rows is None
        rows = self.benchmarks[benchmark].dataset("test", n) if rows is None else list(rows)
        if not isinstance(right, Sequence):
            # A golden-ratio walk: any share is met within one question, in no visible order.
            right = [(i * 0.6180339887) % 1 < right for i in range(len(rows))]
        answers: list[list[Any]] = [
            [row["question_id"], row["answer"] if good else "wrong"]
            for row, good in zip(rows, right, strict=True)
        ]
        for i in range(failed):
            answers[i][1] = None
        layers = list(per_layer or [float(budget)] * 6)
        return {
            "schema": 1, "kind": "accuracy", "status": status,
            "request": {
                "scale": "pocket", "model": "pocket-llava-base",
                "method": {"method": method, **(hyper or {})}, "budget": budget,
                "benchmark": benchmark, "split": "test", "n": n, "max_new_tokens": 8,
                "dtype": "float32", "attn_implementation": "sdpa", "device": "cpu",
                "batch_size": 32, **request,
            },
            "provenance": self.provenance(data_hash=request_hash(rows) if made_up else None),
            "counts": {"asked": len(rows), "answered": len(rows) - failed, "failed": failed},
            "tokens": {"requested": budget, "per_layer": layers,
                       "spread": [[int(x), int(x)] for x in layers]},
            "metrics": {}, "answers": answers,
        }  # fmt: skip

    def table1(self, share: Mapping[str, float], **arguments: Any) -> list[dict[str, Any]]:
        """Records of the whole table; `share` of right answers by method (vanilla: all)."""
        records = [self.accuracy("vanilla", TOTAL, name, **arguments) for name in COLUMNS]
        for budget in BUDGETS:
            for method in METHODS:
                for name in COLUMNS:
                    right = share.get(method, 0.5)
                    records.append(self.accuracy(method, budget, name, right, **arguments))
        return records

    def efficiency(self, **energy: Any) -> dict[str, Any]:
        rows = []
        for method, budget in [("vanilla", TOTAL), *((m, b) for b in BUDGETS for m in METHODS)]:
            mean = (2 * TOTAL + 4 * budget) / 6 if method == "fastv" else float(budget)
            share = mean / TOTAL
            speed = 1 / (0.3 + 0.7 * share)
            rows.append({
                "method": method, "budget": budget, "tokens_mean": mean, "tokens_after": budget,
                "flops": int(4e8 + 1.6e9 * share),
                "flops_parts": {"tower": int(3.9e8), "projector": int(1e7),
                                "decoder": int(1.6e9 * share), "other": 0},
                "prefill_ms": {"p50": 50 / speed, "p95": 55 / speed, "n": 9},
                "decode_ms": {"p50": 4.0, "p95": 4.4, "n": 9},
                "prefill_speedup": {"median": speed, "low": speed - 0.1, "high": speed + 0.1,
                                    "n": 9},
                "peak_mib": 120.0, "peak_method": "resident set size",
                "kv_bytes": int(4e5 * share), "kv_visual_bytes": 3e5 * share,
                "energy": {
                    "joules_per_question": 0.5 * share, "modelled": True, "reliable": False,
                    "methods": {"gpu": "none", "cpu": "tdp_load_model", "ram": "constant_model"},
                    "reasons": ["no counter"], "carbon_g_per_1000": 0.06 * share, **energy,
                },
            })  # fmt: skip
        request = {"scale": "pocket", "model": "pocket-llava-base", "repeats": 9, "batch_size": 8,
                   "dtype": "float32", "attn_implementation": "sdpa", "device": "cpu"}  # fmt: skip
        return copy.deepcopy({
            "schema": 1, "kind": "efficiency", "status": "complete", "request": request,
            "provenance": self.provenance(), "rows": rows,
        })  # fmt: skip

    def blueprint(self) -> dict[str, Any]:
        rows = []
        for model in VISIONZIP.table("blueprint").models:
            budgets = [b.paper_tokens for b in model.budgets]
            for method, budget in [
                ("vanilla", model.tokens), *((m, b) for b in budgets for m in METHODS)
            ]:  # fmt: skip
                decoder = model.tokens * 10**10 * (60 + budget) // (60 + model.tokens)
                rows.append({
                    "model": model.name, "method": method, "budget": budget,
                    "hyper_parameters": {}, "tokens_mean": float(budget),
                    "tokens_after": float(budget), "flops": 4 * 10**11 + decoder,
                    "flops_parts": {"tower": 38 * 10**10, "projector": 10**10,
                                    "decoder": decoder, "other": 10**10},
                    "kv_bytes": 5 * 10**5 * (60 + budget), "kv_visual_bytes": 5e5 * budget,
                    "parameters": 7 * 10**9,
                })  # fmt: skip
        return {
            "schema": 1, "kind": "blueprint", "status": "complete",
            "request": {"scale": "blueprint", "model": "blueprint"},
            "provenance": self.provenance(), "rows": rows,
        }  # fmt: skip

    def attention(self, mass: Sequence[float], **more: Any) -> dict[str, Any]:
        return {
            "schema": 1, "kind": "attention", "status": "complete",
            "request": {"scale": "pocket", "model": "pocket-llava-base", "device": "cpu",
                        "split": "test"},
            "provenance": self.provenance(), "patches_fraction": 1 / 9, "images": 100,
            "mass_per_layer": list(mass), **more,
        }  # fmt: skip


@pytest.fixture(scope="session")
def make() -> Maker:
    return Maker()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights; a module may have one of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_vlm(build_model("pocket-llava-tiny"), build_processor(), folder)
    return folder


@pytest.fixture(scope="module")
def tiny(folder: Path) -> tuple[Any, Any]:
    """The model in `folder`, and its processor."""
    return load_vlm(str(folder))


@dataclass(frozen=True)
class Quoted:
    """Numbers of one of a paper's tables; one that is not there is an error."""

    paper: Paper
    table: str
    columns: Sequence[str | None]

    def value(self, method: str, kept: int, benchmark: str | None) -> float:
        number = self.paper.reported(
            table=self.table, method=method, tokens=kept, benchmark=benchmark
        )
        assert number is not None
        return number

    def over_columns(self, method: str, kept: int) -> float:
        """Mean percentage of the numbers with all 576 tokens."""
        ratios = [self.value(method, kept, c) / self.value("Vanilla", 576, c) for c in self.columns]
        return 100 * sum(ratios) / len(ratios)


@pytest.fixture(scope="session")
def quoted() -> type[Quoted]:
    return Quoted


@pytest.fixture
def beside_model(tmp_path, monkeypatch):
    """Puts an embedded model of random weights, by its name, where tables beside look for it."""

    def install(name: str) -> None:
        torch.manual_seed(0)
        opened = build_model(name).eval(), build_processor(name)
        (tmp_path / "models" / name).mkdir(parents=True)
        monkeypatch.setattr(beside, "models_dir", lambda: tmp_path / "models")
        monkeypatch.setattr(beside, "load_vlm", lambda name, device: opened)
        monkeypatch.setattr(beside, "model_hash", lambda name: "made-up")

    return install
