"""Uniform selection: keep patches on an even grid, whatever the picture shows.

A control without any score. It has no cost, cannot lose a whole region, and is hard to beat at
small budgets.

Source: none; a usual control, as in arXiv:2502.11501.

1. Cut the grid of patches into T cells, as square and as equal as can be.
2. Keep the middle patch of every cell, in raster order.

Complexity: none.
Deviations: none. A budget that is no rectangle has bands of unlike numbers of cells (7 of 12 x 12:
bands of 2, 2 and 3), so that every budget is met exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from frugalvlm.methods.base import SizedReducer, grid_cells
from frugalvlm.views import EncoderView, Reduced


@dataclass(frozen=True)
class Uniform(SizedReducer):
    """Keep the middle patch of each of `kept_tokens` cells of the crop."""

    key: ClassVar[str] = "uniform"

    def reduce(self, view: EncoderView) -> Reduced:
        """The kept patches in raster order."""
        cols = view.grid[1]
        cells: list[list[int]] = [[] for _ in range(self.kept_tokens)]
        for patch, cell in enumerate(grid_cells(view.grid, self.kept_tokens)):
            cells[cell].append(patch)
        middle = sorted(
            (own[0] // cols + own[-1] // cols) // 2 * cols + (own[0] % cols + own[-1] % cols) // 2
            for own in cells
        )
        source = torch.tensor(middle, device=view.patches.device)
        return Reduced(view.patches[:, source], source.expand(view.crops, -1))
