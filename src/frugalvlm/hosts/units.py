"""Families whose projector makes one token of several patches, or whose pictures have own grids.

Tokens are reduced behind the projector, picture by picture, in their places.

A *unit* is a token that the language model reads. What scores a unit is the mean over the patches
that it was made of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from frugalvlm.hosts.base import FamilyModule, Host, ImageLayout, TowerPass, deal
from frugalvlm.views import EncoderView, UnsupportedError


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


def view_of(
    image: ImageLayout,
    units: Tensor,
    features: Tensor,
    queries: Float[Tensor, "crops heads positions head_dim"],
    keys: Float[Tensor, "crops heads positions head_dim"],
    scale: float,
    pixels: Tensor,
    pool: Callable[[Tensor], Tensor] | None = None,
    leading: int = 0,
) -> EncoderView:
    """A view of one image's units, of queries and keys that are there already."""
    heads = queries.shape[1]
    settings: dict[str, Any] = {"features": features, "pool": pool, "leading": leading}
    return EncoderView(
        patches=units,
        cls=None,
        grid=image.grid,
        hidden=queries.transpose(1, 2).flatten(2),
        queries_of=lambda rows: rows.unflatten(-1, (heads, -1)).transpose(1, 2),
        raw_keys=keys,
        scale=scale,
        pixels=pixels,
        project=lambda values: values,  # they are behind the projector
        **settings,
    )
