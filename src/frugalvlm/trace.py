"""What a method kept: counts per layer, kept patches, and their picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from frugalvlm.errors import FrugalError
from frugalvlm.views import Kept

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image


class TraceError(FrugalError, ValueError):
    """A question that a trace cannot answer, or a picture that it cannot draw on."""


@dataclass
class Trace:
    """A record of the last prompt that went through a `with method.on(model)` block.

    Attributes:
        grid: rows and columns of patches of a crop; where pictures have grids of their own, those
            of a usual picture.
        decoder_layers: layers of the language model.
        calls: prompts (batches) seen so far, those without an image included.
        tokens_per_layer: visual tokens at each decoder layer, mean over the images of the last
            batch; one entry per layer, none when it held no image.
        spread: smallest and largest number of visual tokens over images, per layer.
        visible_per_layer: those of `tokens_per_layer` that no mask hides. Fewer only under a method
            that hides tokens instead of removing them.
    """

    grid: tuple[int, int]
    decoder_layers: int
    calls: int = 0
    tokens_per_layer: list[float] = field(default_factory=list)
    spread: list[tuple[int, int]] = field(default_factory=list)
    visible_per_layer: list[float] = field(default_factory=list)
    _origins: Callable[[], list[list[int]]] = list  # per image, its tokens: crop x patches + patch
    _crops: tuple[int, ...] = ()
    _grids: tuple[tuple[int, int], ...] = ()  # per image; none where all have `grid`
    _cuts: list[tuple[int, Kept]] = field(default_factory=list)  # with the layer behind the cut
    _merged_into: Tensor | None = None

    @property
    def mean_tokens(self) -> float:
        """Visual tokens averaged over decoder layers (the average that some papers call budget).

        Raises:
            TraceError: when the last prompt had no image, or none was seen.
        """
        self._need()
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)

    @property
    def kept(self) -> list[list[int]]:
        """Per crop, the patches that reach the last layer, ascending.

        [CLS], merged and newline tokens stand at no single patch and are not listed.

        Raises:
            TraceError: when the last prompt had no image, or none was seen.
        """
        return self.kept_at(self.decoder_layers - 1)

    def kept_at(self, layer: int) -> list[list[int]]:
        """Per crop, the patches that are there, and not hidden, at a decoder layer (0-based).

        Raises:
            TraceError: when the last prompt had no image, or none was seen; for a layer that the
                decoder does not have.
        """
        self._need()
        _check_place("layer", layer, self.decoder_layers, "this decoder")
        kept: list[list[int]] = []
        for image, (tokens, crops) in enumerate(zip(self._origins(), self._crops, strict=True)):
            rows, cols = self.grid_of(image)
            patches = rows * cols
            for first, cut in self._cuts:
                if first <= layer:
                    held = cut.index if cut.holds is None else cut.holds
                    held = held[image, : cut.counts[image]]
                    tokens = [tokens[i] if i >= 0 else i for i in held.tolist()]
            real = sorted(token for token in tokens if token >= 0)
            kept += [[t % patches for t in real if t // patches == crop] for crop in range(crops)]
        return kept

    def grid_of(self, image: int) -> tuple[int, int]:
        """Rows and columns of patches of each crop of an image of the last batch."""
        return self._grids[image] if self._grids else self.grid

    @property
    def merged(self) -> list[dict[int, list[int]]]:
        """Per crop, which patches were folded into which slot of the crop's reduced tokens.

        Raises:
            TraceError: when the last prompt had no image, or none was seen.
        """
        self._need()
        if self._merged_into is None:
            return [{} for _ in range(sum(self._crops))]
        groups: list[dict[int, list[int]]] = []
        for row in self._merged_into.tolist():
            group: dict[int, list[int]] = {}
            for patch, slot in enumerate(row):
                if slot >= 0:
                    group.setdefault(slot, []).append(patch)
            groups.append(group)
        return groups

    def picture(
        self, crop: int = 0, layer: int | None = None
    ) -> tuple[tuple[int, int], list[int], dict[int, list[int]]]:
        """Grid, kept patches and merged groups of a crop, as the figures take them.

        A block whose method places no hook (the untouched model) keeps every patch. Patches are
        those at a decoder layer (default: the last), groups those that entered the decoder.
        """
        if not self.calls:
            return self.grid, list(range(self.grid[0] * self.grid[1])), {}
        self._need()
        layer = self.decoder_layers - 1 if layer is None else layer
        _check_place("crop", crop, sum(self._crops), "the last batch")
        return self.grid_of(self._image(crop)), self.kept_at(layer)[crop], self.merged[crop]

    def _image(self, crop: int) -> int:
        """The image that a crop of the last batch belongs to."""
        return next(i for i in range(len(self._crops)) if crop < sum(self._crops[: i + 1]))

    def plot(
        self,
        image: Image,
        processor: Any = None,
        ax: Axes | None = None,
        crop: int = 0,
        layer: int | None = None,
    ) -> Axes:
        """Draw the kept patches of one crop on what the vision tower saw; the others are dimmed.

        Args:
            image: the picture of the prompt, whole.
            processor: the processor that made the model's inputs. It may resize, cut and tile a
                picture, so only what it makes of this one is what the tower saw. Needed unless the
                picture has the tower's shape and was resized as a whole.
            ax: axes to draw on; a new figure when absent.
            crop: which crop of the last batch: of pictures in tiles the base crop comes first.
            layer: the decoder layer (0-based) at which to look; the last when absent.

        Raises:
            TraceError: when the last prompt had no image, or none was seen; for a crop or a layer
                that is not there, and for a picture of which the tower saw something else.
        """
        self._need()
        if ax is not None and not hasattr(ax, "imshow"):
            raise TraceError(f"ax is axes of matplotlib, as plt.subplots() makes them; got {ax!r}.")
        grid, kept, merged = self.picture(crop, layer)
        try:
            from frugalvlm import drawing
        except ImportError as error:
            raise TraceError(
                f"Drawing needs matplotlib, which is not installed ({error}): run `pip install "
                "matplotlib`."
            ) from error
        return drawing.draw_kept_patches(self._seen(image, processor, crop), grid, kept, merged, ax)

    def _seen(self, image: Image, processor: Any, crop: int) -> Image:
        """What the tower saw as this crop."""
        from frugalvlm.drawing import crops_seen

        if not hasattr(image, "convert"):
            raise TraceError(
                f"A picture is a PIL image, got {type(image).__name__}: open it with "
                "PIL.Image.open(...)."
            )
        number = self._image(crop)
        if self._grids and self._grids[number] != self.grid:
            return image  # a tower that takes pictures as they are saw the whole of it
        count, place = self._crops[number], crop - sum(self._crops[:number])
        if processor is None:
            if count > 1 or not self._fits(image):
                raise TraceError(
                    f"What the tower saw of this picture of {image.width} x {image.height} pixels "
                    f"is not known (crop {place + 1} of {count}, {self.grid[0]} x {self.grid[1]} "
                    "patches): pass processor=, the one that made the model's inputs."
                )
            return image
        try:
            crops = crops_seen(image, processor)
        except (AttributeError, KeyError, TypeError) as error:
            raise TraceError(
                f"{type(processor).__name__} makes no pixels of a picture: pass the processor that "
                "made the model's inputs."
            ) from error
        if len(crops) != count or not self._fits(crops[place]):
            raise TraceError(
                f"The tower saw {count} crops of {self.grid[0]} x {self.grid[1]} patches, and this "
                f"processor makes {len(crops)} of {crops[0].width} x {crops[0].height} pixels of "
                "this picture: pass the picture and the processor of that prompt."
            )
        return crops[place]

    def _fits(self, picture: Image) -> bool:
        """Whether a picture has the shape of the grid, but for less than half a patch."""
        rows, cols = self.grid
        few, many = sorted((picture.width * rows, picture.height * cols))
        return many / few - 1 <= 0.5 / max(rows, cols)

    def _need(self) -> None:
        if not self.calls:
            raise TraceError(
                "Nothing was traced: run the model on a prompt with an image inside the block."
            )
        if not self.tokens_per_layer:
            raise TraceError("The last prompt had no image, so nothing was kept or dropped.")

    def note_prompt(
        self,
        counts: tuple[int, ...] = (),
        crops: tuple[int, ...] = (),
        origins: Callable[[], list[list[int]]] = list,
        merged_into: Tensor | None = None,
        grids: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """The engine tells of a new prompt: tokens and crops of each image; none without images."""
        self.calls += 1
        self.tokens_per_layer, self.spread, self.visible_per_layer, self._cuts = [], [], [], []
        self._origins, self._crops, self._merged_into = origins, crops, merged_into
        self._grids = grids
        if counts:
            self._set_from(0, counts)

    def note_cut(self, layer: int, kept: Kept, hidden: bool = False) -> None:
        """The engine tells what images have (or show, where others are hidden) from a layer on."""
        self._cuts.append((layer, kept))
        self._set_from(layer, kept.counts, hidden)

    def _set_from(self, layer: int, counts: tuple[int, ...], hidden: bool = False) -> None:
        mean, spread = sum(counts) / len(counts), (min(counts), max(counts))
        rest = self.decoder_layers - layer
        self.visible_per_layer = [*self.visible_per_layer[:layer], *[mean] * rest]
        if not hidden:
            self.tokens_per_layer = [*self.tokens_per_layer[:layer], *[mean] * rest]
            self.spread = [*self.spread[:layer], *[spread] * rest]


@dataclass
class ExitTrace(Trace):
    """Where tokens left. Visual tokens are untouched and not traced.

    Attributes:
        exits: for every decoding pass and row the block after which it left; the number of blocks
            where it ran through.
    """

    exits: list[list[int]] = field(default_factory=list)

    @property
    def mean_layers(self) -> float:
        """Blocks per decoded token, mean over passes and rows.

        Raises:
            TraceError: when nothing was decoded.
        """
        every = [layer for row in self.exits for layer in row]
        if not every:
            raise TraceError("Nothing was decoded: run model.generate inside the block.")
        return sum(every) / len(every)


def _check_place(what: str, place: int, count: int, where: str) -> None:
    whole = isinstance(place, int | np.integer) and not isinstance(place, bool)
    if not whole or not 0 <= place < count:
        raise TraceError(
            f"There is no {what} {place!r} in {where}: choose a whole number from 0 to {count - 1}."
        )
