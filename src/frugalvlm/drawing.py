"""The picture of what a method kept. Colours are safe for the colour-blind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from PIL import Image as pil
from PIL.Image import Image


def crops_seen(image: Image, processor: Any) -> list[Image]:
    """What a vision tower sees of a picture: its crops, the base crop first.

    The processor resizes, cuts and tiles the picture; what it does to colours is undone.

    Args:
        image: any picture.
        processor: of a model, or its image processor.
    """
    reads = getattr(processor, "image_processor", processor)
    pixels = np.asarray(reads(images=image, return_tensors="pt")["pixel_values"], dtype=float)
    pixels = np.moveaxis(pixels.reshape(-1, *pixels.shape[-3:]), 1, -1)
    if reads.do_normalize:
        pixels = pixels * np.array(reads.image_std) + np.array(reads.image_mean)
    pixels = pixels / (reads.rescale_factor if reads.do_rescale else 1)
    return [pil.fromarray(crop.round().clip(0, 255).astype("uint8")) for crop in pixels]


def draw_kept_patches(
    image: Image,
    grid: tuple[int, int],
    kept: Sequence[int],
    merged: Mapping[int, Sequence[int]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw which patches of a picture the language model still sees.

    Kept patches stay as they are and get a yellow edge. Merged ones are tinted, one tint and edge
    per group, for each group is one token. Dropped patches are darkened.

    Args:
        image: the picture the tower saw.
        grid: rows and columns of patches.
        kept: patches that survived, row by row from 0.
        merged: for each merged token the patches folded into it.
        ax: axes to draw on; a new figure when absent.

    Raises:
        ValueError: when a patch lies outside the grid.
    """
    merged = dict(merged or {})
    labels = _labels(grid, kept, merged)
    if ax is None:
        ax = plt.figure(figsize=(4, 4), layout="constrained").subplots()
    pixels = np.asarray(image.convert("RGB"), dtype=float) / 255
    shown = _shaded(pixels, _upsampled(labels, pixels.shape[:2]))
    height, width = pixels.shape[:2]
    ax.imshow(shown, extent=(0, width, height, 0), interpolation="nearest")
    scale = np.array([width / grid[1], height / grid[0]])
    groups = _borders(labels, labels > 0)
    ax.add_collection(LineCollection(groups * scale, colors="white", linewidths=0.8))
    edges = _borders(labels == _IS_KEPT, labels == _IS_KEPT)
    ax.add_collection(LineCollection(edges * scale, colors=KEPT_EDGE, linewidths=1.4))
    ax.set(xticks=[], yticks=[], title=count_text(grid, kept, merged))
    ax.title.set_fontsize(9)
    return ax


_DROPPED = 0.22  # brightness of what was dropped
KEPT_EDGE = "#ffe94d"
# Tints of merged groups: bright enough to be told from a dropped patch at a glance.
# Cool ones only, for the edge of kept patches is yellow.
TINTS = ("#56b4e9", "#cc79a7", "#009e73", "#8c8cff", "#2a6fbb", "#e3a6d4", "#62c7a8", "#b8b8ff")
_IS_DROPPED, _IS_KEPT = 0, -1  # labels of patches; merged groups count from 1


def _labels(
    grid: tuple[int, int], kept: Sequence[int], merged: Mapping[int, Sequence[int]]
) -> np.ndarray:
    rows, cols = grid
    listed = [*kept, *(patch for patches in merged.values() for patch in patches)]
    outside = [patch for patch in listed if not 0 <= patch < rows * cols]
    if outside:
        raise ValueError(f"Patch {outside[0]} lies outside a grid of {rows} x {cols} patches.")
    labels = np.full(rows * cols, _IS_DROPPED)
    for number, slot in enumerate(sorted(merged), start=1):
        labels[list(merged[slot])] = number
    labels[list(kept)] = _IS_KEPT
    return labels.reshape(rows, cols)


def _upsampled(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Each pixel's label: [height, width]."""
    rows, cols = (np.arange(n) * g // n for n, g in zip(shape, labels.shape, strict=True))
    return labels[rows[:, None], cols[None, :]]


def _shaded(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    shown = pixels.copy()
    grey = pixels.mean(-1, keepdims=True)
    dropped = labels == _IS_DROPPED
    shown[dropped] = _DROPPED * (0.35 + 0.65 * np.broadcast_to(grey, pixels.shape)[dropped])
    for number in range(1, labels.max() + 1):
        tint = np.array(to_rgb(TINTS[(number - 1) % len(TINTS)]))
        own = labels == number
        shown[own] = 0.4 * np.broadcast_to(grey, pixels.shape)[own] + 0.5 * tint
    return shown


def _borders(labels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Segments, in patches, around and between regions of equal label: [segments, 2, 2] as x, y."""
    rows, cols = labels.shape
    segments = []
    for r, c in np.argwhere(inside):
        for dr, dc, line in (
            (-1, 0, ((c, r), (c + 1, r))),
            (1, 0, ((c, r + 1), (c + 1, r + 1))),
            (0, -1, ((c, r), (c, r + 1))),
            (0, 1, ((c + 1, r), (c + 1, r + 1))),
        ):
            nr, nc = r + dr, c + dc
            beyond = not (0 <= nr < rows and 0 <= nc < cols)
            if beyond or labels[nr, nc] != labels[r, c]:
                segments.append(line)
    return np.array(segments, dtype=float).reshape(-1, 2, 2)


def count_text(
    grid: tuple[int, int], kept: Sequence[int], merged: Mapping[int, Sequence[int]]
) -> str:
    """How many patches are kept and merged, for a title."""
    text = f"{len(set(kept))} of {grid[0] * grid[1]} patches kept"
    if merged:
        folded = sum(len(patches) for patches in merged.values())
        tokens = "1 token" if len(merged) == 1 else f"{len(merged)} tokens"
        text += f", {folded} merged into {tokens}"
    return text
