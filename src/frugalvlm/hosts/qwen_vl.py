"""The Qwen-VL family on unmodified Transformers classes: Qwen2-VL, Qwen2.5-VL, Qwen3-VL.

A merger makes one token of 2 x 2 patches; every picture has a grid of its own, and every frame of a
video is a crop. Pictures have 3-D positions (time, row, column), which kept tokens keep, as in the
released code of UniPruneBench and LightCompress; `rope_deltas` stays that of the whole prompt. So
do methods that close gaps elsewhere (SparseVLM, PyramidDrop): no rule says how a gap in a grid
would close. A merged token has the place of its target, or of its first patch.

There is no [CLS]. What stands in for it is the attention that a unit receives in the tower's last
block, which sees the whole picture (blocks of Qwen2.5-VL before it see windows), mean over heads,
queries and the unit's four patches. Keys are those of that block behind their rotation, mean over
the four patches, as in LightCompress.

Qwen3-VL adds features of earlier tower blocks behind its first decoder layers (DeepStack). They go
with the unit that they are of: what merges units merges these with the same weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from frugalvlm.hosts.base import FamilyModule, ImageLayout, TowerPass
from frugalvlm.hosts.units import UnitHost, view_of
from frugalvlm.views import EncoderView, Shape, UnsupportedError

USUAL_SIDE = 448  # pixels; the picture whose number of tokens `shape` tells


class Qwen2VLHost(UnitHost):
    """`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`."""

    keeps_positions: ClassVar[bool] = True

    @property
    def tower(self) -> FamilyModule:
        """The vision tower, its merger included."""
        return self.inner.visual

    @property
    def projector(self) -> FamilyModule:
        """The merger of 2 x 2 patches."""
        return self.tower.merger

    @cached_property
    def shape(self) -> Shape:
        """Sizes from the configuration; patches are units of a picture of 448 x 448 pixels."""
        config = self.model.config
        side = USUAL_SIDE // (config.vision_config.patch_size * self._merge)
        return Shape(
            side * side,
            (side, side),
            config.text_config.num_hidden_layers,
            has_cls=False,
            varies=True,
            follows=False,
            resizes=False,
        )

    @property
    def read(self) -> dict[str, FamilyModule]:
        """The last block's attention (for its rotation) and its queries, keys and values."""
        attention = self.tower.blocks[-1].attn
        return {"attention": attention, "qkv": attention.qkv}

    def placeholders(self, ids: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
        """Places of pictures and of videos."""
        return super().placeholders(ids) | (ids == self.model.config.video_token_id)

    def sizes(self, inputs: dict, seen: TowerPass | None) -> Iterator[tuple[int, tuple[int, int]]]:
        """Frames and grid of units, from what the processor says of patches."""
        for frames, rows, cols in _grids(inputs, seen):
            yield frames, (rows // self._merge, cols // self._merge)

    def view(
        self,
        seen: TowerPass,
        image: ImageLayout,
        units: Float[Tensor, "crops units width"],
        features: Float[Tensor, "crops units text_width"],
    ) -> EncoderView:
        """Units in reading order; the tower has its patches in windows."""
        sizes = [rows * cols for t, rows, cols in _grids({}, seen) for _ in range(t)]
        start, crops = sum(sizes[: image.crops.start]), len(image.crops)
        own = slice(start, start + crops * sizes[image.crops.start])
        attention: FamilyModule = self.read["attention"]
        (given, _), (_, qkv) = seen.read["attention"], seen.read["qkv"]
        q, k, _ = qkv[own].unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        q, k = rotate(q, k, *(part[own] for part in given["position_embeddings"]))
        q, k = (part.unflatten(0, (crops, -1)).transpose(1, 2) for part in (q, k))
        order = self._reading_order(image.grid)

        def pool(values: Float[Tensor, "*rows patches"]) -> Float[Tensor, "*rows units"]:
            """Patches stand in groups of four, one group a unit."""
            mean = values.unflatten(-1, (-1, self._merge**2)).mean(-1)
            return mean if order is None else mean[..., order.to(mean.device)]

        pixels = seen.given["hidden_states"][own].unflatten(0, (crops, -1))
        return view_of(image.grid, units, features, q, k, attention.scaling, pixels, pool)

    @property
    def _merge(self) -> int:
        return self.model.config.vision_config.spatial_merge_size

    def _reading_order(self, grid: tuple[int, int]) -> Int[Tensor, " units"] | None:
        """Where the tower has each unit; None: in reading order."""
        config = self.model.config.vision_config
        if not hasattr(config, "window_size"):
            return None
        rows, cols = (side * self._merge for side in grid)
        index, _ = get_vision_window_index(
            torch.tensor([[1, rows, cols]]), self._merge, config.window_size, config.patch_size
        )
        return index.argsort()


class Qwen3VLHost(Qwen2VLHost):
    """`Qwen3VLForConditionalGeneration`."""

    @property
    def plane_layers(self) -> int:
        """One for each tower block whose features are added."""
        return len(self.model.config.vision_config.deepstack_visual_indexes)

    def planes(
        self, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Float[Tensor, "batch length width"]]]:
        """DeepStack's features where they belong, and 0 where text stands."""
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("visual_pos_masks")
        if mask is None:
            return kwargs, []
        where = mask.to(embeds.device)[..., None]
        planes = [
            torch.zeros_like(embeds).masked_scatter(where, added.to(embeds.device, embeds.dtype))
            for added in kwargs["deepstack_visual_embeds"]
        ]
        return {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": None}, planes

    def with_planes(self, planes: list[Float[Tensor, "batch length width"]]) -> dict[str, Any]:
        """DeepStack's features for every position."""
        if not planes:
            return {}
        everywhere = torch.ones(planes[0].shape[:2], dtype=torch.bool, device=planes[0].device)
        return {
            "visual_pos_masks": everywhere,
            "deepstack_visual_embeds": [plane.flatten(0, 1) for plane in planes],
        }


def _grids(inputs: dict, seen: TowerPass | None) -> list[tuple[int, int, int]]:
    """Frames, and rows and columns of patches, of every picture or video."""
    if seen is not None:
        return [tuple(grid) for grid in seen.given["grid_thw"].tolist()]
    pictures, videos = inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
    if pictures is not None and videos is not None:
        raise UnsupportedError(
            "Pictures and videos in one batch are not supported; pass them in separate batches."
        )
    grids = pictures if videos is None else videos
    if grids is None:
        raise UnsupportedError(
            "Qwen-VL needs image_grid_thw (video_grid_thw); pass all that the processor returns."
        )
    return [tuple(grid) for grid in torch.as_tensor(grids).tolist()]
