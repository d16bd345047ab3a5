"""Which method runs on which model family: what the methods themselves say when they are put on.

Every family is built from its library's own configuration, without weights, and every method is
put on it. What is refused says why; the table holds these very sentences.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from frugalvlm.hosts import HOSTS
from frugalvlm.methods import METHODS
from frugalvlm.methods.base import DepthPolicy, GuidedReducer
from frugalvlm.methods.trained import TrainedMethod, untrained
from frugalvlm.views import UnsupportedError

__all__ = ["FAMILIES", "refusals", "support_table"]

# What people call the families, by `model_type`.
FAMILIES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL 3",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
}
_LAYERS = 8  # of the decoder: enough for every schedule


def refusals(model: Any) -> dict[str, str]:
    """Why a model refuses methods, by key; the others run on it.

    Args:
        model: an unmodified model, with or without weights.
    """
    refused = {}
    for key in METHODS:
        try:
            with _usual(key, model).on(model):
                pass
        except UnsupportedError as error:
            refused[key] = str(error)
    return refused


def support_table() -> str:
    """Methods by families in Markdown, and below it why what is refused is refused."""
    unknown = HOSTS.keys() ^ FAMILIES.keys()
    assert not unknown, f"families without a name, or names without a host: {sorted(unknown)}"
    columns = {family: refusals(model_of(family)) for family in FAMILIES}
    reasons: dict[str, int] = {}
    rows = []
    for key in METHODS:
        cells = []
        for refused in columns.values():
            if key in refused:
                number = reasons.setdefault(refused[key], len(reasons) + 1)
                cells.append(f"no [{number}]")
            else:
                cells.append("yes")
        rows.append(f"| `{key}` | {' | '.join(cells)} |")
    return "\n".join(
        [
            f"| method | {' | '.join(FAMILIES.values())} |",
            f"| --- |{' --- |' * len(FAMILIES)}",
            *rows,
            "",
            *(f"{number}. {reason}" for reason, number in reasons.items()),
        ]
    )


@cache
def model_of(family: str) -> Any:
    """A model of a family without weights, its decoder cut down to a few layers."""
    config: Any = AutoConfig.for_model(family)
    config.text_config.num_hidden_layers = _LAYERS
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:_LAYERS]
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).eval()


def _usual(key: str, model: Any) -> Any:
    """A method as one would put it on: at a quarter of the tokens, guided if it needs a guide."""
    kind = METHODS[key]
    if issubclass(kind, DepthPolicy) or key == "vanilla":
        return kind.for_budget(1, 1)
    method = kind.for_share(0.25)
    if isinstance(method, TrainedMethod):
        return replace(method, learnt=untrained(method, model))
    if isinstance(method, GuidedReducer):
        return method.guided_by(copy.deepcopy(model))
    return method
