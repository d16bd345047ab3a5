"""ToMe against a slow loop written from the paper, and against plausible mistakes."""

from __future__ import annotations

import pytest
import torch
from random_views import random_view
from reference_baselines import tome
from torch import Tensor
from torch.nn.functional import normalize

from frugalvlm.methods import ToMe
from frugalvlm.views import MERGED_SOURCE, EncoderView


def check(tokens: Tensor, view: EncoderView, kept: int) -> None:
    """Tokens [crops, kept, width]; one message per mistake."""
    for crop, own in enumerate(tokens):
        assert len(own) == kept, "T tokens stay"
        truth = tome(view.patches[crop], view.keys[crop].transpose(0, 1), kept)
        expected = torch.stack([mean for _, mean in truth])

        def lines(t: Tensor) -> list[list[float]]:
            return sorted([round(x, 9) for x in row] for row in t.tolist())

        assert lines(own) == lines(expected), "size-weighted means of the best pairs"
        torch.testing.assert_close(own, expected, msg=lambda m: f"order of first patches: {m}")


@pytest.mark.parametrize("kept", [1, 2, 3, 5, 6, 8, 9, 13, 19])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_of_the_paper(kept, seed):
    view = random_view(seed, (4, 5))
    reduced = ToMe(kept).reduce(view)
    check(reduced.tokens, view, kept)
    assert reduced.merged_into is not None
    for crop in range(2):
        truth = tome(view.patches[crop], view.keys[crop].transpose(0, 1), kept)
        for slot, (patches, _) in enumerate(truth):
            alone = len(patches) == 1
            assert reduced.source[crop, slot] == (patches[0] if alone else MERGED_SOURCE)
            found = (reduced.merged_into[crop] == slot).nonzero()[:, 0].tolist()
            assert found == ([] if alone else patches)


def twin(view: EncoderView, kept: int, mistake: str | None) -> Tensor:
    """ToMe once more, in the manner of the released code, with one mistake."""
    key = view.keys.mean(1) if mistake != "one head only" else view.keys[:, 0]
    key = view.patches if mistake == "features as metric" else key
    x, size = view.patches, torch.ones_like(view.patches[..., :1])
    first = torch.arange(view.patch_count).expand(view.crops, -1)[..., None].double()
    while x.shape[1] > kept:
        r = min(x.shape[1] // 2, x.shape[1] - kept)
        unit = key if mistake == "dot product" else normalize(key, dim=-1)
        score, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
        if mistake == "halves instead of turns":
            half = (x.shape[1] + 1) // 2
            score, partner = (unit[:, :half] @ unit[:, half:].mT).max(-1)
        order = score.argsort(-1, descending=mistake != "worst pairs")
        stay, gone = order[:, r:].sort(-1).values[..., None], order[:, :r, None]
        target = partner[..., None].gather(1, gone)

        def merge(v: Tensor, how: str, stay=stay, gone=gone, target=target) -> Tensor:
            width = v.shape[-1]
            a, b = v[:, ::2], v[:, 1::2]
            if mistake == "halves instead of turns":
                a, b = v[:, : a.shape[1]], v[:, a.shape[1] :]
            b = b.scatter_reduce(
                1, target.expand(-1, -1, width), a.gather(1, gone.expand(-1, -1, width)), how
            )
            return torch.cat([a.gather(1, stay.expand(-1, -1, width)), b], 1)

        if mistake == "sizes forgotten":  # AIM's merging
            x, key = merge(x, "mean"), merge(key, "mean")
        else:
            total = merge(size, "sum")
            x = merge(x * size, "sum") / (1 if mistake == "sums" else total)
            if mistake != "metric not merged":
                key = merge(key * size, "sum") / total
            else:
                key = merge(key, "amin") * 0 + key[:, : x.shape[1]]
            size = total
        first = merge(first, "amin")
        if mistake == "one pair more" and x.shape[1] == kept:
            return x[:, 1:]
    place = first.argsort(1) if mistake != "order of the matching" else first.long() * 0
    if mistake == "order of the matching":
        return x
    return x.gather(1, place.expand_as(x))


MISTAKES = {
    "one head only": "best pairs",
    "features as metric": "best pairs",
    "dot product": "best pairs",
    "halves instead of turns": "best pairs",
    "worst pairs": "best pairs",
    "sizes forgotten": "best pairs",
    "sums": "best pairs",
    "metric not merged": "best pairs",
    "one pair more": "T tokens",
    "order of the matching": "order of first",
}


def test_the_twin_is_right_without_a_mistake():
    for kept in (5, 12):
        check(twin(random_view(0, (4, 5)), kept, None), random_view(0, (4, 5)), kept)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_mistake_is_found(mistake, seed):
    view = random_view(seed, (4, 5))
    with pytest.raises(AssertionError, match=MISTAKES[mistake]):
        check(twin(view, 4, mistake), view, 4)


def test_by_hand():
    """Six patches. Round 1: A = 0 2 4, B = 1 3 5; 0 and 2 join 1, 4 joins 5. 1 of size 3, 3, 5.

    Round 2 (3 to 2 tokens): A = {0 1 2}, {4 5}; B = 3. {4 5} points at 3 best.
    """
    keys = torch.tensor([[[1, 0], [9, 0], [5, 1], [0, 2], [1, 3], [1, 4.0]]])[:, None].double()
    features = torch.tensor([[[1.0], [2], [3], [10], [20], [40]]]).double()
    view = EncoderView(features, None, (2, 3), features, lambda r: keys, keys, 1.0, None)
    reduced = ToMe(2).reduce(view)
    assert reduced.tokens.flatten().tolist() == pytest.approx([2.0, 70 / 3])
    assert reduced.merged_into is not None
    assert reduced.merged_into.tolist() == [[0, 0, 0, 1, 1, 1]]
    one = ToMe(3).reduce(view)
    assert one.tokens.flatten().tolist() == pytest.approx([2.0, 10.0, 30.0])
    assert one.source.tolist() == [[MERGED_SOURCE, 3, MERGED_SOURCE]]
