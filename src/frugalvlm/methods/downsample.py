"""Image downsampling: shrink the picture, so that the vision tower itself makes fewer tokens.

No token is chosen or merged; the picture just has fewer pixels. The only baseline here that makes
the vision tower cheaper as well. In arXiv:2510.07143 it beats many methods on common benchmarks.

Source: the control of arXiv:2510.07143, there with towers that take pictures of any size.

1. The picture is resized (bicubic, with antialiasing) to r x c patches, as square as the untouched
   grid and with r * c <= T.
2. The tower's position embeddings are interpolated to that grid by the model's own code.
3. All of the tower's patches go to the language model; positions are renumbered.

Complexity: the vision tower on r * c patches.
Deviations: CLIP and SigLIP towers were trained at one size, so the small picture meets them
unprepared, as in any test of this control on LLaVA. A T that is no rectangle is not used up (7 of
12 x 12: 2 x 3); records hold the budget asked for and the tokens really kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from frugalvlm.methods.base import SizedReducer
from frugalvlm.views import MERGED_SOURCE, EncoderView, Reduced, Shape, UnsupportedError


@dataclass(frozen=True)
class Downsample(SizedReducer):
    """Shrink each crop to at most `kept_tokens` patches before the vision tower."""

    key: ClassVar[str] = "downsample"

    def check(self, shape: Shape) -> None:
        """The tower must take smaller pictures; the budget must be in 1..patches."""
        if not shape.resizes:
            raise UnsupportedError(
                "downsample shrinks pictures in front of the tower, and this family's processor "
                "has cut them into tokens by then: give the processor smaller pictures instead "
                "(size= or max_pixels=)."
            )
        super().check(shape)

    def small_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows r and columns c of the shrunk picture."""
        rows, cols = grid
        r = max(1, int((self.kept_tokens * rows / cols) ** 0.5))
        return r, min(cols, self.kept_tokens // r)

    def shrink(
        self, pixels: Float[Tensor, "crops 3 height width"], grid: tuple[int, int]
    ) -> Float[Tensor, "crops 3 new_height new_width"]:
        """The picture in r x c patches."""
        small = self.small_grid(grid)
        if small == grid:
            return pixels
        size = [
            n * side // full for n, side, full in zip(small, pixels.shape[2:], grid, strict=True)
        ]
        return interpolate(pixels, size, mode="bicubic", antialias=True)

    def reduce(self, view: EncoderView) -> Reduced:
        """All that the tower made of the small picture; a token stands for a region."""
        (rows, cols), (r, c) = view.grid, self.small_grid(view.grid)
        device = view.patches.device
        if (r, c) == view.grid:
            every = torch.arange(rows * cols, device=device)
            return Reduced(view.patches, every.expand(view.crops, -1))
        y, x = torch.arange(rows, device=device), torch.arange(cols, device=device)
        region = (y * r // rows)[:, None] * c + x * c // cols
        source = torch.full(view.patches.shape[:2], MERGED_SOURCE, device=device)
        return Reduced(view.patches, source, region.flatten().expand(view.crops, -1))
