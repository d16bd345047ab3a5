"""Controls without a picture: what a model answers of a question alone, and what it reads when.

A method is worth what it keeps beyond these. `Blank` shows one grey picture instead of every other,
`NoImage` hands the language model no visual token at all, and `NoImageAfter` takes all of them away
behind a decoder layer, so that nothing is chosen there.

Source: none; controls. Rows without visual tokens are printed in FasterVLM's tables
(arXiv:2412.01818), the exit behind a layer is `vtw` (arXiv:2405.05803) and Fig. 3 of DyVTE
(arXiv:2411.19628).
Complexity: none of their own. Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from frugalvlm.methods.base import EncoderReducer, FrameReducer, LayerReducer
from frugalvlm.methods.fastv import FastV
from frugalvlm.methods.fields import Limits
from frugalvlm.views import (
    EncoderView,
    Kept,
    LayerView,
    Reduced,
    Shape,
    UnsupportedError,
)


@dataclass(frozen=True)
class Blank(EncoderReducer):
    """Every picture is replaced by one mid grey; as many tokens as before."""

    key: ClassVar[str] = "blank"

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """No budget matters: all tokens are there, and all of them are grey."""
        return cls()

    def shrink(
        self, pixels: Float[Tensor, "crops 3 height width"], grid: tuple[int, int]
    ) -> Float[Tensor, "crops 3 height width"]:
        """Grey: the mean of what the processor makes of pictures is about 0."""
        return torch.zeros_like(pixels)

    def reduce(self, view: EncoderView) -> Reduced:
        """All that the tower made of grey."""
        every = torch.arange(view.patch_count, device=view.patches.device)
        return Reduced(view.patches, every.expand(view.crops, -1))


@dataclass(frozen=True)
class NoImage(FrameReducer):
    """No visual token reaches the language model."""

    key: ClassVar[str] = "no_image"

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """No budget matters: none is kept."""
        return cls()

    def reduce(self, view: EncoderView) -> Reduced:
        """Nothing."""
        nothing = torch.zeros(view.crops, 0, dtype=torch.long, device=view.patches.device)
        return Reduced(view.patches[:, :0], nothing)

    def reduce_frames(
        self, frames: Float[Tensor, "frames tokens width"], patches: int
    ) -> Float[Tensor, "frames 0 width"]:
        """Nothing of any frame; the newline behind a clip stays."""
        return frames[:, :0]


@dataclass(frozen=True)
class NoImageAfter(LayerReducer):
    """Drop all visual tokens behind decoder layer `layer`, whatever the depth."""

    key: ClassVar[str] = "no_image_after"
    layer: Annotated[int, Limits(1), "so many decoder layers still see the image"]

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """No budget matters: the layer is that of FastV's cut, K = 2."""
        return cls(FastV.k)

    def check(self, shape: Shape) -> None:
        """At least one layer with and one without the image."""
        if not 1 <= self.layer < shape.decoder_layers:
            raise UnsupportedError(
                f"The image can leave behind decoder layer 1 to {shape.decoder_layers - 1}, "
                f"not {self.layer}."
            )

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """One cut."""
        return (self.layer,)

    def keep(self, view: LayerView) -> Kept:
        """Nothing."""
        return Kept(view.visual[:, :0], (0,) * len(view.counts))
