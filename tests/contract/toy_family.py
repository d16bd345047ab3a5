"""A family that nobody knows, added by the guide in `frugalvlm/hosts/base.py`: model and host.

A LLaVA whose projector is followed by the mean of 2 x 2 tokens: reduced patches cannot go in.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from frugalvlm.hosts.base import FamilyModule
from frugalvlm.hosts.units import TileHost


class ToyConfig(LlavaConfig):
    """As LLaVA's."""

    model_type = "toy"


class ToyModel(LlavaModel):
    """Pools what the projector makes."""

    config_class = ToyConfig

    def get_image_features(self, pixel_values: Any, **kwargs: Any) -> Any:
        """A quarter of the tokens."""
        out = super().get_image_features(pixel_values, **kwargs)
        made = []
        for tokens in out.pooler_output:
            side = int(len(tokens) ** 0.5)
            cells = tokens.unflatten(0, (side // 2, 2, side // 2, 2))
            made.append(cells.mean((1, 3)).flatten(0, 1))
        out.pooler_output = made
        return out


class ToyForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)
        self.post_init()


class ToyHost(TileHost):
    """Everything that the engine must know of the family."""

    @property
    def tower(self) -> FamilyModule:
        """CLIP's."""
        return self.inner.vision_tower

    @property
    def projector(self) -> FamilyModule:
        """The MLP in front of the pooling."""
        return self.inner.multi_modal_projector

    @property
    def tile_grid(self) -> tuple[int, int]:
        """A picture is one tile."""
        config = self.model.config.vision_config
        side = config.image_size // config.patch_size
        return side, side

    @property
    def side(self) -> int:
        """2 x 2 patches make a token."""
        return 2

    @property
    def has_cls(self) -> bool:
        """CLIP has one."""
        return True

    @property
    def attention(self) -> FamilyModule:
        """That of the layer whose output are the features: the last but one."""
        layers = next(m for n, m in self.tower.named_modules() if n.endswith("encoder.layers"))
        return layers[-2].self_attn
