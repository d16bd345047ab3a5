"""Downsampling: the pixels by a slow loop and by PIL, the tower's real work, plausible mistakes."""

import numpy as np
import pytest
import torch
from PIL import Image
from reference_baselines import shrunk
from tiny_hosts import CROP, MANY, NO_CLS, PATCHES, Picture, model_for, prompt
from torch.nn.functional import interpolate

from frugalvlm import measure
from frugalvlm.methods import Downsample

GRID = (4, 4)
SIZES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 5: (2, 2), 6: (2, 3), 9: (3, 3), 15: (3, 4)}


def check(small: torch.Tensor, kept: int) -> None:
    """The shrunk picture with seed 1; one message per mistake."""
    rows, cols = SIZES[kept]
    patch = CROP // GRID[0]
    assert small.shape[2:] == (rows * patch, cols * patch), "the size in patches"
    picture = Picture(1).pixels("llava_clip")[0]
    torch.testing.assert_close(
        small[0], shrunk(picture, rows * patch, cols * patch), rtol=1e-9, atol=1e-9,
        msg=lambda m: f"bicubic, with antialiasing: {m}",
    )  # fmt: skip


@pytest.mark.parametrize("kept", SIZES)
def test_pixels_are_those_of_the_loop(kept):
    assert Downsample(kept).small_grid(GRID) == SIZES[kept]
    check(Downsample(kept).shrink(Picture(1).pixels("llava_clip"), GRID), kept)


def test_pixels_are_those_of_pil():
    picture = np.random.default_rng(0).random((24, 24), dtype=np.float32)
    ours = Downsample(6).shrink(torch.from_numpy(picture).expand(1, 3, 24, 24), GRID)[0, 0]
    theirs = Image.fromarray(picture).resize((18, 12), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "bicubic"},
        {"mode": "bilinear", "antialias": True},
        {"mode": "area"},
        {"mode": "nearest"},
    ],
)
def test_every_mistake_is_found(settings):
    small = interpolate(Picture(1).pixels("llava_clip"), (12, 18), **settings)
    with pytest.raises(AssertionError, match="bicubic, with antialiasing"):
        check(small, 6)
    with pytest.raises(AssertionError, match="the size in patches"):
        check(small.mT, 6)


@pytest.mark.parametrize("host", ["llava_clip", "llava_siglip", "llava_next"])
def test_the_tower_itself_works_less(host):
    model, inputs = model_for(host), prompt(host)
    seen = []
    tower = model.model.vision_tower
    layer = next(m for n, m in tower.named_modules() if n.endswith("encoder.layers"))[0]
    handle = layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape),
        with_kwargs=True,
    )
    with torch.no_grad():
        full = measure.count_flops(lambda: model(**inputs)).total
        with Downsample(6).on(model) as trace:
            less = measure.count_flops(lambda: model(**inputs)).total
    handle.remove()
    first = int(host not in NO_CLS)
    assert [shape[1] for shape in seen] == [PATCHES + first, 6 + first]
    assert less < 0.6 * full
    assert trace.kept == [[] for _ in trace.merged]
    for groups in trace.merged:  # every patch of the untouched grid lies in one region
        assert [len(groups[i]) for i in range(6)] == [4, 2, 2, 4, 2, 2]
        assert sorted(p for group in groups.values() for p in group) == list(range(PATCHES))


def test_a_budget_that_is_no_rectangle_is_not_used_up():
    model = model_for("llava_clip")
    with Downsample(5).on(model) as trace, torch.no_grad():
        model(**prompt("llava_clip", MANY))
    assert trace.tokens_per_layer == [4.0] * 4
    assert [Downsample(n).small_grid((12, 12)) for n in (72, 36, 14, 7, 144)] == [
        (8, 9), (6, 6), (3, 4), (2, 3), (12, 12)
    ]  # fmt: skip


def test_keeping_everything_leaves_the_picture_alone():
    pixels = Picture(1).pixels("llava_clip")
    assert Downsample(PATCHES).shrink(pixels, GRID) is pixels
