"""The method's own tax: a pruned prefill against a prefill that was given that many tokens.

The native run has the same tower, projector and decoder and does the least work that ends with the
same shapes in every layer: it takes the first patches without any score. What a method needs beyond
it (scores, top-k, merging, hooks, bookkeeping) is its tax; a ratio of 1.05 means five percent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from frugalvlm import measure
from frugalvlm.hosts import host_for
from frugalvlm.loading import load_vlm
from frugalvlm.methods import METHODS, SGL, EncoderReducer, LayerReducer
from frugalvlm.paths import results_dir
from frugalvlm.study import records
from frugalvlm.study.runs import Setting, code_of_kit

TEXT_BEFORE, TEXT_AFTER = 4, 12  # tokens around the image
AIM = 1.05


@torch.inference_mode()
def native_prefill(model: PreTrainedModel, inputs: dict, tokens: Sequence[int]) -> Any:
    """The cheapest prefill with these numbers of visual tokens at the decoder's layers."""
    host = host_for(model)
    decoder = host.language_model
    features = host.tower(pixel_values=inputs["pixel_values"], output_hidden_states=True)
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
    from transformers import DynamicCache

    cache = DynamicCache(config=decoder.config)
    positions = torch.arange(sequence.shape[1])[None]
    rotary = decoder.rotary_emb(sequence, position_ids=positions)
    hidden = sequence
    for i, layer in enumerate(decoder.layers):
        if tokens[i] < tokens[max(i - 1, 0)]:
            every = torch.arange(hidden.shape[1])
            keep = torch.cat([every[: TEXT_BEFORE + tokens[i]], every[-TEXT_AFTER:]])
            hidden, positions = hidden[:, keep], positions[:, keep]
            rotary = (rotary[0][:, keep], rotary[1][:, keep])
        hidden = layer(hidden, attention_mask=None, position_ids=positions, past_key_values=cache,
                       use_cache=True, position_embeddings=rotary)  # fmt: skip
    return decoder.norm(hidden)


def clip_sized_model() -> PreTrainedModel:
    """A random LLaVA with 576 patches as in LLaVA-1.5, narrow enough for a laptop."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=256, intermediate_size=1024, projection_dim=256,
                              num_hidden_layers=6, num_attention_heads=4, image_size=336,
                              patch_size=14)  # fmt: skip
    text = LlamaConfig(vocab_size=128, hidden_size=512, intermediate_size=1376,
                       num_hidden_layers=8, num_attention_heads=8)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4)
    return LlavaForConditionalGeneration(config).eval()


def _inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    host = host_for(model)
    side = model.config.vision_config.image_size
    before, after = torch.full((1, TEXT_BEFORE), 9), torch.full((1, TEXT_AFTER), 9)
    image = torch.full((1, host.shape.patches), model.config.image_token_id)
    ids = torch.cat([before, image, after], 1)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def measure_tax(model: PreTrainedModel, kept: int, repeats: int = 30) -> list[dict[str, Any]]:
    """Tax of every method at a budget, native and pruned prefill taking turns.

    Returns:
        One row per method: medians in ms, and the ratio with its 95 % interval.
    """
    inputs, total = _inputs(model), host_for(model).shape.patches
    rows, untouched = [], copy.deepcopy(model)
    for key, cls in METHODS.items():
        # A guide answers before the large model goes on: that is a run of its own, no tax.
        # Methods that reduce no tokens leave the prefill alone.
        reduces = issubclass(cls, EncoderReducer | LayerReducer)
        if not reduces or issubclass(cls, SGL):
            continue
        method = cls.for_budget(kept, total)
        with method.on(model) as trace:
            _prefill(model, inputs)
        counts = [round(count) for count in trace.tokens_per_layer]
        # The native run takes an untouched copy: hooks stay on for all of the pruned turns, as they
        # do in a real run.
        runs: dict[str, Callable[[], object]] = {
            "native": lambda c=counts: native_prefill(untouched, inputs, c),  # type: ignore[misc]
            "pruned": lambda: _prefill(model, inputs),
        }
        with method.on(model):
            timed = measure.interleaved_latency(runs, repeats=repeats)
        ratio = measure.ratio(timed["pruned"], timed["native"])
        rows.append({
            "method": key, "kept": kept, "total": total,
            "native_ms": timed["native"].p50_ms, "pruned_ms": timed["pruned"].p50_ms,
            "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high, "n": ratio.n},
        })  # fmt: skip
    return rows


@torch.inference_mode()
def _prefill(model: PreTrainedModel, inputs: dict) -> object:
    return model(**inputs, use_cache=True, logits_to_keep=1)


def run_tax() -> records.Record:
    """Measure at 16 of 144 (pocket model) and 64 of 576 tokens; returns and writes the record."""
    pocket, _ = load_vlm("pocket-llava-base")
    rows = [
        {"model": name, **row}
        for name, model, kept in (
            ("pocket-llava-base", pocket, 16),
            ("random weights, 576 patches", clip_sized_model(), 64),
        )
        for row in measure_tax(model, kept)
    ]
    request = {"scale": "benchmark", "model": "tax", "threads": torch.get_num_threads()}
    code = code_of_kit()
    record = {"kind": "efficiency", "status": "complete", "request": request, "rows": rows,
              "provenance": records.provenance(code=code)}  # fmt: skip
    setting = Setting("benchmark", "tax", "", results_dir() / "benchmark")
    records.write(setting.folder / "prefill_tax.json", record)
    return record


def print_tax(console: Console | None = None) -> None:
    """Measure and print the tax."""
    console = console or Console()
    record = run_tax()
    table = RichTable(title=f"Prefill: pruned against native, batch 1 (aim: {AIM} or less)")
    for header in ("model", "method", "kept", "native ms", "pruned ms", "ratio [95 %]"):
        table.add_column(header)
    for row in record["rows"]:
        r = row["ratio"]
        table.add_row(row["model"], row["method"], f"{row['kept']} of {row['total']}",
                      f"{row['native_ms']:.1f}", f"{row['pruned_ms']:.1f}",
                      f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]")  # fmt: skip
    console.print(table)
