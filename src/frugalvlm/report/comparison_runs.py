"""One run of a comparison: a method with its hyper-parameters, its retention and its cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from frugalvlm.benchmarks import stats
from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.methods import CONTROLS, METHODS, VARIANTS, EncoderReducer, LayerReducer, Method
from frugalvlm.verdicts.ranking import RESAMPLES
from frugalvlm.verdicts.scored import Scored

BASELINE = "vanilla"
FAMILIES = ("no choice", "before the decoder", "inside the decoder", "both")


@dataclass(frozen=True, eq=False)
class Run:
    """A method with its hyper-parameters, answered and perhaps timed.

    Attributes:
        key: of the method.
        label: for people.
        family: one of FAMILIES, or "other".
        budget: visual tokens asked for.
        method: description with all hyper-parameters.
        papers: in whose folders it is recorded.
        scored: its records and those of the untouched model.
        cost: its row of the newest efficiency record, if any.
    """

    key: str
    label: str
    family: str
    budget: int
    method: Mapping[str, Any]
    papers: tuple[str, ...]
    scored: Scored
    cost: Mapping[str, Any] | None
    _known: dict[tuple, Any] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> float:
        """Visual tokens, the measured mean over decoder layers and pictures."""
        found = self.scored.tokens(self.key, self.budget)
        return float("nan") if found is None else found[0]

    def retention(self, benchmarks: Sequence[str]) -> Estimate | None:
        """Percent of the untouched model's score, mean over benchmarks; None if one is missing."""
        name = ("retention", *benchmarks)
        if name not in self._known:
            self._known[name] = self.scored.retention(self.key, self.budget, benchmarks)
        return self._known[name]

    def draws(self, benchmarks: Sequence[str]) -> np.ndarray | None:
        """That retention on resampled pictures, [RESAMPLES]; None if a benchmark is missing."""
        name = ("draws", *benchmarks)
        if name not in self._known:
            self._known[name] = self._drawn(benchmarks)
        return self._known[name]

    def _drawn(self, benchmarks: Sequence[str]) -> np.ndarray | None:
        sheets = {
            name: self.scored.retention_terms(self.key, self.budget, name)
            for name in self.scored.guard.admitted(benchmarks)
        }
        if not sheets or any(sheet is None for sheet in sheets.values()):
            return None
        each = [stats.draws(s, name, RESAMPLES) for name, s in sheets.items() if s is not None]
        return np.mean(each, axis=0)

    def numbers(self, benchmarks: Sequence[str]) -> dict[str, Any]:
        """Tokens, retention with interval (mean over benchmarks, and each), costs; None: none."""
        line: dict[str, Any] = {
            "method": self.key, "label": self.label, "family": self.family, "budget": self.budget,
            "tokens": self.tokens, "papers": " ".join(self.papers),
        }  # fmt: skip
        for name, asked in [("mean", benchmarks), *((b, [b]) for b in benchmarks)]:
            found = self.retention(asked)
            line |= {
                name: found and found.value, f"{name}_low": found and found.low,
                f"{name}_high": found and found.high, f"{name}_n": found and found.n_questions,
            }  # fmt: skip
        cost = self.cost
        line |= dict.fromkeys(
            ("flops", "flops_share", "prefill_ms", "speedup", "speedup_low", "speedup_high",
             "decode_ms", "peak_mib", "kv_share", "joules", "joules_sd", "modelled", "reliable",
             "energy_method", "batch_size", "cost_paper")
        )  # fmt: skip
        if cost is not None:
            speed, energy = cost["prefill_speedup"], cost["energy"]
            line |= {
                "flops": cost["flops"], "flops_share": cost["flops_share"],
                "prefill_ms": cost["prefill_ms"]["p50"], "speedup": speed["median"],
                "speedup_low": speed["low"], "speedup_high": speed["high"],
                "decode_ms": cost["decode_ms"]["p50"], "peak_mib": cost.get("peak_mib"),
                "kv_share": 100 * cost["kv_visual_bytes"] / cost["untouched"]["kv_visual_bytes"],
                "joules": energy["joules_per_question"], "joules_sd": energy.get("sd"),
                "modelled": energy["modelled"], "reliable": energy["reliable"],
                "energy_method": method_of(energy), "batch_size": cost["batch_size"],
                "cost_paper": cost["paper"],
            }  # fmt: skip
        return line


def family_of(key: str) -> str:
    """Where a method acts: one of FAMILIES; "other" for one that only a study defines."""
    if key in CONTROLS:
        return FAMILIES[0]
    listed = {**METHODS, **VARIANTS}.get(key)
    cls = listed or next((c for c in _subclasses(Method) if getattr(c, "key", None) == key), None)
    if cls is None:
        return "other"
    before, inside = issubclass(cls, EncoderReducer), issubclass(cls, LayerReducer)
    return (
        FAMILIES[3]
        if before and inside
        else FAMILIES[1]
        if before
        else (FAMILIES[2] if inside else "other")
    )


def method_of(energy: Mapping[str, Any]) -> str:
    """How an energy figure came about, part by part."""
    parts = [f"{part}: {how}" for part, how in energy.get("methods", {}).items() if how != "none"]
    return "; ".join(parts) or "none"


def _subclasses(cls: type) -> Iterable[type]:
    below: list[type] = cls.__subclasses__()
    for sub in below:
        yield sub
        yield from _subclasses(sub)
