"""Average pooling: the mean of the patches of every cell of an even grid.

The oldest way to hand a language model fewer visual tokens, and a control for every method that
merges by similarity: here only the place decides what is merged.

Source: none; a usual control, as in arXiv:2502.11501.

1. Cut the grid of patches into T cells, as square and as equal as can be.
2. A token is the mean of the features of its cell, before the projector.

Complexity: one product of a (T x patches) matrix with the features.
Deviations: cells do not overlap, and a budget that is no rectangle has bands of unlike numbers of
cells (7 of 12 x 12: bands of 2, 2 and 3), so that every budget is met exactly and each patch counts
once. Where the cells divide the grid evenly, this is average pooling as usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import one_hot

from frugalvlm.methods.base import SizedReducer, grid_cells
from frugalvlm.views import MERGED_SOURCE, EncoderView, Reduced


@dataclass(frozen=True)
class AvgPool(SizedReducer):
    """Average the patches of each of `kept_tokens` cells of the crop."""

    key: ClassVar[str] = "avgpool"

    def reduce(self, view: EncoderView) -> Reduced:
        """One token per cell, in raster order of the cells."""
        cells = torch.tensor(grid_cells(view.grid, self.kept_tokens), device=view.patches.device)
        member = one_hot(cells, self.kept_tokens).to(view.patches.dtype)
        tokens = (member / member.sum(0)).T @ view.patches
        source = torch.full(tokens.shape[:2], MERGED_SOURCE, device=tokens.device)
        return Reduced(tokens, source, cells.expand(view.crops, -1))
