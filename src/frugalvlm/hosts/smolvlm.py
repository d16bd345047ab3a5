"""SmolVLM, SmolVLM2 and Idefics3 on unmodified Transformers classes.

A picture is cut into tiles, a small view of the whole comes last; the connector makes one token
of s x s patches of a tile (s is `scale_factor`). In the prompt the tiles of a picture stand apart,
with tags of text between them. So every tile counts as an image of its own: it has its budget, and
the text behind it begins with the next tag. Tags stay. Positions close up.

There is no [CLS]. What stands in for it is the attention that a unit receives in the tower's last
layer, mean over heads, queries and the unit's patches.
"""

from __future__ import annotations

from typing import ClassVar

from frugalvlm.hosts.base import FamilyModule
from frugalvlm.hosts.units import TileHost


class SmolVLMHost(TileHost):
    """`SmolVLMForConditionalGeneration` and `Idefics3ForConditionalGeneration`."""

    has_cls: ClassVar[bool] = False

    @property
    def tower(self) -> FamilyModule:
        """A tower like SigLIP."""
        return self.inner.vision_model

    @property
    def projector(self) -> FamilyModule:
        """Pixel shuffle and one linear layer."""
        return self.inner.connector

    @property
    def language_model(self) -> FamilyModule:
        """The decoder."""
        return self.inner.text_model

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a tile."""
        config = self.model.config.vision_config
        side = config.image_size // config.patch_size
        return side, side

    @property
    def side(self) -> int:
        """Patches that a unit is high and wide."""
        return self.model.config.scale_factor

    @property
    def attention(self) -> FamilyModule:
        """That of the last layer."""
        return self.tower.encoder.layers[-1].self_attn
