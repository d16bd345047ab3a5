"""Views with random features, queries and keys; no model behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from frugalvlm.views import EncoderView


def random_view(
    seed: int, grid: tuple[int, int] = (4, 4), width: int = 3, heads: int = 2, crops: int = 2
) -> EncoderView:
    """A view in float64 with a [CLS] token, a projector and a next tower layer."""
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features, weight = noise(crops, 1 + patches, width), noise(width, 5)

    def view(following: EncoderView | None) -> EncoderView:
        queries, keys = noise(crops, heads, 1 + patches, 2), noise(crops, heads, 1 + patches, 2)
        keys = keys * noise(crops, 1, 1 + patches, 1).exp()  # lengths differ, so cosine matters
        return EncoderView(
            features[:, 1:], features[:, :1], grid, features,
            lambda rows: queries[:, :, : rows.shape[1]], keys, 2**-0.5, None,
            lambda x: (x @ weight).tanh(), None if following is None else lambda: following,
        )  # fmt: skip

    return view(view(None))
