"""What a paper adds to the tables that its layouts describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.methods import Method
from frugalvlm.runs.options import Options
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting

__all__ = ["Analysis", "MoreCosts", "Study"]

Analysis: TypeAlias = Callable[
    [Setting, PreTrainedModel, ProcessorMixin, Options, Reporter], list[Record]
]
MoreCosts: TypeAlias = Callable[[Sequence[Record], PreTrainedModel], list[tuple[Method, int]]]


@dataclass(frozen=True)
class Study:
    """One paper's study. A paper without one of its own is a plain study: its tables alone.

    Attributes:
        key: the paper.
        analysis: measures what lies beside the main pocket table; called behind its answers. Its
            records are kept and reported like any other. Told not to measure time, it leaves out
            what does (`Setting.timed`).
        more_costs: whose costs are measured beside those of the table's rows, as methods with
            budgets; told the analysis's records and the model.
        blueprint: what the blueprint scale holds beside counted cells; told the folder for records.
    """

    key: str
    analysis: Analysis | None = None
    more_costs: MoreCosts | None = None
    blueprint: Callable[[Path], list[Record]] | None = None
