"""The method's own tax: a prefill with the method against one that was given that many tokens.

The native run is an untouched copy of the model, with the same tower, projector and decoder, and
does the least work that ends with the same shapes in every layer: it takes the first patches
without any score (after `downsample`: all patches of a picture that is small already). What a
method needs beyond it (scores, top-k, merging, hooks, bookkeeping) is its tax; a ratio of 1.05
means five percent. What a small model that guides the large one takes is told apart: it is a run
of its own, and not in the ratio.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from frugalvlm import measure
from frugalvlm.engine.guidance import Guide
from frugalvlm.hosts import host_for
from frugalvlm.measure.latency import synchronize
from frugalvlm.methods import METHODS, SGL, EncoderReducer, Method
from frugalvlm.methods.trained import TrainedMethod
from frugalvlm.paths import result_file
from frugalvlm.report.display import Block, Cell, Table, facts_of, setting_lines
from frugalvlm.runs import records
from frugalvlm.views import BudgetError

__all__ = [
    "AIM",
    "MEASURED",
    "clip_sized_model",
    "measure_tax",
    "native_prefill",
    "prompt",
    "tax_table",
]

# What a method that learns costs depends on what it has learnt.
MEASURED = tuple(key for key, kind in METHODS.items() if not issubclass(kind, TrainedMethod))
TEXT_BEFORE, TEXT_AFTER = 4, 12  # tokens around the image
AIM = 1.05
RECORD = "prefill_tax.json"


@torch.inference_mode()
def native_prefill(model: PreTrainedModel, inputs: dict, tokens: Sequence[int]) -> Any:
    """The cheapest prefill with these numbers of visual tokens at the decoder's layers.

    Args:
        model: an untouched LLaVA.
        inputs: what `prompt` gives; a picture of another size than the model's is let through.
        tokens: visual tokens at every layer, never more than the layer before.
    """
    host = host_for(model)
    decoder, pixels = host.language_model, inputs["pixel_values"]
    other_size = pixels.shape[-1] != model.config.vision_config.image_size
    features = host.tower(
        pixel_values=pixels, output_hidden_states=True, interpolate_pos_encoding=other_size
    )
    patches = features.hidden_states[model.config.vision_feature_layer][:, 1:]
    image = host.projector(patches[:, : tokens[0]])
    text = decoder.embed_tokens(inputs["input_ids"])
    before, after = text[:, :TEXT_BEFORE], text[:, -TEXT_AFTER:]
    sequence = torch.cat([before, image.to(text.dtype), after], 1)
    if len(set(tokens)) == 1:  # through the model's own front, so that both runs pay for it
        return model(inputs_embeds=sequence, use_cache=True, logits_to_keep=1)
    # Layers before a cut run as in the model; behind it the sequence is sliced.
    return model.lm_head(_in_lengths(decoder, sequence, tokens)[:, -1:])


def _in_lengths(decoder: Any, sequence: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    cache = DynamicCache(config=decoder.config)
    positions = torch.arange(sequence.shape[1], device=sequence.device)[None]
    rotary = decoder.rotary_emb(sequence, position_ids=positions)
    hidden = sequence
    for i, layer in enumerate(decoder.layers):
        if tokens[i] < tokens[max(i - 1, 0)]:
            every = torch.arange(hidden.shape[1], device=hidden.device)
            keep = torch.cat([every[: TEXT_BEFORE + tokens[i]], every[-TEXT_AFTER:]])
            hidden, positions = hidden[:, keep], positions[:, keep]
            rotary = (rotary[0][:, keep], rotary[1][:, keep])
        hidden = layer(hidden, attention_mask=None, position_ids=positions, past_key_values=cache,
                       use_cache=True, position_embeddings=rotary)  # fmt: skip
    return decoder.norm(hidden)


def clip_sized_model(width: int = 512, layers: int = 8) -> PreTrainedModel:
    """A random LLaVA with 576 patches as in LLaVA-1.5, narrow enough for a laptop.

    Args:
        width: of the decoder; a multiple of 64.
        layers: of the decoder.
    """
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=256, intermediate_size=1024, projection_dim=256,
                              num_hidden_layers=6, num_attention_heads=4, image_size=336,
                              patch_size=14)  # fmt: skip
    text = LlamaConfig(vocab_size=128, hidden_size=width, intermediate_size=43 * width // 16,
                       num_hidden_layers=layers, num_attention_heads=width // 64)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4)
    return LlavaForConditionalGeneration(config).eval()


def prompt(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A prompt with one random picture, on the model's device."""
    side, patches = model.config.vision_config.image_size, host_for(model).shape.patches
    before, after = torch.full((1, TEXT_BEFORE), 9), torch.full((1, TEXT_AFTER), 9)
    image = torch.full((1, patches), model.config.image_token_id)
    ids = torch.cat([before, image, after], 1).to(model.device)
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels.to(model.device, model.dtype)}  # fmt: skip


def measure_tax(
    model: PreTrainedModel, guide: PreTrainedModel, kept: int, repeats: int = 30, warmup: int = 3
) -> list[dict[str, Any]]:
    """Tax of every method at a budget, native prefill and prefill with the method taking turns.

    Args:
        model: a LLaVA.
        guide: a small model for the methods that need one.
        kept: visual tokens to keep; methods that drop none keep all of them.
        repeats: timed rounds.
        warmup: rounds before them.

    Returns:
        One row per method that needs no training: medians in ms, and the ratio of the two with its
        95 % interval.
    """
    total, untouched, rows = host_for(model).shape.patches, copy.deepcopy(model), []
    for key in MEASURED:
        method = _at_budget(key, kept, total, guide)
        row = _tax(method, model, untouched, repeats, warmup)
        rows.append({"method": key, "kept": kept, "total": total, **row})
    return rows


def _at_budget(key: str, kept: int, total: int, guide: PreTrainedModel) -> Method:
    try:
        method = METHODS[key].for_budget(kept, total)
    except BudgetError:  # it leaves the tokens alone
        method = METHODS[key].for_budget(total, total)
    return replace(method, guide=Guide(guide, "guide")) if isinstance(method, SGL) else method


def _tax(
    method: Method, model: PreTrainedModel, untouched: PreTrainedModel, repeats: int, warmup: int
) -> dict[str, Any]:
    inputs, shape = prompt(model), host_for(model).shape
    with method.on(model) as trace:
        _prefill(model, inputs)
    counts = [round(n) for n in trace.tokens_per_layer] or [shape.patches] * shape.decoder_layers
    given = inputs
    if isinstance(method, EncoderReducer):
        given = {**inputs, "pixel_values": method.shrink(inputs["pixel_values"], shape.grid)}
    # Hooks stay on for all turns, as they do in a real run: the native run takes another model.
    runs: dict[str, Callable[[], object]] = {
        "native": lambda: native_prefill(untouched, given, counts),
        "method": lambda: _prefill(model, inputs),
    }
    with method.on(model), _guide_clock(method) as guide_ms:
        timed = measure.interleaved_latency(runs, repeats, warmup, model.device)
    native, own, guided = timed["native"], timed["method"], guide_ms[-repeats:]
    if guided:
        pairs = zip(own.samples_ms, guided, strict=True)
        own = measure.Latency(tuple(ms - guide for ms, guide in pairs))
    ratio = measure.ratio(own, native)
    return {
        "hyper_parameters": method.describe(),
        "tokens_mean": sum(counts) / len(counts),
        "native_ms": native.p50_ms,
        "method_ms": own.p50_ms,
        "guide_ms": measure.Latency(tuple(guided)).p50_ms if guided else None,
        "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high, "n": ratio.n},
    }


@contextmanager
def _guide_clock(method: Method) -> Iterator[list[float]]:
    """Milliseconds of every call of the method's small model; none without one."""
    spent: list[float] = []
    guide = method.guide if isinstance(method, SGL) else None
    if guide is None:
        yield spent
        return
    device, began = guide.model.device, [0.0]

    def start(*_: object) -> None:
        synchronize(device)
        began[0] = time.perf_counter()

    def stop(*_: object) -> None:
        synchronize(device)
        spent.append((time.perf_counter() - began[0]) * 1e3)

    hooks = guide.register_forward_pre_hook(start), guide.register_forward_hook(stop)
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def _prefill(model: PreTrainedModel, inputs: dict) -> object:
    return model(**inputs, use_cache=True, logits_to_keep=1)


def tax_table(record: records.Record | None = None) -> Table:
    """The tax of every method, model by model.

    Args:
        record: default: the published one.

    Raises:
        FileNotFoundError: when nothing was measured; `invoke bench` does.
    """
    record = record or records.read_record(result_file("benchmark", RECORD))
    data = pd.DataFrame(
        {
            "model": row["model"], "method": row["method"], "kept": row["kept"],
            "total": row["total"], "tokens_mean": row["tokens_mean"],
            "native_ms": row["native_ms"], "method_ms": row["method_ms"],
            "guide_ms": row["guide_ms"], "ratio": row["ratio"]["median"],
            "ratio_low": row["ratio"]["low"], "ratio_high": row["ratio"]["high"],
            "n": row["ratio"]["n"], "within_aim": row["ratio"]["median"] <= AIM,
        }
        for row in record["rows"]
    )  # fmt: skip
    facts = facts_of([record], "benchmark", None)
    blocks = [
        Block(f"{model}: {own['kept'].iloc[0]} of {own['total'].iloc[0]} visual tokens",
              tuple(_line(row) for row in own.to_dict("records")))
        for model, own in data.groupby("model", sort=False)
    ]  # fmt: skip
    return Table(
        title="The method's own tax on prefill",
        headers=("method", "tokens,\nmean", "native\nms", "with method\nms", "guide\nms",
                 "ratio\n[95 % interval]"),
        blocks=tuple(blocks),
        caption=(
            *setting_lines(facts),
            "Native: an untouched model that is given the first so many tokens, without any score. "
            "Ratio: median over rounds in which both took turns, one prompt; the guide of sgl is "
            f"not in it. Aim: {AIM} or less. vanilla: what the model's own way of putting the "
            "image into the prompt takes.",
            busy_line(record),
        ),
        data=data,
        facts=facts,
    )  # fmt: skip


def _line(d: Mapping[Any, Any]) -> tuple[Cell, ...]:
    guide = "" if pd.isna(d["guide_ms"]) else f"{d['guide_ms']:.1f}"
    return tuple(
        Cell(text)
        for text in (
            d["method"], f"{d['tokens_mean']:.1f}", f"{d['native_ms']:.1f}",
            f"{d['method_ms']:.1f}", guide,
            f"{d['ratio']:.3f} [{d['ratio_low']:.3f}, {d['ratio_high']:.3f}]",
        )
    )  # fmt: skip


def busy_line(record: records.Record) -> str:
    """What else the machine did meanwhile, as a sentence."""
    threads, dtype = record["request"]["threads"], record["request"]["dtype"]
    cores = record["provenance"]["hardware"]["cpu"]["logical_cores"]
    return (
        f"{threads} thread{'s' if threads > 1 else ''}, {dtype}; other programs used "
        f"{record['other_work_cores']:.1f} of {cores} cores meanwhile."
    )
