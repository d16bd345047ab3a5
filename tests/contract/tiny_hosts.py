"""Tiny models of every host family, built from configurations, and prompts for them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from frugalvlm.engine.guidance import Guide
from frugalvlm.methods import (
    AIM,
    METHODS,
    SGL,
    AIMMask,
    EarlyExit,
    EncoderReducer,
    GSearch,
    LayerReducer,
    Method,
    SparseVLMRank,
    Vanilla,
    VisionZip,
    VisionZipMean,
)
from frugalvlm.methods.base import DepthPolicy, GuidedReducer
from frugalvlm.methods.trained import Learnt, Sizes, TrainedMethod, sample_of

HOSTS = ("llava_clip", "llava_siglip", "llava_gqa", "llava_next", "llava_onevision")
TILED = ("llava_next", "llava_onevision")  # pictures in a base crop and tiles
NO_CLS = ("llava_siglip", "llava_onevision")
UNSUPPORTED = {  # these must refuse; see test_refusals
    (key, host) for key, method in METHODS.items() if method.needs_cls for host in NO_CLS
}
# Methods that are written once more, from their papers, in reference*.py. Any other one is held
# against its own answers; see reference_answers.py.
OWN_REFERENCE = (
    "vanilla", "random", "uniform", "avgpool", "downsample", "tome", "divprune", "prumerge_plus",
    "fastv", "fastervlm", "visionzip", "visionzip_mean", "early_exit", "aim", "aim_mask",
    "pyramiddrop", "gsearch", "sparsevlm", "sparsevlm_rank", "sgl", "dyvte",
)  # fmt: skip
# Methods that act while an answer is decoded and leave visual tokens alone: contracts about kept
# tokens, and about passes that decode nothing, do not speak of them. See tests/methods.
DEPTH = tuple(key for key, method in METHODS.items() if issubclass(method, DepthPolicy))
UNTRACED = DEPTH
ADAPTIVE = tuple(key for key, method in METHODS.items() if method.adaptive)
PAIRS = [
    (key, host)
    for key in METHODS
    for host in HOSTS
    if key not in DEPTH and (key, host) not in UNSUPPORTED
]
EVERY = [*PAIRS, *((key, host) for key in DEPTH for host in HOSTS)]

# Methods that cut more than once: tokens per crop at every layer, where `make` keeps KEPT.
SCHEDULES = {"gsearch": (16, 16, 10, 6), "pyramiddrop": (16, 11, 8, 6)}

VOCAB, PAD, BOS, IMAGE, VIDEO = 64, 0, 1, 60, 61
CROP, SIDE = 24, 4  # a crop is 24 pixels and 4 x 4 patches wide
PATCHES, LAYERS, KEPT, K = SIDE * SIDE, 4, 6, 2
GRIDS = [[48, 48], [24, 48]]  # LLaVA-NeXT: 2 x 2 tiles, 1 x 2 tiles


def make(key: str, kept: int = KEPT) -> Method:
    """A method that keeps `kept` of 16 tokens per crop; two of them merged, where it merges."""
    if key == "vanilla":
        return Vanilla()
    if key == "early_exit":
        return EarlyExit(threshold=0.25)  # about every third token leaves early
    if key == "gsearch":
        rates = (1.0, 1.0, min(kept + 4, PATCHES) / PATCHES, kept / PATCHES)
        return GSearch(rates=rates)
    if key == "sgl":
        return Guided(kept, K / LAYERS)
    if key in ("aim", "aim_mask"):  # pruned before layers 2 and 3
        return {"aim": AIM, "aim_mask": AIMMask}[key](kept, l1=1, l2=4, prune=kept < PATCHES)
    if key == "sparsevlm_rank" and kept < PATCHES:
        return SparseVLMRank(scale=kept / 3, bias=1.0)
    if key in ("visionzip", "visionzip_mean") and kept < PATCHES:
        return {"visionzip": VisionZip, "visionzip_mean": VisionZipMean}[key](kept - 2, 2)
    if issubclass(METHODS[key], DepthPolicy):
        return METHODS[key].for_budget(PATCHES, PATCHES)
    method = METHODS[key].for_budget(kept, PATCHES)
    if isinstance(method, TrainedMethod):
        return with_tiny_weights(method, {PATCHES: 0.0, KEPT - 1: -1.0}.get(kept, 1.0))
    return with_tiny_guide(method) if isinstance(method, GuidedReducer) else method


def several_cuts(key: str) -> bool:
    """Whether a method without a reference of its own says itself what is left at which layer."""
    method = make(key)
    if key in OWN_REFERENCE or not isinstance(method, LayerReducer) or method.masks_only:
        return False
    return len(method.layers(LAYERS)) > 1 or isinstance(method, EncoderReducer)


def layer_tokens(key: str, picture: Picture, host: str) -> list[int]:
    """Visual tokens of a picture at each decoder layer under `make(key)`."""
    whole, crops = picture.tokens(host), picture.crops(host)
    if key == "vanilla":
        return [whole] * LAYERS
    if key in ("fastv", "sgl"):
        return [whole] * K + [KEPT * crops] * (LAYERS - K)
    if key in SCHEDULES:
        return [whole if n == PATCHES else n * crops for n in SCHEDULES[key]]
    if key == "aim":
        return [KEPT * crops, KEPT * crops, KEPT * crops * 2 // 3, KEPT * crops // 3]
    if key == "sparsevlm":
        counts = [whole]
        for kept in (9 * crops, 6 * crops, 3 * crops):  # shares of 300, 200, 110 of 192
            pool = int(0.3 * (counts[-1] - kept)) + 1
            counts.append(kept + pool // 10 + 1)
        return counts
    if several_cuts(key):  # what it says of the picture alone; that it keeps the budget is tested
        return traced_tokens(key, picture, host)
    method = make(key)
    if key not in OWN_REFERENCE and not isinstance(method, EncoderReducer):
        (cut,) = method.layers(LAYERS)
        return (
            [whole] * LAYERS
            if method.masks_only
            else ([whole] * cut + [KEPT * crops] * (LAYERS - cut))
        )
    return [KEPT * crops] * LAYERS


def traced_tokens(key: str, picture: Picture, host: str) -> list[int]:
    """Visual tokens of a picture at each decoder layer, by the trace of a run with it alone."""
    model = model_for(host)
    with make(key).on(model) as trace, torch.no_grad():
        model(**prompt(host, [[3, picture, 5]]))
    return [int(count) for count in trace.tokens_per_layer]


@cache
def model_for(host: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """A model with weights large enough that attention is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(host, attention)
    enliven(model, len(host))
    return model.to(dtype).eval()


@torch.no_grad()
def enliven(model: Any, seed: int) -> None:
    """Larger random weights, so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.copy_(noise * (0.8 if "embed" in name else 0.25))
        else:
            weight.add_(noise * 0.1)
    model.lm_head.weight[[IMAGE, VIDEO]] = 0.0  # never says a placeholder


@cache
def guide_for(model: Any) -> Guide:
    """A small model of the model's own family: two decoder layers, weights of its own."""
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers = 2
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:2]
    config._attn_implementation = "sdpa"
    meta = next(model.parameters()).is_meta
    with torch.random.fork_rng(), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(1)
        small = type(model)(config)
    if not meta:
        enliven(small, 99)
    return Guide(small.to(model.dtype).eval(), "tiny", max_new_tokens=3)


@dataclass(frozen=True)
class Guided(SGL):
    """SGL with the tiny guide of whichever model it is put on."""

    def on(self, model: Any, placeholders: torch.Tensor | None = None) -> Any:
        """As SGL's own."""
        return SGL(self.kept_tokens, self.depth, guide=guide_for(model)).on(model, placeholders)


def with_tiny_guide(method: GuidedReducer) -> GuidedReducer:
    """A guided method with the tiny guide of whichever model it is put on."""
    kind = type(method)

    class WithTinyGuide(kind):  # type: ignore[misc, valid-type]
        def on(self, model: Any, placeholders: torch.Tensor | None = None) -> Any:
            """As the method's own."""
            return kind.on(replace(self, guide=guide_for(model)), model, placeholders)

    own = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
    return WithTinyGuide(**own)


def with_tiny_weights(method: TrainedMethod, factor: float) -> TrainedMethod:
    """A method that learns, with random weights for whichever model it is put on.

    Times 0 they keep everything, times -1 they are others than times 1.
    """
    kind = type(method)

    class WithTinyWeights(kind):  # type: ignore[misc, valid-type]
        def weights(self, model: Any) -> dict[str, torch.Tensor]:
            """What it is put on this model with."""
            return tiny_weights(kind, model, factor).own.state_dict()

        def on(self, model: Any, placeholders: torch.Tensor | None = None) -> Any:
            """As the method's own."""
            if not hasattr(getattr(model, "config", None), "vision_config"):
                return kind.on(self, model, placeholders)
            learnt = tiny_weights(kind, model, factor)
            return kind.on(replace(self, learnt=learnt), model, placeholders)

    own = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
    return WithTinyWeights(**own)


def tiny_weights(kind: Any, model: Any, factor: float) -> Learnt:
    """Random weights of a method for a model."""
    sizes = Sizes.of(model)
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(3)
        own = kind().build(sizes).to(torch.float64)
        for name, weight in own.named_parameters():
            weight.data *= 1.0 if "w1" in name else factor  # of gates only what they say last
    return Learnt(own, {}, sizes, sample_of(model), "tiny")


def build(host: str, attention: str = "sdpa") -> PreTrainedModel:
    """A fresh model with the library's own small weights."""
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "hidden_size": 32}
    tower: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": CROP, "patch_size": CROP // SIDE,
    }  # fmt: skip
    text: dict[str, Any] = {**sizes, "intermediate_size": 48, "vocab_size": VOCAB}
    text |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None}
    siglip = host in NO_CLS
    shared: dict[str, Any] = {
        "vision_config": (SiglipVisionConfig if siglip else CLIPVisionConfig)(**tower),
        "text_config": Qwen2Config(**text, num_key_value_heads=2)
        if host in ("llava_gqa", "llava_onevision")
        else LlamaConfig(**text, num_key_value_heads=4),
        "image_token_id": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full" if siglip else "default",
        "attn_implementation": attention,
    }
    if host == "llava_onevision":
        config = LlavaOnevisionConfig(**shared, video_token_id=VIDEO, image_grid_pinpoints=GRIDS)
        return LlavaOnevisionForConditionalGeneration(config).eval()
    if host == "llava_next":
        config = LlavaNextConfig(**shared, image_grid_pinpoints=GRIDS)
        return LlavaNextForConditionalGeneration(config).eval()
    return LlavaForConditionalGeneration(LlavaConfig(**shared)).eval()


@dataclass(frozen=True)
class Picture:
    """One random picture. The size matters where pictures are cut into tiles."""

    seed: int
    height: int = 48
    width: int = 48

    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles: very wide pictures get 1 x 2."""
        return (1, 2) if self.width >= 2 * self.height else (2, 2)

    def crops(self, host: str) -> int:
        """Crops that the tower sees."""
        rows, cols = self.tiles()
        return 1 + rows * cols if host in TILED else 1

    def tokens(self, host: str) -> int:
        """Placeholders in the prompt: patches, or base + un-padded rows with newlines."""
        if host not in TILED:
            return PATCHES
        rows, cols = (n * SIDE for n in self.tiles())
        if self.width * rows > self.height * cols:
            margin = (rows - int(self.height * cols / self.width)) // 2
            rows -= 2 * margin
        else:
            margin = (cols - int(self.width * rows / self.height)) // 2
            cols -= 2 * margin
        return PATCHES + rows * (cols + 1)

    def pixels(self, host: str) -> torch.Tensor:
        """[crops, 3, 24, 24]."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.crops(host), 3, CROP, CROP, generator=generator).double()


Row = list["Picture | int"]  # a prompt: pictures, and numbers of text tokens

ONE: list[Row] = [[3, Picture(1), 5]]
# Rows of different length, two pictures, none, another one, pictures at both ends of the text.
MANY: list[Row] = [
    [2, Picture(2, 32, 48), 4],
    [2, Picture(3), 1, Picture(4, 16, 48), 3],
    [6],
    [7, Picture(5), 2],
]


def prompt(
    host: str, rows: list[Row] = ONE, side: str = "left", dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """What a processor would return for these prompts, padded on one side."""
    ids, pictures = [], []
    for row in rows:
        seed = sum(p.seed if isinstance(p, Picture) else p for p in row)
        generator = torch.Generator().manual_seed(seed)
        line = [BOS]
        for part in row:
            if isinstance(part, Picture):
                line += [IMAGE] * part.tokens(host)
                pictures.append(part)
            else:
                line += torch.randint(2, IMAGE, (part,), generator=generator).tolist()
        ids.append(line)
    longest = max(map(len, ids))

    def padded(line: list[int], fill: int) -> list[int]:
        rest = [fill] * (longest - len(line))
        return rest + line if side == "left" else line + rest

    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([padded(line, PAD) for line in ids]),
        "attention_mask": torch.tensor([padded([1] * len(line), 0) for line in ids]),
    }
    if pictures:
        pixels = [p.pixels(host).to(dtype) for p in pictures]
        if host in TILED:
            most = max(map(len, pixels))
            blank = torch.zeros(most, 3, CROP, CROP, dtype=dtype)
            inputs["pixel_values"] = torch.stack([torch.cat([p, blank[len(p) :]]) for p in pixels])
            inputs["image_sizes"] = torch.tensor([[p.height, p.width] for p in pictures])
        else:
            inputs["pixel_values"] = torch.cat(pixels)
    return inputs


def pictures_of(row: Row) -> list[Picture]:
    """The pictures of a prompt."""
    return [part for part in row if isinstance(part, Picture)]


def steps_by_hand(
    model: Any, inputs: dict[str, Any], tokens: torch.Tensor, chunks: list[int],
    with_mask: bool = True, with_positions: bool = True,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """Logits behind the prompt and behind each of `tokens` [batch, n], fed in chunks; the cache.

    Unlike those of `generate`, they are not rounded to float32.
    """
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    feed = {k: v for k, v in inputs.items() if k != "attention_mask"}
    cache, logits, start = None, [], 0
    next_position = positions.max(-1, keepdim=True).values + 1
    for size in [0, *chunks]:
        if size:
            feed = {"input_ids": tokens[:, start : start + size], "past_key_values": cache}
            mask = torch.cat([mask, torch.ones_like(mask[:, :1]).expand(-1, size)], 1)
            positions = next_position + torch.arange(start, start + size)
            start += size
        if with_mask:
            feed["attention_mask"] = mask
        if with_positions:
            feed["position_ids"] = positions
        with torch.no_grad():
            out = model(**feed, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[:, -max(size, 1) :])
    return torch.cat(logits, 1), cache


def cache_lengths(cache: Any) -> list[int]:
    """How many tokens each decoder layer really remembers."""
    return [layer.keys.shape[-2] for layer in cache.layers]


def fingerprint_of(model: Any) -> dict[str, Any]:
    """Everything about a model that a careless method could leave changed."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
        state[name] = (
            sorted(module.__dict__),
            [list(h) for h in hooks],
            [list(module._forward_hooks_with_kwargs), list(module._forward_pre_hooks_with_kwargs)],
            module.__dict__.get("forward"),
            type(module),
            list(module._modules),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
    return state
