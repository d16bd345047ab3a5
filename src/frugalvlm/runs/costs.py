"""What one prefill costs, by part of the model: counted, so the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from frugalvlm import measure
from frugalvlm.engine.guidance import Guide
from frugalvlm.hosts import host_for
from frugalvlm.trace import Trace


def prefill_costs(
    model: PreTrainedModel, inputs: dict[str, Any], trace: Trace, visual_tokens: int
) -> dict[str, Any]:
    """Tokens, FLOPs by part and KV bytes of one prompt's prefill under the active method.

    Args:
        model: the model, with the method on it.
        inputs: one prompt with one image, on a real or on the meta device.
        trace: the trace of the active method.
        visual_tokens: visual tokens of the untouched prompt.

    Returns:
        `tokens_mean` and `tokens_after` (averaged over decoder layers, and at the last one),
        `flops` and `flops_parts` (1 multiply-add is 2), `kv_bytes` and `kv_visual_bytes`.
    """
    caches = []

    def prefill() -> None:
        caches.append(model(**inputs, use_cache=True, logits_to_keep=1).past_key_values)

    counted = measure.count_flops(prefill)
    kv = measure.kv_cache_bytes(caches[0])
    lengths = [layer.keys.shape[-2] for layer in caches[0].layers]
    each = [size / length for size, length in zip(kv.per_layer, lengths, strict=True)]
    per_layer = trace.tokens_per_layer or [float(visual_tokens)] * trace.decoder_layers
    return {
        "tokens_mean": sum(per_layer) / len(per_layer),
        "tokens_after": per_layer[-1],
        "flops": counted.total,
        "flops_parts": flops_parts(model, counted),
        "kv_bytes": kv.total,
        "kv_visual_bytes": sum(b * n for b, n in zip(each, per_layer, strict=True)),
    }


def flops_parts(model: PreTrainedModel, counted: measure.FlopCount) -> dict[str, int]:
    """FLOPs of tower, projector and decoder; `other` is the head and the method's own work.

    `guide` is all work of a small model that guides this one; it runs inside the decoder's pass.
    """
    host = host_for(model)
    names = {id(module): name for name, module in model.named_modules()}
    root = type(model).__name__
    modules = {"tower": host.tower, "projector": host.projector, "decoder": host.language_model}
    parts = {
        part: counted.by_module.get(f"{root}.{names[id(module)]}", 0)
        for part, module in modules.items()
    }
    guide = counted.by_module.get(Guide.__name__, 0)
    if guide:
        parts |= {"decoder": parts["decoder"] - guide, "guide": guide}
    parts["other"] = counted.total - sum(parts.values())
    return parts


def visual_flops(model: PreTrainedModel, per_layer: Sequence[float]) -> float:
    """Decoder FLOPs of the visual tokens by themselves, as papers print them that leave text out.

    Two per weight and token, and the two products of attention among the visual tokens.

    Args:
        model: the model.
        per_layer: visual tokens at each decoder layer.
    """
    total = 0.0
    for layer, tokens in zip(host_for(model).language_model.layers, per_layer, strict=True):
        weights = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
        total += 2 * tokens * weights + 4 * tokens**2 * layer.self_attn.q_proj.out_features
    return total
