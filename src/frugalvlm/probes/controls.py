"""Controls that bound what any choice of visual tokens can do. They know what no method may know.

The oracle keeps the patches of the things that a question is about; it is a method to the surgery,
but none of the kit's: nobody can use it on a picture of their own. `RandomCut` is a random choice
behind any layer, whose dice know a picture by its place in the batch. Controls that anybody may use
are among the methods (`Blank`, `NoImage`, `NoImageAfter` and the random twins of methods).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch

from frugalvlm.benchmarks.asking import Batches
from frugalvlm.methods import EncoderReducer, LayerReducer, Method
from frugalvlm.methods.base import check_budget
from frugalvlm.pocket.questions import Cell
from frugalvlm.pocket.scenes import GRID, Scene, make_scene
from frugalvlm.views import (
    EncoderView,
    Kept,
    LayerView,
    Reduced,
    Shape,
    UnsupportedError,
    keep_top,
)

__all__ = ["Chosen", "RandomCut", "blanked", "coverage", "oracle_for", "ranked_patches"]


@dataclass(frozen=True)
class Chosen(EncoderReducer):
    """Keep named patches, others for each crop of one batch; in raster order, renumbered."""

    key: ClassVar[str] = "oracle"
    patches: tuple[tuple[int, ...], ...]  # [crops][kept]

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> NoReturn:
        """Always refused: a budget does not say which patches."""
        raise UnsupportedError(
            "The oracle's patches follow from the questions: use `oracle_for`, or Chosen(patches)."
        )

    def check(self, shape: Shape) -> None:
        """As many patches for every crop, each of them once."""
        check_budget(len(self.patches[0]), shape.patches)
        for kept in self.patches:
            if len(kept) != len(self.patches[0]) or not set(kept) <= set(range(shape.patches)):
                raise UnsupportedError("Name equally many patches of the grid for every crop.")
            if len(set(kept)) < len(kept):
                raise UnsupportedError("A patch is named twice; name each once.")

    def reduce(self, view: EncoderView) -> Reduced:
        """The named patches in raster order."""
        if view.crops != len(self.patches):
            raise UnsupportedError(
                f"Patches are named for {len(self.patches)} crops and the batch has {view.crops}; "
                "the oracle needs one crop per prompt, in the order of the batch."
            )
        source = torch.tensor(self.patches, device=view.patches.device).sort(-1).values
        index = source[..., None].expand(-1, -1, view.patches.shape[-1])
        return Reduced(view.patches.gather(1, index), source)

    def describe(self) -> dict[str, Any]:
        """Name and count; which patches follows from the questions."""
        return {"method": self.key, "kept_tokens": len(self.patches[0])}


@dataclass(frozen=True)
class RandomCut(LayerReducer):
    """Keep random visual tokens behind decoder layer `k`: what a cut is worth without a ranking."""

    key: ClassVar[str] = "random_cut"
    kept_tokens: int
    k: int
    seed: int = 0

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> NoReturn:
        """Always refused: a budget does not say where to cut."""
        raise UnsupportedError("Build it with RandomCut(kept_tokens, k) of the rival method.")

    def check(self, shape: Shape) -> None:
        """Layer k must exist; the budget must be in 1..patches."""
        if not 1 <= self.k < shape.decoder_layers:
            raise UnsupportedError(
                f"A cut can lie behind decoder layer 1 to {shape.decoder_layers - 1}, not {self.k}."
            )
        check_budget(self.kept_tokens, shape.patches)

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """One cut."""
        return (self.k,)

    def keep(self, view: LayerView) -> Kept:
        """Random tokens, others for every picture of a batch; the same in every run."""
        dice = torch.Generator().manual_seed(self.seed)
        score = torch.rand(view.visual.shape, generator=dice).to(view.visual.device)
        return keep_top(score, view.per_crop(self.kept_tokens))


def blanked(batches: Batches) -> Batches:
    """The same questions about pictures that are one mid grey."""
    blank = copy.copy(batches)
    blank.batches = [
        (ids, {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])})
        for ids, inputs in batches.batches
    ]
    return blank


def oracle_for(
    batches: Batches,
    split: str,
    grid: tuple[int, int],
    kept_tokens: int,
    make: Callable[..., Scene] = make_scene,
) -> Callable[[Sequence[str]], Method]:
    """The oracle as a function of the question ids of a batch.

    Args:
        batches: the questions.
        split: theirs, so that scenes can be rebuilt from their seeds.
        grid: rows and columns of patches.
        kept_tokens: patches that each picture keeps.
        make: gives the scene of a split and a seed.
    """
    chosen: dict[str, tuple[int, ...]] = {}
    for row in batches.rows:
        scene = make(split, row["scene_seed"])
        about = [(r, c) for r, c in row["about"]]
        chosen[row["question_id"]] = tuple(ranked_patches(scene, about, grid)[:kept_tokens])
    return lambda ids: Chosen(tuple(chosen[i] for i in ids))


def ranked_patches(scene: Scene, about: Sequence[Cell], grid: tuple[int, int]) -> list[int]:
    """All patches of a picture, those first that a question is about.

    1. Patches of the asked-for cells that a thing (or the plate) touches, 2. the other patches of
    these cells, 3. patches that other things touch, 4. the ground. Within each of the four, cells
    take turns, and a cell gives the most covered patch first, then the one nearest to the middle
    of what is covered: a small budget gets the heart of every asked-for thing.

    Args:
        scene: what the picture shows.
        about: cells (row, column) of the scene's 3x3 layout; none means that things come first.
        grid: rows and columns of patches, multiples of 3.
    """
    covered, (rows, cols) = coverage(scene, grid), grid
    high, wide = rows // GRID, cols // GRID
    keys: dict[int, tuple[int, int, int]] = {}
    for number, (cell_row, cell_col) in enumerate(np.ndindex(GRID, GRID)):
        own = [
            (r, c)
            for r in range(cell_row * high, (cell_row + 1) * high)
            for c in range(cell_col * wide, (cell_col + 1) * wide)
        ]
        weights = np.array([covered[p] for p in own])
        middle = np.average(own, axis=0, weights=weights if weights.any() else None)
        distance = np.abs(np.array(own) - middle).sum(1).round(6)
        for turn, i in enumerate(np.lexsort((distance, -weights))):
            tier = 2 * ((cell_row, cell_col) not in set(about)) + (weights[i] == 0)
            keys[own[i][0] * cols + own[i][1]] = int(tier), turn, number
    return sorted(keys, key=keys.__getitem__)


def coverage(scene: Scene, grid: tuple[int, int]) -> np.ndarray:
    """Share of each patch that lies in the box of a thing or of the plate: [rows, cols], 0..1."""
    canvas = np.zeros((scene.side, scene.side))
    boxes = [(t.x, t.y, t.size, t.size) for t in scene.things]
    if scene.plate is not None:
        boxes.append((scene.plate.x, scene.plate.y, *scene.plate.size))
    for x, y, width, height in boxes:
        canvas[y : y + height, x : x + width] = 1
    rows, cols = grid
    return canvas.reshape(rows, scene.side // rows, cols, scene.side // cols).mean((1, 3))
