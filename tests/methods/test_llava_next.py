"""The order of tokens in LLaVA-NeXT, and what a trace says about tiles."""

import pytest
import torch
from tiny_hosts import GRIDS, KEPT, PATCHES, SIDE, Picture, make, model_for, prompt

from frugalvlm.hosts import host_for
from frugalvlm.hosts.base import ImageLayout
from frugalvlm.methods import FasterVLM, FastV
from frugalvlm.views import CLS_SOURCE, MERGED_SOURCE, Reduced


def layout(picture: Picture) -> ImageLayout:
    crops = range(picture.crops("llava_next"))
    size = (picture.height, picture.width)
    return ImageLayout(0, torch.arange(picture.tokens("llava_next")), crops, size, picture.tiles())


def order(picture: Picture, source: list[list[int]]) -> list[tuple[int, int]]:
    """The reading order as (crop, slot)."""
    host, kept = host_for(model_for("llava_next")), len(source[0])
    tokens = torch.zeros(len(source), kept, 1)
    answer = host.order(layout(picture), Reduced(tokens, torch.tensor(source)))
    return [(i // kept, i % kept) for i in answer.tolist()]


def test_order_by_hand():
    """2 x 2 tiles of 4 x 4 patches. Every crop: [CLS], two patches, one merged token.

    Stitched rows are 8 wide. Tile 1 holds 1 (row 0, column 1) and 4 (row 1, column 0); tile 2
    holds 0 (row 0, column 4) and 5 (row 1, column 5); tile 3 holds 0 (row 4, column 0) and 15
    (row 7, column 3); tile 4 holds 3 (row 4, column 7) and 12 (row 7, column 4).
    """
    c, m = CLS_SOURCE, MERGED_SOURCE
    source = [[c, 7, 9, m], [c, 1, 4, m], [c, 0, 5, m], [c, 0, 15, m], [c, 3, 12, m]]
    assert order(Picture(1), source) == [
        (0, 0), (0, 1), (0, 2), (0, 3),  # the base crop as it is
        (1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (4, 1), (3, 2), (4, 2),  # stitched raster
        (1, 0), (2, 0), (3, 0), (4, 0),  # [CLS] per tile
        (1, 3), (2, 3), (3, 3), (4, 3),  # merged per tile
    ]  # fmt: skip


def test_order_of_one_row_of_tiles():
    c, m = CLS_SOURCE, MERGED_SOURCE
    source = [[c, 3, m, m], [c, 8, m, m], [c, 2, m, m]]
    assert order(Picture(1, 16, 48), source) == [
        (0, 0), (0, 1), (0, 2), (0, 3), (2, 1), (1, 1), (1, 0), (2, 0),
        (1, 2), (1, 3), (2, 2), (2, 3),
    ]  # fmt: skip


SIZES = [(48, 48), (32, 48), (48, 32), (16, 48), (24, 48), (48, 20), (40, 44), (10, 30)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_layout_is_that_of_the_models_own_packing(height, width):
    """Numbered features through the untouched model's packing: lengths and places agree."""
    model, picture = model_for("llava_next"), Picture(1, height, width)
    crops = picture.crops("llava_next")
    numbers = torch.arange(crops * PATCHES).view(crops, PATCHES, 1).double()
    packed, lengths = model.pack_image_features(
        [numbers], torch.tensor([[height, width]]), "default",
        image_newline=torch.tensor([-1.0]).double(),
    )  # fmt: skip
    host = host_for(model)
    assert lengths.tolist() == [picture.tokens("llava_next")]
    assert host.origin(layout(picture)) == packed[0].flatten().long().tolist()
    ids = torch.ones(1, int(lengths), dtype=torch.bool)
    (found,) = host.images(ids, {"image_sizes": [[height, width]]})
    assert len(found.slots) == int(lengths)
    assert (found.crops, found.tiles) == (range(crops), picture.tiles())
    assert [n * SIDE * 6 for n in found.tiles] in GRIDS


@pytest.mark.parametrize("key", ["random", "fastervlm", "visionzip", "fastv"])
def test_the_trace_names_patches_crop_by_crop(key):
    """Under FastV as well, whose tokens are un-padded rows with newlines in between."""
    model, picture = model_for("llava_next"), Picture(4, 32, 48)
    with make(key).on(model) as trace, torch.no_grad():
        model(**prompt("llava_next", [[3, picture, 4]]))
    assert len(trace.kept) == len(trace.merged) == picture.crops("llava_next")
    if key == "fastv":
        total = sum(map(len, trace.kept))
        assert 0 < total <= KEPT * picture.crops("llava_next")  # newlines may be among them
        for crop, rows in enumerate(trace.kept[1:]):
            for patch in rows:  # one row above and one below is cut away
                assert 1 <= crop // 2 * SIDE + patch // SIDE < 7


def test_traces_follow_both_kinds_together():
    """A cut on top of an encoder reducer names patches that the reducer kept."""
    model = model_for("llava_next")
    inputs = prompt("llava_next", [[3, Picture(4), 4], [2, Picture(5, 16, 48), 4]])
    with FasterVLM(KEPT).on(model) as outer, torch.no_grad():
        model(**inputs)
        before = outer.kept
        with FastV(2).on(model) as inner:
            model(**inputs)
            assert inner.kept == outer.kept
    assert [sum(map(len, inner.kept[:5])), sum(map(len, inner.kept[5:]))] == [10, 6]
    for few, many in zip(inner.kept, before, strict=True):
        assert set(few) <= set(many)
