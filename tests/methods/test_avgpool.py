"""Average pooling against a slow loop, torch's own pooling, and plausible mistakes."""

import pytest
import torch
from random_views import random_view
from reference_baselines import cells
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

from frugalvlm.methods import AvgPool
from frugalvlm.views import MERGED_SOURCE

GRID = (6, 6)


def check(tokens: Tensor, count: int) -> None:
    """Tokens [crops, kept, width] of the view with seed 0; one message per mistake."""
    patches = random_view(0, GRID).patches
    assert tokens.shape[1] == count, "as many tokens as asked for"
    expected = torch.stack([patches[:, cell].mean(1) for cell in cells(*GRID, count)], 1)
    torch.testing.assert_close(tokens, expected, rtol=1e-12, atol=1e-12,
                               msg=lambda m: f"mean over each cell: {m}")  # fmt: skip


@pytest.mark.parametrize("count", range(1, 36))
def test_tokens_are_the_means_of_a_partition(count):
    reduced = AvgPool(count).reduce(random_view(0, GRID))
    check(reduced.tokens, count)
    assert (reduced.source == MERGED_SOURCE).all()
    assert reduced.merged_into is not None
    own = reduced.merged_into[1].tolist()
    assert [[p for p, c in enumerate(own) if c == n] for n in range(count)] == cells(*GRID, count)


def pooled(size: tuple[int, int], pool=adaptive_avg_pool2d) -> Tensor:
    image = random_view(0, GRID).patches.transpose(1, 2).unflatten(-1, GRID)
    return pool(image, size).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (6, 6)])
def test_even_cells_are_average_pooling_as_usual(size):
    check(pooled(size), size[0] * size[1])


@pytest.mark.parametrize(
    "wrong",
    [
        pooled((4, 4)),  # windows overlap where the cells do not divide the grid
        pooled((2, 2), adaptive_max_pool2d),
        pooled((2, 2)) * 9,
        pooled((2, 2)).flip(1),
        pooled((1, 4)),
    ],
)
def test_every_mistake_is_found(wrong):
    with pytest.raises(AssertionError, match="mean over each cell"):
        check(wrong, wrong.shape[1])
