"""DivPrune against the released loop, token by token, and against plausible mistakes."""

from __future__ import annotations

import math

import pytest
import torch
from random_views import random_view
from reference_baselines import divprune
from torch.nn.functional import normalize

from frugalvlm.methods import DivPrune
from frugalvlm.views import EncoderView


def check(kept: list[list[int]], view: EncoderView, count: int) -> None:
    """One message per mistake."""
    expected = [divprune(crop, count) for crop in view.projected]
    assert all(len(set(row)) == count for row in kept), "T tokens, each once"
    assert [sorted(row) for row in kept] == expected, "the greedy max-min choice"
    assert kept == expected, "raster order"


@pytest.mark.parametrize("count", [1, 2, 5, 10, 16])
@pytest.mark.parametrize("seed", range(4))
def test_kept_tokens_are_those_of_the_released_loop(count, seed):
    view = random_view(seed)
    reduced = DivPrune(count).reduce(view)
    check(reduced.source.tolist(), view, count)
    for crop, row in enumerate(reduced.source):
        assert torch.equal(reduced.tokens[crop], view.patches[crop, row])


def twin(view: EncoderView, count: int, mistake: str | None) -> list[list[int]]:
    """DivPrune once more, one crop at a time, with one mistake."""
    answer = []
    for crop in range(view.crops):
        x = view.patches[crop] if mistake == "before the projector" else view.projected[crop]
        distance = 1 - normalize(x, dim=-1) @ normalize(x, dim=-1).T
        if mistake == "Euclidean":
            distance = torch.cdist(x, x)
        if mistake == "dot product":
            distance = -x @ x.T
        distance = (distance + distance.T) / 2
        far = distance + torch.eye(len(x)) * 99
        start = int(far.amin(0).argmax())
        if mistake == "starts anywhere":
            start = 0
        if mistake == "starts at the farthest from all":
            start = int(distance.sum(0).argmax())
        chosen = [start]
        while len(chosen) < count:
            rows = distance[chosen]
            score = rows.mean(0) if mistake == "mean distance" else rows.amin(0)
            if mistake == "only the last one":
                score = rows[-1].clone()
            score[chosen] = -99
            chosen.append(int(score.argmin() if mistake == "most alike" else score.argmax()))
            if mistake == "most alike" and score[chosen[-1]] == -99:
                chosen[-1] = next(j for j in range(len(x)) if j not in chosen)
        answer.append(chosen if mistake == "order of the choice" else sorted(chosen))
    return answer


MISTAKES = {
    "before the projector": "greedy",
    "Euclidean": "greedy",
    "dot product": "greedy",
    "starts anywhere": "greedy",
    "starts at the farthest from all": "greedy",
    "mean distance": "greedy",
    "only the last one": "greedy",
    "most alike": "greedy",
    "order of the choice": "raster",
}


def test_the_twin_is_right_without_a_mistake():
    check(twin(random_view(0), 5, None), random_view(0), 5)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_found(mistake):
    view = random_view(1, crops=6)
    with pytest.raises(AssertionError, match=MISTAKES[mistake]):
        check(twin(view, 4, mistake), view, 4)


def on_a_circle(*degrees: float) -> EncoderView:
    angle = torch.tensor(degrees) / 180 * math.pi
    features = torch.stack([angle.cos(), angle.sin()], -1)[None]
    return EncoderView(
        features, None, (1, len(degrees)), features, lambda r: r[:, None], features[:, None], 1.0,
        None, lambda x: 3 * x,
    )  # fmt: skip


def test_by_hand():
    """Nearest neighbours are 10, 10, 60, 30 and 30 degrees away: 80 first, then 170, then 0."""
    view = on_a_circle(0, 10, 80, 140, 170)
    assert DivPrune(1).reduce(view).source.tolist() == [[2]]
    assert DivPrune(2).reduce(view).source.tolist() == [[2, 4]]
    assert DivPrune(3).reduce(view).source.tolist() == [[0, 2, 4]]
    assert DivPrune(4).reduce(view).source.tolist() == [[0, 2, 3, 4]]


def test_copies_are_never_the_same_token_twice():
    view = on_a_circle(*[20.0] * 6)
    assert DivPrune(4).reduce(view).source.unique().numel() == 4
