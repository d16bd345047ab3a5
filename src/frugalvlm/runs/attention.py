"""Where the vision tower's [CLS] token looks, layer by layer; one record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import load_benchmark
from frugalvlm.benchmarks.asking import BATCH_SIZE, chunks, prepare
from frugalvlm.digest import request_hash
from frugalvlm.hosts import host_for
from frugalvlm.runs import records
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.setting import Reporter, Setting, find_run, write_run


@torch.inference_mode()
def attention_run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    reporter: Reporter,
    *,
    images: int = 100,
    patches_fraction: float = 1 / 9,
) -> dict[str, Any]:
    """How much of the [CLS] attention the most attended patches hold, per layer of the tower.

    The observation that [CLS]-guided methods rest on. Heads are averaged; the mass is the share of
    the attention on patches (the [CLS] column is left out) that falls on the top fraction.
    """
    request = {
        "scale": setting.scale, "model": setting.model_name, "split": setting.split,
        "images": images, "patches_fraction": patches_fraction,
        "device": torch.device(setting.device).type,
    }  # fmt: skip
    code = code_hash("runs.attention")
    found = find_run(setting, "attention", request, code)
    reporter.start("attention of the vision tower", images)
    if found is not None:
        reporter.advance(images)
        return found
    started = time.monotonic()
    benchmark = load_benchmark("pocket-gqa")
    asked = benchmark.dataset(setting.split, images * benchmark.per_image)  # type: ignore[arg-type]
    data = asked.select(range(0, len(asked), benchmark.per_image))  # each picture once
    tower = host_for(model).tower
    per_image: list[list[float]] = []
    with eager_attention(model):
        for part in chunks(range(len(data)), BATCH_SIZE):
            batch = [data[i]["image"] for i in part]
            inputs = prepare(processor, batch, ["what is this?"] * len(batch), setting.device)
            maps = tower(pixel_values=inputs["pixel_values"], output_attentions=True).attentions
            if not maps:
                raise RuntimeError("The vision tower returned no attention maps.")
            top = max(1, round(patches_fraction * (maps[0].shape[-1] - 1)))
            rows = [weights[:, :, 0, 1:].float().mean(1) for weights in maps]
            shares = [row.topk(top, dim=-1).values.sum(-1) / row.sum(-1) for row in rows]
            per_image += torch.stack(shares, 1).tolist()
            reporter.advance(len(batch))
    record = {
        "kind": "attention", "status": "complete", "request": request,
        "patches_fraction": patches_fraction, "images": len(data),
        "mass_per_layer": [sum(layer) / len(data) for layer in zip(*per_image, strict=True)],
        "mass_per_image": per_image,
        "provenance": records.provenance(
            code=code, model_hash=setting.model_hash, seconds=time.monotonic() - started,
            data_hash=request_hash(data["question_id"]), device=setting.device,
        ),
    }  # fmt: skip
    write_run(setting, record)
    return record


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention, which returns its maps, in tower and decoder."""
    host = host_for(model)
    before = {
        "vision_config": host.tower.config._attn_implementation,
        "text_config": host.language_model.config._attn_implementation,
    }
    model.set_attn_implementation(dict.fromkeys(before, "eager"))
    try:
        yield
    finally:
        model.set_attn_implementation(before)
