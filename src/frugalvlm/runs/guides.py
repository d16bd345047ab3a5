"""What methods need beside their fields: a small model, or what they have learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import ProcessorMixin

from frugalvlm.engine.guidance import Guide
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.methods import Method
from frugalvlm.methods.base import GuidedReducer
from frugalvlm.methods.trained import TrainedMethod
from frugalvlm.runs.options import Options
from frugalvlm.views import UnsupportedError

Plan = list[tuple[Method, int]]


def load_guide(options: Options, processor: ProcessorMixin) -> Guide:
    """The small model that `options` names.

    Raises:
        WeightsError: it is not there; says what to do.
        UnsupportedError: its tokenizer is not the large model's.
    """
    small, own = load_vlm(options.guide, device=options.device)
    if own.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise UnsupportedError(
            f"{options.guide} has another tokenizer than {options.model}: its ranking would be of "
            "other prompts; take a small model of the same family."
        )
    return Guide(small, f"{Path(options.guide).name}@{model_hash(options.guide)[:8]}")


def with_guide(plan: Plan, options: Options, processor: ProcessorMixin) -> Plan:
    """The same plan, in which every method that needs a guide has one."""
    if not any(isinstance(method, GuidedReducer) for method, _ in plan):
        return plan
    guide = load_guide(options, processor)
    return [
        (replace(m, guide=guide) if isinstance(m, GuidedReducer) else m, budget)
        for m, budget in plan
    ]


def with_learnt(method: Method, model: str) -> Method:
    """The method with what it learnt for a model, if it is one that learns.

    Args:
        method: any.
        model: its name or folder; of an embedded model that was found in its folder, the folder.

    Raises:
        LearntError: it has learnt nothing for this model; says which command trains it.
    """
    if not isinstance(method, TrainedMethod):
        return method
    return method.for_model(model)
