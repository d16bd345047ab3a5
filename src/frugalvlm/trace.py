"""What a method kept: counts per layer, kept patches, and their picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from frugalvlm.views import MERGED_SOURCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image


@dataclass
class Trace:
    """A record of the last prompt that went through a `with method.on(model)` block.

    Attributes:
        grid: rows and columns of patches of a crop.
        calls: prompts (batches) seen so far.
        tokens_per_layer: visual tokens at each decoder layer, mean over the images of the last
            batch; one entry per layer.
        spread: smallest and largest number of visual tokens over images, per layer.
    """

    grid: tuple[int, int]
    decoder_layers: int
    calls: int = 0
    tokens_per_layer: list[float] = field(default_factory=list)
    spread: list[tuple[int, int]] = field(default_factory=list)
    _source: Tensor | None = None
    _merged_into: Tensor | None = None
    _patches: int = 0

    @property
    def mean_tokens(self) -> float:
        """Visual tokens averaged over decoder layers (the average that some papers call budget).

        Raises:
            ValueError: before any prompt with an image went through.
        """
        self._need()
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)

    @property
    def kept(self) -> list[list[int]]:
        """Per crop (per image, for cuts inside the decoder), the patches that survived, ascending.

        [CLS] and merged tokens stand at no single patch and are not listed.
        """
        self._need()
        if self._source is None:
            return []
        return [sorted(i for i in row if i >= 0) for row in self._source.tolist()]

    @property
    def merged(self) -> list[dict[int, list[int]]]:
        """Per crop, which patches were folded into which output slot."""
        self._need()
        if self._merged_into is None:
            return []
        groups: list[dict[int, list[int]]] = []
        for row in self._merged_into.tolist():
            group: dict[int, list[int]] = {}
            for patch, slot in enumerate(row):
                if slot >= 0:
                    group.setdefault(slot, []).append(patch)
            groups.append(group)
        return groups

    def plot(self, image: Image, ax: Axes | None = None, crop: int = 0) -> Axes:
        """Draw the kept patches of one crop on its picture; the others are dimmed.

        Args:
            image: the picture of that crop.
            ax: axes to draw on; a new figure when absent.
            crop: which crop of the last batch.

        Raises:
            ValueError: when the last prompt had no image.
        """
        from frugalvlm.study.plots import draw_kept_patches

        self._need()
        kept = self.kept[crop] if self.kept else list(range(self.grid[0] * self.grid[1]))
        merged = self.merged[crop] if self.merged else {}
        return draw_kept_patches(image, self.grid, kept, merged, ax)

    def _need(self) -> None:
        if not self.tokens_per_layer:
            raise ValueError(
                "Nothing was traced: run the model on a prompt with an image inside the block."
            )

    def _start(self, counts: tuple[int, ...]) -> None:
        self.calls += 1
        self._source = self._merged_into = None
        self.tokens_per_layer, self.spread = [], []
        self._set_from(0, counts)

    def _set_from(self, layer: int, counts: tuple[int, ...]) -> None:
        """From `layer` on, images have these many visual tokens."""
        mean, spread = sum(counts) / len(counts), (min(counts), max(counts))
        rest = self.decoder_layers - layer
        self.tokens_per_layer = [*self.tokens_per_layer[:layer], *[mean] * rest]
        self.spread = [*self.spread[:layer], *[spread] * rest]

    def _reduced(self, source: Tensor, merged_into: Tensor | None) -> None:
        self._source = source.detach()
        self._merged_into = None if merged_into is None else merged_into.detach()

    def _cut(self, index: Tensor, counts: tuple[int, ...]) -> None:
        """A decoder layer kept `index` of the tokens that were there."""
        before = self._source
        source = index if before is None else _follow(before, index)
        rank = torch.arange(source.shape[1], device=source.device)
        limit = torch.tensor(counts, device=source.device)[:, None]
        self._source = source.masked_fill(rank >= limit, MERGED_SOURCE).detach()


def _follow(before: Tensor, index: Tensor) -> Tensor:
    if before.shape[0] != index.shape[0]:  # tiles: a decoder cut no longer knows crops
        return index
    return before.gather(1, index)
