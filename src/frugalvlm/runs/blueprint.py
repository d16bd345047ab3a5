"""The papers' own architectures without weights: what a method costs, counted on the real modules.

Models are built on the meta device, so a 13-billion-parameter model takes no memory and its prefill
is counted in about a second on a laptop. Counts are exact for these shapes; nothing here has an
accuracy or a clock.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from frugalvlm.methods import SGL, Method
from frugalvlm.runs.costs import prefill_costs, visual_flops

# LLaVA-1.5's prompt around the image: 35 tokens before it (system sentence, "USER: "), and a short
# question with "ASSISTANT:" behind it.
TEXT_BEFORE, TEXT_AFTER = 35, 25

_CLIP_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
_VICUNA = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40},
}  # fmt: skip
IMAGE_TOKEN_ID = 32_000


@dataclass(frozen=True)
class Blueprint:
    """One architecture: its name in the papers, decoder size, and tiles per picture."""

    name: str
    decoder: str
    tiles: tuple[int, int] = (0, 0)  # rows and columns of tiles; (0, 0) for LLaVA-1.5

    @property
    def crops(self) -> int:
        """Pictures that the tower sees for one image."""
        rows, cols = self.tiles
        return 1 + rows * cols

    def build(self) -> PreTrainedModel:
        """The model on the meta device, in bfloat16."""
        vision = CLIPVisionConfig(**_CLIP_L_336)
        text = LlamaConfig(vocab_size=32_064, max_position_embeddings=4096, **_VICUNA[self.decoder])
        shared: dict[str, Any] = {
            "vision_config": vision, "text_config": text, "image_token_id": IMAGE_TOKEN_ID,
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "dtype": torch.bfloat16,
        }  # fmt: skip
        with torch.device("meta"):
            if not self.tiles[0]:
                model = LlavaForConditionalGeneration(LlavaConfig(**shared))
            else:
                side = _CLIP_L_336["image_size"]
                grid = [[self.tiles[0] * side, self.tiles[1] * side]]
                config = LlavaNextConfig(**shared, image_grid_pinpoints=grid)
                model = LlavaNextForConditionalGeneration(config)
        return model.to(torch.bfloat16).eval()

    def inputs(self) -> tuple[dict[str, Any], torch.Tensor]:
        """A prompt with one square picture on the meta device, and where its tokens are."""
        side = _CLIP_L_336["image_size"]
        patches = (side // _CLIP_L_336["patch_size"]) ** 2
        visual, extra = patches, {}
        pixels: tuple[int, ...] = (1, 3, side, side)
        if self.tiles[0]:
            rows, cols = (n * side // _CLIP_L_336["patch_size"] for n in self.tiles)
            visual += rows * (cols + 1)  # a newline token ends every row of the tiles
            pixels = (1, self.crops, 3, side, side)
            extra = {"image_sizes": torch.tensor([[self.tiles[0] * side, self.tiles[1] * side]])}
        length = TEXT_BEFORE + visual + TEXT_AFTER
        placeholders = torch.zeros(1, length, dtype=torch.bool)
        placeholders[:, TEXT_BEFORE : TEXT_BEFORE + visual] = True
        meta = torch.device("meta")
        return {
            "input_ids": torch.zeros(1, length, dtype=torch.long, device=meta),
            "pixel_values": torch.zeros(pixels, dtype=torch.bfloat16, device=meta),
            **extra,
        }, placeholders


BLUEPRINTS: dict[str, Blueprint] = {
    b.name: b
    for b in (
        Blueprint("LLaVA-1.5-7B", "7B"),
        Blueprint("LLaVA-1.5-13B", "13B"),
        Blueprint("LLaVA-NeXT-7B", "7B", (2, 2)),
        Blueprint("LLaVA-NeXT-13B", "13B", (2, 2)),
    )
}


def blueprint(name: str) -> Blueprint:
    """The architecture with this name.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in BLUEPRINTS:
        raise ValueError(f"Unknown blueprint '{name}'. Known: {', '.join(BLUEPRINTS)}.")
    return BLUEPRINTS[name]


@torch.inference_mode()
def count(model: PreTrainedModel, name: str, method: Method, budget: int) -> dict[str, Any]:
    """Count one method's prefill on a blueprint.

    Args:
        model: what `Blueprint.build` gave.
        name: the blueprint's name.
        method: the method, made for the budget per crop.
        budget: visual tokens of the whole image, as the paper names the row.

    Returns:
        One row of a blueprint record.
    """
    inputs, placeholders = blueprint(name).inputs()
    if isinstance(method, SGL) and method.guide is None:
        small = name.replace("13B", "7B")  # the smallest one with the same tower and prompt
        method = method.guided_by(blueprint(small).build(), small)
    # Meta tensors have no values, so Transformers cannot compare the number of placeholders.
    unchecked = mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")
    with unchecked, method.on(model, placeholders=placeholders) as trace:
        costs = prefill_costs(model, inputs, trace, int(placeholders.sum()))
    per_layer = trace.tokens_per_layer or [float(placeholders.sum())] * trace.decoder_layers
    return {
        "model": name,
        "method": method.key,
        "hyper_parameters": method.describe(),
        "budget": budget,
        **costs,
        "flops_visual": visual_flops(model, per_layer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "decoder_layers": trace.decoder_layers,
    }
