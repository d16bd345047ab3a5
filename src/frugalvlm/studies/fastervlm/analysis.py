"""Why FasterVLM distrusts the language model's attention: its shift and its dispersion.

As the released scripts `analyze_attn_shift` and `analyze_attn_dispersion`, on prompts of all visual
tokens. Heads are averaged, and each prompt's curves run over the visual tokens in their order.

- *image*: attention that a visual token gets from visual queries, the sum over the number of
  queries that can see it; *text*: mean over the text behind the image but its last token; *last*:
  from the last prompt token; *cls*: from [CLS] in the tower layer that gives the features.
- Shift: Spearman correlation of the mean curve with the token's index, per decoder layer and
  averaged over layers. The causal mask is said to make it positive in the language model.
- Dispersion: values sorted in falling order, divided by their sum, cumulated, averaged over
  prompts; *last* is that of the second decoder layer (index 1), as in the script.

The text curve is a true mean; the script divides by one token too many, which moves no ranking.
Intervals are bootstraps over prompts, differences are paired.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import load_benchmark
from frugalvlm.benchmarks.asking import BATCH_SIZE, chunks, prepare
from frugalvlm.digest import request_hash
from frugalvlm.hosts import Host, host_for
from frugalvlm.hosts.base import encoder_layers
from frugalvlm.runs import records
from frugalvlm.runs.attention import eager_attention
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.options import Options
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting, find_run, write_run

PROMPTS = 100  # at most; the paper takes 1000
DISPERSION_LAYER = 1  # of the decoder, from 0
TOP = 1 / 5  # "the top fifth of the tokens"
DRAWS = 1000


@torch.inference_mode()
def run(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    options: Options,
    reporter: Reporter,
) -> list[Record]:
    """One record, measured or found: curves, `shift` and `dispersion` with intervals."""
    prompts = min(PROMPTS, options.n)
    request = {
        "scale": setting.scale, "model": setting.model_name, "split": setting.split,
        "analysis": "attention", "prompts": prompts,
        "dtype": str(model.dtype).removeprefix("torch."), "attn_implementation": "eager",
        "device": torch.device(setting.device).type,
    }  # fmt: skip
    code = code_hash("studies.fastervlm.analysis")
    found = find_run(setting, "analysis", request, code)
    reporter.start("attention shift and dispersion", prompts)
    if found is not None:
        reporter.advance(prompts)
        return [found]
    started, host = time.monotonic(), host_for(model)
    data = load_benchmark("pocket-gqa").dataset(setting.split, prompts)  # type: ignore[arg-type]
    parts: list[dict[str, np.ndarray]] = []
    with eager_attention(model):
        for part in chunks(range(len(data)), BATCH_SIZE // 2):
            images = [data[i]["image"] for i in part]
            texts = [data[i]["question"] for i in part]
            parts.append(curves(host, prepare(processor, images, texts, setting.device)))
            reporter.advance(len(images))
    per_prompt = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    record = {
        "kind": "analysis", "status": "complete", "request": request, "prompts": len(data),
        "curves": {name: values.mean(0).round(7) for name, values in per_prompt.items()},
        "shift": shift(per_prompt), "dispersion": dispersion(per_prompt),
        "provenance": records.provenance(
            code=code, model_hash=setting.model_hash, seconds=time.monotonic() - started,
            data_hash=request_hash(data["question_id"]), device=setting.device,
        ),
    }  # fmt: skip
    write_run(setting, record)
    return [record]


def curves(host: Host, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Attention that visual tokens get: cls [prompts, tokens], others [prompts, layers, tokens].

    Args:
        host: of a model in eager attention, one crop per prompt.
        inputs: prompts, padded on either side.
    """
    place = list(encoder_layers(host.tower)).index(host.feature_module)
    tower = host.tower(pixel_values=inputs["pixel_values"], output_attentions=True).attentions
    maps = host.model(**inputs, output_attentions=True, use_cache=False).attentions
    ids, real = inputs["input_ids"], inputs["attention_mask"] > 0
    visual = ids == host.model.config.image_token_id
    count, at = host.shape.patches, torch.arange(ids.shape[1], device=ids.device)
    start = visual.long().argmax(-1, keepdim=True)
    tokens = start + torch.arange(count, device=ids.device)
    behind = (at >= start + count) & real
    last = (behind * at).argmax(-1)
    text = behind & (at != last[:, None])
    sees = torch.arange(count, 0, -1, device=ids.device)  # visual queries that see token j
    found: dict[str, list[Tensor]] = {"image": [], "text": [], "last": []}
    for weights in maps:
        seen = weights.double().mean(1)  # [prompts, queries, keys]
        seen = seen.gather(2, tokens[:, None].expand(-1, seen.shape[1], -1))
        own = seen.gather(1, tokens[..., None].expand(-1, -1, count))
        found["image"].append(own.sum(1) / sees)
        of_text = seen.masked_fill(~text[..., None], 0).sum(1)  # padding rows may hold anything
        found["text"].append(of_text / text.sum(1, keepdim=True))
        found["last"].append(seen[torch.arange(len(seen)), last])
    stacked = {name: torch.stack(layers, 1) for name, layers in found.items()}
    stacked["cls"] = tower[place].double().mean(1)[:, 0, 1:]
    return {name: values.cpu().numpy() for name, values in stacked.items()}


def shift(per_prompt: dict[str, np.ndarray]) -> dict[str, Any]:
    """Rank correlation of received attention with the token's index."""
    means = {name: _resampled(values) for name, values in per_prompt.items()}
    found = {name: _index_correlation(values) for name, values in means.items()}
    layers = {name: rho for name, rho in found.items() if name != "cls"}
    over = {name: rho.mean(1) for name, rho in layers.items()}
    n = len(per_prompt["cls"])
    return {
        "cls": _figure(found["cls"], n),
        **{name: _figure(rho, n) for name, rho in over.items()},
        **{f"{name}_minus_cls": _figure(rho - found["cls"], n) for name, rho in over.items()},
        "per_layer": {name: rho[0] for name, rho in layers.items()},
    }


def dispersion(per_prompt: dict[str, np.ndarray]) -> dict[str, Any]:
    """Share of the attention that the most attended tokens hold together."""
    layer = min(DISPERSION_LAYER, per_prompt["last"].shape[1] - 1)
    ordered = {}
    for name, values in (("cls", per_prompt["cls"]), ("last", per_prompt["last"][:, layer])):
        falling = -np.sort(-values, axis=-1)
        ordered[name] = (falling / falling.sum(-1, keepdims=True)).cumsum(-1)
    n, tokens = ordered["cls"].shape
    top = round(TOP * tokens) - 1
    share = {name: _resampled(100 * values[:, top]) for name, values in ordered.items()}
    return {
        "layer": layer,
        **{name: _figure(values, n) for name, values in share.items()},
        "cls_minus_last": _figure(share["cls"] - share["last"], n),
        "cumulative": {name: values.mean(0).round(5) for name, values in ordered.items()},
    }


def _resampled(values: np.ndarray) -> np.ndarray:
    """The mean over prompts, and that of `DRAWS` samples of as many prompts: [1 + draws, ...]."""
    n = len(values)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    weights = np.concatenate([np.ones((1, n)), drawn]) / n
    return np.tensordot(weights, values, 1)


def _index_correlation(values: np.ndarray) -> np.ndarray:
    """Spearman's rho of the last axis with its index."""
    ranks = rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(-1, keepdims=True)
    index = np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2
    length = np.sqrt((ranks**2).sum(-1) * (index**2).sum())
    return np.divide(ranks @ index, length, out=np.zeros_like(length), where=length > 0)


def _figure(resampled: np.ndarray, n: int) -> dict[str, float | int]:
    """A value with its 95 % interval, as `finding` claims read it."""
    low, high = np.quantile(resampled[1:], [0.025, 0.975])
    return {"value": float(resampled[0]), "low": float(low), "high": float(high), "n": n}
