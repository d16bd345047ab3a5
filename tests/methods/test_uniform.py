"""Uniform selection against a slow loop, and the cells that it shares with average pooling."""

import pytest
import torch
from random_views import random_view
from reference_baselines import cells, middle

from frugalvlm.methods import Uniform
from frugalvlm.methods.base import grid_cells

GRIDS = [(12, 12), (4, 4), (3, 5), (7, 2), (1, 9)]


def check(kept: list[int], grid: tuple[int, int], count: int) -> None:
    """One message per mistake."""
    assert len(set(kept)) == len(kept) == count, "as many patches as asked for"
    assert kept == sorted(kept), "raster order"
    assert kept == [middle(c, grid[1]) for c in cells(*grid, count)], "the middle of each cell"


@pytest.mark.parametrize("grid", GRIDS)
def test_every_budget_is_met_with_the_middles_of_a_partition(grid):
    for count in range(1, grid[0] * grid[1] + 1):
        own = grid_cells(grid, count)
        assert [[p for p, c in enumerate(own) if c == n] for n in range(count)] == cells(
            *grid, count
        )
        reduced = Uniform(count).reduce(random_view(0, grid))
        check(reduced.source[0].tolist(), grid, count)
        picked = reduced.tokens, random_view(0, grid).patches[:, reduced.source[0]]
        assert torch.equal(*picked)


def test_by_hand():
    """12 x 12 patches. 16: 4 x 4 cells of 3 x 3; 7: bands of 2, 2 and 3 cells."""
    view = random_view(0, (12, 12))
    rows = [1, 4, 7, 10]
    assert Uniform(16).reduce(view).source[0].tolist() == [12 * y + x for y in rows for x in rows]
    assert Uniform(7).reduce(view).source[0].tolist() == [
        12 * 1 + 2, 12 * 1 + 8, 12 * 5 + 2, 12 * 5 + 8, 12 * 9 + 1, 12 * 9 + 5, 12 * 9 + 9,
    ]  # fmt: skip


@pytest.mark.parametrize("count", [6, 12, 16])
def test_every_mistake_is_found(count):
    grid = (12, 12)
    twins = {
        "every n-th patch": [i * 144 // count for i in range(count)],
        "the corners": [cell[0] for cell in cells(*grid, count)],
        "columns first": [
            x % 12 * 12 + x // 12 for x in (middle(c, 12) for c in cells(*grid, count))
        ],
        "one too few": [middle(c, 12) for c in cells(*grid, count - 1)],
    }
    for kept in twins.values():
        with pytest.raises(AssertionError, match=r"middle of each|raster|as many"):
            check(kept, grid, count)
