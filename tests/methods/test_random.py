"""Random selection: a fair draw that depends on seed and picture only."""

import torch
from tiny_hosts import PATCHES, Picture, model_for, prompt

from frugalvlm.methods import Random
from frugalvlm.views import EncoderView


def kept(pixels: torch.Tensor, count: int, seed: int = 0) -> list[list[int]]:
    features = torch.zeros(len(pixels), PATCHES, 1)
    keys = torch.zeros(len(pixels), 1, PATCHES, 1)
    view = EncoderView(features, None, (4, 4), features, lambda r: r[:, None], keys, 1.0, pixels)
    return Random(count, seed).reduce(view).source.tolist()


def test_every_patch_is_as_likely_and_pairs_are_independent():
    pixels = torch.randn(4000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(4000, PATCHES)
    chosen.scatter_(1, torch.tensor(kept(pixels, 4)), 1.0)
    # 4 of 16: a quarter each, with a standard deviation of 0.0068.
    assert (chosen.mean(0) - 0.25).abs().max() < 0.03
    # Two patches are in together with probability 4 x 3 / (16 x 15) = 0.05, deviation 0.0034.
    together = chosen.T @ chosen / 4000
    off = together[~torch.eye(PATCHES, dtype=torch.bool)]
    assert (off - 0.05).abs().max() < 0.016


def test_seed_and_picture_decide():
    pixels = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    first = kept(pixels, 4)
    assert first == kept(pixels, 4)
    assert first[::-1] == kept(pixels.flip(0), 4)
    other = kept(pixels, 4, seed=1)
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 3
    assert len({tuple(row) for row in first}) > 45


def test_the_global_generator_is_left_alone():
    model, inputs = model_for("llava_clip"), prompt("llava_clip", [[1, Picture(1), 1]])
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with Random(4).on(model), torch.no_grad():
        model(**inputs)
    assert torch.equal(torch.random.get_rng_state(), before)
