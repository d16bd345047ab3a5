"""The LLaVA family on unmodified Transformers classes: LLaVA-1.5 and LLaVA-NeXT.

LLaVA: one crop per image, every placeholder one patch. LLaVA-NeXT: a base crop and tiles; the model
itself un-pads the tiles and adds newline tokens. Reduced tokens take no newlines and no un-padding,
as in the released code of the encoder-side methods: base crop first, then the tiles' patches in
raster order of the stitched picture, then [CLS] per tile, then merged tokens tile by tile.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from frugalvlm.hosts.base import Host, ImageLayout, encoder_layers
from frugalvlm.views import CLS_SOURCE, MERGED_SOURCE, Reduced, Shape, UnsupportedError


class LlavaHost(Host):
    """`LlavaForConditionalGeneration` with a CLIP or SigLIP tower."""

    @property
    def inner(self) -> nn.Module:
        """`LlavaModel`."""
        return self.model.model

    @property
    def tower(self) -> nn.Module:
        """`CLIPVisionModel` or `SiglipVisionModel`."""
        return self.inner.vision_tower

    @property
    def projector(self) -> nn.Module:
        """The two-layer MLP."""
        return self.inner.multi_modal_projector

    @property
    def language_model(self) -> nn.Module:
        """The decoder."""
        return self.inner.language_model

    @property
    def feature_layer(self) -> int:
        """Index of the tower layer whose output are the features.

        Raises:
            UnsupportedError: when the model concatenates several layers.
        """
        chosen = self.model.config.vision_feature_layer
        if not isinstance(chosen, int):
            raise UnsupportedError(
                "This model concatenates several vision layers; encoder-side methods need one "
                "vision_feature_layer."
            )
        count = len(encoder_layers(self.tower))
        # hidden_states has one entry more than there are layers: entry i + 1 leaves layer i.
        layer = (chosen if chosen >= 0 else count + 1 + chosen) - 1
        if not 0 <= layer < count:
            raise UnsupportedError(f"vision_feature_layer={chosen} names no tower layer's output.")
        return layer

    @property
    def feature_module(self) -> nn.Module:
        """The feature layer."""
        return encoder_layers(self.tower)[self.feature_layer]

    @property
    def shape(self) -> Shape:
        """Sizes from the configuration."""
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        has_cls = self.model.config.vision_feature_select_strategy == "default"
        layers = self.model.config.text_config.num_hidden_layers
        return Shape(side * side, (side, side), layers, has_cls)

    def images(self, placeholders: Tensor, inputs: dict) -> list[ImageLayout]:
        """Every image owns the next `patches` placeholders."""
        return _split(placeholders, self._lengths(placeholders, inputs))

    def _lengths(
        self, placeholders: Tensor, inputs: dict
    ) -> list[tuple[int, int, tuple[int, int]]]:
        """Placeholders, crops and tile grid of every image."""
        patches = self.shape.patches
        total = int(placeholders.sum())
        if total % patches:
            raise UnsupportedError(
                f"The prompt holds {total} image placeholders, not a multiple of {patches}; "
                "prepare it with the model's own processor."
            )
        return [(patches, 1, (0, 0))] * (total // patches)


class LlavaNextHost(LlavaHost):
    """`LlavaNextForConditionalGeneration`: base crop and tiles."""

    def _lengths(
        self, placeholders: Tensor, inputs: dict
    ) -> list[tuple[int, int, tuple[int, int]]]:
        sizes = inputs.get("image_sizes")
        if sizes is None:
            raise UnsupportedError("LLaVA-NeXT needs image_sizes; pass all the processor returns.")
        config, (rows, cols) = self.model.config, self.shape.grid
        lengths = []
        for height, width in torch.as_tensor(sizes).tolist():
            grid = get_anyres_image_grid_shape(
                (height, width), config.image_grid_pinpoints, config.vision_config.image_size
            )
            # The model's own cropping, asked for its shape only.
            stitched = torch.empty(1, grid[0] * rows, grid[1] * cols, device="meta")
            _, high, wide = unpad_image(stitched, (height, width)).shape
            length = rows * cols + high * (wide + 1)  # a newline token ends every row
            lengths.append((length, 1 + grid[0] * grid[1], grid))
        return lengths

    def order(self, image: ImageLayout, reduced: Reduced) -> Int[Tensor, " kept"] | None:
        """Base crop, tile patches by stitched raster, [CLS] per tile, merged per tile."""
        crops = torch.tensor(image.crops, device=reduced.source.device)
        source = reduced.source[crops]
        count, kept = source.shape
        rows, cols = self.shape.grid
        tile = torch.arange(count, device=source.device)[:, None] - 1
        slot = torch.arange(kept, device=source.device)[None]
        wide = max(1, image.grid[1])
        y = tile // wide * rows + source // cols
        x = tile % wide * cols + source % cols
        stitched = kept + y * (wide * cols) + x
        behind = kept + count * rows * cols
        key = torch.where(source == CLS_SOURCE, behind + tile, stitched)
        key = torch.where(source == MERGED_SOURCE, behind + count + tile * kept + slot, key)
        key = torch.where(tile < 0, slot, key)
        return key.flatten().argsort()


def _split(
    placeholders: Tensor, lengths: list[tuple[int, int, tuple[int, int]]]
) -> list[ImageLayout]:
    """Deal the placeholders of a batch out to its images, in reading order."""
    where = placeholders.nonzero().tolist()
    if sum(n for n, _, _ in lengths) != len(where):
        raise UnsupportedError(
            f"The prompt holds {len(where)} image placeholders, but its images have "
            f"{sum(n for n, _, _ in lengths)} tokens; prepare it with the model's own processor."
        )
    bounds = [0, *accumulate(n for n, _, _ in lengths)]
    crops = [0, *accumulate(c for _, c, _ in lengths)]
    images = []
    for (start, end), (first, last), (_, _, grid) in zip(
        pairwise(bounds), pairwise(crops), lengths, strict=True
    ):
        rows = {row for row, _ in where[start:end]}
        if len(rows) != 1:
            raise UnsupportedError(
                "An image's placeholders are spread over two prompts; check the batch."
            )
        images.append(
            ImageLayout(
                rows.pop(), tuple(s for _, s in where[start:end]), tuple(range(first, last)), grid
            )
        )
    return images
