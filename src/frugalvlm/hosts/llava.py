"""The LLaVA family on unmodified Transformers classes: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision.

LLaVA: one crop per image, every placeholder one patch. LLaVA-NeXT: a base crop and tiles; the model
itself un-pads the tiles and adds newline tokens. Reduced tokens take no newlines and no un-padding,
as in the released code of the encoder-side methods: base crop first, then the tiles' patches in
raster order of the stitched picture, then [CLS] per tile, then merged tokens tile by tile.
LLaVA-OneVision: pictures as in LLaVA-NeXT, unless a prompt shows several; videos with frames that
the model pools behind the projector: only methods inside the decoder can shorten them, and those
that reduce pooled frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from frugalvlm.hosts.base import (
    TOWERS,
    FamilyModule,
    Host,
    ImageLayout,
    TowerPass,
    deal,
    encoder_layers,
)
from frugalvlm.views import CLS_SOURCE, MERGED_SOURCE, Reduced, Shape, UnsupportedError


class LlavaHost(Host):
    """`LlavaForConditionalGeneration` with a CLIP or SigLIP tower."""

    @property
    def inner(self) -> FamilyModule:
        """`LlavaModel`."""
        return self.model.model

    @property
    def tower(self) -> FamilyModule:
        """`CLIPVisionModel` or `SiglipVisionModel`."""
        return self.inner.vision_tower

    @property
    def projector(self) -> FamilyModule:
        """The two-layer MLP."""
        return self.inner.multi_modal_projector

    @property
    def language_model(self) -> FamilyModule:
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

    @cached_property
    def feature_module(self) -> FamilyModule:
        """The feature layer."""
        return encoder_layers(self.tower)[self.feature_layer]

    @cached_property
    def shape(self) -> Shape:
        """Sizes from the configuration.

        Raises:
            UnsupportedError: when the features are not exactly the patches.
        """
        config = self.model.config
        if config.vision_config.model_type not in TOWERS:
            raise UnsupportedError(
                f"This model's vision tower is '{config.vision_config.model_type}'; the "
                f"{config.model_type} host reads {', '.join(TOWERS)}."
            )
        side = config.vision_config.image_size // config.vision_config.patch_size
        has_cls = any(name.endswith("class_embedding") for name, _ in self.tower.named_parameters())
        strategy = "default" if has_cls else "full"  # "default" drops the first feature
        if config.vision_feature_select_strategy != strategy:
            raise UnsupportedError(
                f"This vision tower has {'a' if has_cls else 'no'} [CLS] token, so its patches are "
                f"what vision_feature_select_strategy='{strategy}' gives; this model uses "
                f"'{config.vision_feature_select_strategy}'."
            )
        last = (-1, config.vision_config.num_hidden_layers)  # entries of hidden_states
        return Shape(
            side * side,
            (side, side),
            config.text_config.num_hidden_layers,
            has_cls,
            follows=config.vision_feature_layer not in last,
        )

    def images(
        self,
        placeholders: Bool[Tensor, "batch length"],
        inputs: dict,
        seen: TowerPass | None = None,
    ) -> list[ImageLayout]:
        """Deal the placeholders of a batch out to its images, in reading order."""
        sizes = self._sizes(int(placeholders.sum()), inputs)
        return deal(
            placeholders,
            (
                (length, crops, {"size": size, "tiles": tiles})
                for length, crops, size, tiles in sizes
            ),
        )

    def _sizes(
        self, placeholders: int, inputs: dict
    ) -> Iterator[tuple[int, int, tuple[int, int], tuple[int, int]]]:
        """Tokens, crops, pixel size and tile grid of every image."""
        patches = self.shape.patches
        for _ in range(-(-placeholders // patches)):
            yield patches, 1, (0, 0), (0, 0)


class LlavaNextHost(LlavaHost):
    """`LlavaNextForConditionalGeneration`: base crop and tiles."""

    def _sizes(
        self, placeholders: int, inputs: dict
    ) -> Iterator[tuple[int, int, tuple[int, int], tuple[int, int]]]:
        sizes = inputs.get("image_sizes")
        if sizes is None:
            raise UnsupportedError("LLaVA-NeXT needs image_sizes; pass all the processor returns.")
        config, (rows, cols) = self.model.config, self.shape.grid
        for height, width in torch.as_tensor(sizes).tolist():
            size = (height, width)
            tiles = get_anyres_image_grid_shape(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            # The model's own cropping, asked for its shape only.
            stitched = torch.empty(1, tiles[0] * rows, tiles[1] * cols, device="meta")
            _, high, wide = unpad_image(stitched, size).shape
            length = rows * cols + high * (wide + 1)  # a newline token ends every row
            yield length, 1 + tiles[0] * tiles[1], size, tiles

    def origin(self, image: ImageLayout) -> list[int]:
        """Base crop, then the un-padded stitched tiles row by row, -1 for newlines."""
        (rows, cols), (high, wide) = self.shape.grid, image.tiles
        tile = torch.arange(1, 1 + high * wide).view(high, 1, wide, 1)
        patch = torch.arange(rows * cols).view(1, rows, 1, cols)
        stitched = (tile * rows * cols + patch).reshape(1, high * rows, wide * cols)
        body = nn.functional.pad(unpad_image(stitched, image.size)[0], (0, 1), value=-1)
        return [*range(rows * cols), *body.flatten().tolist()]

    def order(self, image: ImageLayout, reduced: Reduced) -> Int[Tensor, " kept"] | None:
        """Base crop, tile patches by stitched raster, [CLS] per tile, merged per tile."""
        source = reduced.source[image.crops.start : image.crops.stop]
        count, kept = source.shape
        (rows, cols), wide = self.shape.grid, max(1, image.tiles[1])
        tile = torch.arange(count, device=source.device)[:, None] - 1
        slot = torch.arange(kept, device=source.device)[None]
        y = tile // wide * rows + source // cols
        x = tile % wide * cols + source % cols
        stitched = kept + y * (wide * cols) + x
        behind = kept + count * rows * cols
        key = torch.where(source == CLS_SOURCE, behind + tile, stitched)
        key = torch.where(source == MERGED_SOURCE, behind + count + tile * kept + slot, key)
        key = torch.where(tile < 0, slot, key)
        return key.flatten().argsort()


class LlavaOnevisionHost(LlavaNextHost):
    """`LlavaOnevisionForConditionalGeneration`: pictures in tiles, or videos."""

    def placeholders(self, ids: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
        """Places of pictures and of videos."""
        return super().placeholders(ids) | (ids == self.model.config.video_token_id)

    def _sizes(
        self, placeholders: int, inputs: dict
    ) -> Iterator[tuple[int, int, tuple[int, int], tuple[int, int]]]:
        clips = inputs.get("pixel_values_videos")
        if clips is None:
            yield from self._picture_sizes(placeholders, inputs)
        elif inputs.get("pixel_values") is not None:
            raise UnsupportedError(
                "Pictures and videos in one batch are not supported; pass them in separate batches."
            )
        else:
            rows, cols = self.shape.grid
            tokens = clips.shape[1] * math.ceil(rows / 2) * math.ceil(cols / 2)
            for _ in clips:
                crops = max(1, round(tokens / self.shape.patches))
                yield tokens + 1, crops, (0, 0), (clips.shape[1], 0)

    def _picture_sizes(
        self, placeholders: int, inputs: dict
    ) -> Iterator[tuple[int, int, tuple[int, int], tuple[int, int]]]:
        """As LLaVA-NeXT, but large pictures shrink, and one of several has a base crop only."""
        shown = inputs.get("batch_num_images")
        alone = [int(n) == 1 for n in ([] if shown is None else shown) for _ in range(int(n))]
        for i, (length, crops, size, tiles) in enumerate(super()._sizes(placeholders, inputs)):
            if alone and not alone[i]:
                yield self.shape.patches + 1, 1, (0, 0), (0, 0)
            elif (shrunk := self._shrunk(size, tiles)) is not None:
                high, wide = shrunk
                yield self.shape.patches + high * (wide + 1), crops, size, tiles
            else:
                yield length, crops, size, tiles

    def _shrunk(self, size: tuple[int, int], tiles: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns that the model shrinks a picture of many patches to; None: it does not.

        The rule of "anyres_max_9": no more than about nine crops' worth of patches.
        """
        rows, cols = self.shape.grid
        stitched = torch.empty(1, tiles[0] * rows, tiles[1] * cols, device="meta")
        _, high, wide = unpad_image(stitched, size).shape
        most = int(self.model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(high * wide / (most * rows * cols))
        return (int(high // ratio), int(wide // ratio)) if ratio > 1.1 else None

    def origin(self, image: ImageLayout) -> list[int]:
        """As LLaVA-NeXT; -1 for tokens that stand for several patches, shrunk or pooled."""
        patches = self.shape.patches
        if image.tiles[0] and not image.tiles[1]:  # a video
            return [-1] * len(image.slots)
        if not image.tiles[0]:  # one picture of several: a base crop and a newline
            return [*range(patches), -1]
        if self._shrunk(image.size, image.tiles) is not None:
            return [*range(patches), *[-1] * (len(image.slots) - patches)]
        return super().origin(image)
