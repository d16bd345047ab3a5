"""InternVL 3 and 3.5 on unmodified Transformers classes (the `-HF` checkpoints).

A picture is cut into tiles, a small view of the whole comes last; of each tile pixel shuffle makes
one token of 2 x 2 patches, in front of the projector. A run of placeholders is a picture; every
frame of a video is one. Budgets are per tile, as in LLaVA-NeXT (UniPruneBench pools the tiles of a
picture); positions close up, as in UniPruneBench.

The tower has a [CLS] token: its attention in the layer of the features ranks patches, and a unit
has the mean of its four. It has the tower's width and takes no part in pixel shuffle, so it cannot
be handed over: VisionZip keeps D patches instead of [CLS] and D - 1. The features leave the last
layer, so nothing reads them (PruMerge).
"""

from __future__ import annotations

from typing import Any

from frugalvlm.hosts.base import FamilyModule
from frugalvlm.hosts.units import TileHost
from frugalvlm.views import UnsupportedError


class InternVLHost(TileHost):
    """`InternVLForConditionalGeneration`."""

    @property
    def tower(self) -> FamilyModule:
        """`InternVLVisionModel`."""
        return self.inner.vision_tower

    @property
    def projector(self) -> FamilyModule:
        """The two-layer MLP."""
        return self.inner.multi_modal_projector

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a tile."""
        config = self.model.config.vision_config
        rows, cols = (
            size // patch for size, patch in zip(config.image_size, config.patch_size, strict=True)
        )
        return rows, cols

    @property
    def side(self) -> int:
        """Pixel shuffle makes one token of so many rows and columns."""
        return round(1 / self.model.config.downsample_ratio)

    @property
    def has_cls(self) -> bool:
        """[CLS] comes first, and is left out of the features.

        Raises:
            UnsupportedError: when it is not left out.
        """
        if self.model.config.vision_feature_select_strategy != "default":
            raise UnsupportedError(
                "InternVL's tower has a [CLS] token, so its patches are what "
                "vision_feature_select_strategy='default' gives; this model uses "
                f"'{self.model.config.vision_feature_select_strategy}'."
            )
        return True

    @property
    def attention(self) -> FamilyModule:
        """That of the last layer.

        Raises:
            UnsupportedError: when the features leave another one.
        """
        if self.model.config.vision_feature_layer != -1:
            raise UnsupportedError(
                "The features of InternVL leave the tower's last layer; this model has "
                f"vision_feature_layer={self.model.config.vision_feature_layer}."
            )
        return self.tower.encoder.layer[-1].attention

    @property
    def read(self) -> dict[str, FamilyModule]:
        """Queries and keys behind their norms, which act before heads are split."""
        attention: Any = self.attention
        return {"queries": attention.q_norm, "keys": attention.k_norm, "attention": attention}
