"""Scores of the decoder layer behind a cut, for methods that rank tokens by them.

A layer reducer is shown the attention of the layer in front of a cut. Some released code takes the
projections of the layer behind it and applies them to the sequence that is not cut yet: one extra
key projection and the query rows that are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from frugalvlm.engine.blocks import block
from frugalvlm.engine.session import operate
from frugalvlm.hosts import host_for
from frugalvlm.hosts.base import FamilyModule
from frugalvlm.methods.base import LooksBehind
from frugalvlm.operators import operates
from frugalvlm.trace import Trace
from frugalvlm.views import LayerView


class _Now(threading.local):
    """What the running thread's pass has shown."""

    def __init__(self) -> None:
        self.seen: dict[FamilyModule, dict[str, Any]] = {}


@operates(LooksBehind)
@block
def looking_ahead(
    method: LooksBehind, model: PreTrainedModel, placeholders: Tensor | None = None
) -> Iterator[Trace]:
    """Run a model with a layer reducer that reads behind its cuts; see `Method.on`.

    Args:
        method: its field `behind` is filled in here.
        model: an unmodified model.
        placeholders: see `Method.on`.
    """
    host = host_for(model)
    method.check(host.shape)
    host.check_decoder()
    layers = host.language_model.layers
    now = _Now()

    def see(module: FamilyModule, args: tuple, kwargs: dict) -> None:
        """Positions and mask of the sequence that a cut behind this layer finds."""
        now.seen[module] = {k: kwargs.get(k) for k in ("position_embeddings", "attention_mask")}

    @torch.no_grad()
    def behind(view: LayerView) -> LayerView:
        layer, at = layers[view.layer], now.seen[layers[view.layer - 1].self_attn]
        hidden = layer.input_layernorm(view.hidden)
        keys = layer.self_attn.k_proj(hidden)
        return view.with_attention(
            lambda queries, temperature=1.0: host.attention_rows(
                layer.self_attn, hidden, keys, at["position_embeddings"], at["attention_mask"],
                queries, temperature,
            )
        )  # fmt: skip

    with ExitStack() as stack:
        for i in method.layers(host.shape.decoder_layers):
            hook = layers[i - 1].self_attn.register_forward_pre_hook(see, with_kwargs=True)
            stack.callback(hook.remove)
        yield stack.enter_context(operate(replace(method, behind=behind), model, placeholders))
