"""What a paper measures beside its main table: one file per paper, one function each.

`invoke reproduce` calls the function after the runs of the paper's table; the records that it
returns are kept and reported like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.methods import Method
from frugalvlm.study.analyses import aim, early_exit, fastervlm, gsearch, sgl
from frugalvlm.study.records import Record
from frugalvlm.study.runs import Reporter, Setting

if TYPE_CHECKING:
    from frugalvlm.study.reproduce import Options

Analysis = Callable[[Setting, PreTrainedModel, ProcessorMixin, "Options", Reporter], list[Record]]

ANALYSES: dict[str, Analysis] = {
    "early_exit": early_exit.run,
    "fastervlm": fastervlm.run,
    "gsearch": gsearch.run,
    "sgl": sgl.run,
    "aim": aim.run,
}
# Whose costs are measured beside those of the table's rows; told the analysis's records.
MORE_COSTS: dict[str, Callable[[Sequence[Record], PreTrainedModel], list[tuple[Method, int]]]] = {
    "aim": lambda made, model: aim.ablation_plan(model),
    "gsearch": gsearch.costed_plan,
}
# What a paper's blueprint scale holds beside counted cells; called with the folder for records.
BLUEPRINT_ANALYSES: dict[str, Callable[[Path], list[Record]]] = {"aim": aim.cost_model}

__all__ = ["ANALYSES", "BLUEPRINT_ANALYSES", "MORE_COSTS", "Analysis"]
