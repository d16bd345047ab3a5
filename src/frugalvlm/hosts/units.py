"""Families whose projector makes one token of several patches, or whose pictures have own grids.

Tokens are reduced behind the projector, picture by picture, in their places.

A *unit* is a token that the language model reads. What scores a unit is the mean over the patches
that it was made of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from frugalvlm.hosts.base import FamilyModule, Host, ImageLayout, TowerPass, deal
from frugalvlm.views import EncoderView, Shape, UnsupportedError


class UnitHost(Host):
    """A host whose pictures are reduced behind the projector.

    A family gives, beside the places of its modules: `sizes`, `read` and `view`.
    """

    behind_projector: ClassVar[bool] = True

    @property
    def inner(self) -> FamilyModule:
        """The multimodal model without the language-modelling head."""
        return self.model.model

    @property
    def language_model(self) -> FamilyModule:
        """The decoder."""
        return self.inner.language_model

    @property
    def feature_module(self) -> FamilyModule:
        """None is replaced: tokens are reduced behind the projector.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"The {self.model.config.model_type} host reduces tokens behind the projector and has "
            "no tower layer to stop at."
        )

    @property
    def plane_layers(self) -> int:
        """Decoder layers behind which the model adds a plane, see `planes`."""
        return 0

    @property
    @abstractmethod
    def read(self) -> dict[str, FamilyModule]:
        """Modules of the tower that `view` wants to see the input and the output of, by name."""

    @abstractmethod
    def sizes(self, inputs: dict, seen: TowerPass | None) -> Iterator[tuple[int, tuple[int, int]]]:
        """Crops of every image of a call, and rows and columns of units of each of its crops.

        Args:
            inputs: the keyword arguments of the call.
            seen: the tower's run, where it was before the call.

        Raises:
            UnsupportedError: when the call does not say.
        """

    @abstractmethod
    def view(
        self,
        seen: TowerPass,
        image: ImageLayout,
        units: Float[Tensor, "crops units width"],
        features: Float[Tensor, "crops units text_width"],
    ) -> EncoderView:
        """What a method may look at of one image.

        Args:
            seen: the run of the tower that made its features.
            image: which one.
            units: what tokens are made of, see `EncoderView`.
            features: the units as the language model reads them.
        """

    def images(
        self, placeholders: Tensor, inputs: dict, seen: TowerPass | None = None
    ) -> list[ImageLayout]:
        """Deal the placeholders of a batch out to its images, in reading order."""
        sizes = self.sizes(inputs, seen)
        return deal(
            placeholders,
            ((crops * grid[0] * grid[1], crops, {"grid": grid}) for crops, grid in sizes),
        )


class TileHost(UnitHost):
    """A host whose pictures are cut into tiles of one size, each a square of units.

    A unit is made of a square of neighbouring patches; a tile is a crop, and has a budget. Gaps
    that reduced tiles leave are closed, as with LLaVA. The last tiles of a picture in reading order
    are what its family's processor makes them, a small view of the whole among them.
    """

    @property
    @abstractmethod
    def tile_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a tile."""

    @property
    @abstractmethod
    def side(self) -> int:
        """How many patches a unit is high and wide."""

    @property
    @abstractmethod
    def attention(self) -> FamilyModule:
        """Self-attention of the tower layer whose output are the features."""

    @property
    @abstractmethod
    def has_cls(self) -> bool:
        """Whether a [CLS] token stands in front of the patches."""

    @cached_property
    def shape(self) -> Shape:
        """Sizes from the configuration; patches are units of a tile."""
        rows, cols = (n // self.side for n in self.tile_grid)
        layers = self.model.config.text_config.num_hidden_layers
        return Shape(rows * cols, (rows, cols), layers, self.has_cls, follows=False, resizes=False)

    @property
    def read(self) -> dict[str, FamilyModule]:
        """Queries and keys of that layer, and what its attention was given."""
        attention: Any = self.attention
        return {"queries": attention.q_proj, "keys": attention.k_proj, "attention": attention}

    def sizes(self, inputs: dict, seen: TowerPass | None) -> Iterator[tuple[int, tuple[int, int]]]:
        """Not asked for: placeholders alone say it, see `images`."""
        return iter(())

    def images(
        self, placeholders: Bool[Tensor, "batch length"], inputs: dict,
        seen: TowerPass | None = None,
    ) -> list[ImageLayout]:  # fmt: skip
        """Every run of placeholders without a gap is an image of so many tiles."""
        units = self.shape.patches
        runs: list[int] = []
        for row in placeholders.tolist():
            before = False
            for here in row:
                if here and not before:
                    runs.append(0)
                if here:
                    runs[-1] += 1
                before = here
        return deal(placeholders, ((n, max(1, n // units), {}) for n in runs))

    def view(
        self,
        seen: TowerPass,
        image: ImageLayout,
        units: Float[Tensor, "crops units width"],
        features: Float[Tensor, "crops units text_width"],
    ) -> EncoderView:
        """The image's tiles."""
        own = slice(image.crops.start, image.crops.stop)
        attention: Any = self.attention
        if not _all_seen(seen.read["attention"][0].get("attention_mask")):
            raise UnsupportedError(
                "A tile of this batch is padded, and padding would be scored: let the processor "
                "resize pictures to whole tiles."
            )
        q, k = (
            seen.read[name][1][own].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for name in ("queries", "keys")
        )
        rows, cols = self.tile_grid
        side = self.side

        def pool(values: Float[Tensor, "*rows patches"]) -> Float[Tensor, "*rows units"]:
            cells = values.unflatten(-1, (rows // side, side, cols // side, side))
            return cells.mean((-3, -1)).flatten(-2)

        pixels, leading = seen.given["pixel_values"][own], int(self.has_cls)
        grid = self.shape.grid
        return view_of(grid, units, features, q, k, attention.scale, pixels, pool, leading)


def _all_seen(mask: Tensor | None) -> bool:
    """Whether a tower's attention mask hides nothing."""
    return mask is None or bool((mask if mask.dtype.is_floating_point else ~mask).eq(0).all())


def view_of(
    grid: tuple[int, int],
    units: Tensor,
    features: Tensor,
    queries: Float[Tensor, "crops heads positions head_dim"],
    keys: Float[Tensor, "crops heads positions head_dim"],
    scale: float,
    pixels: Tensor,
    pool: Callable[[Tensor], Tensor] | None = None,
    leading: int = 0,
) -> EncoderView:
    """A view of one image's units, of queries and keys that are there already.

    Args:
        grid: rows and columns of units in each crop.
        units: what tokens are made of.
        features: the units as the language model reads them.
        queries: of all tower positions.
        keys: likewise.
        scale: factor on their products.
        pixels: of the crops.
        pool: makes values per patch values per unit.
        leading: tower positions in front of the patches.
    """
    heads = queries.shape[1]
    settings: dict[str, Any] = {"features": features, "pool": pool, "leading": leading}
    return EncoderView(
        patches=units,
        cls=None,
        grid=grid,
        hidden=queries.transpose(1, 2).flatten(2),
        queries_of=lambda rows: rows.unflatten(-1, (heads, -1)).transpose(1, 2),
        raw_keys=keys,
        scale=scale,
        pixels=pixels,
        project=lambda values: values,  # they are behind the projector
        **settings,
    )
