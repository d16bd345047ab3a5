"""Pictures of what was kept are drawn on what the tower saw, or not at all."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_hosts import CROP, GRIDS, KEPT, LAYERS, PATCHES, Picture, make, model_for, prompt
from transformers import CLIPImageProcessor, LlavaNextImageProcessor

import frugalvlm
from frugalvlm.drawing import draw_kept_patches
from frugalvlm.errors import FrugalError
from frugalvlm.methods import EarlyExit, FasterVLM, FastV, Random
from frugalvlm.trace import TraceError

RED, WHITE = (255, 0, 0), (255, 255, 255)
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))  # of a picture in four tiles


def cropping(**settings):
    """What CLIP's processor does: the shorter side to the tower's size, then the middle square."""
    return CLIPImageProcessor(
        size={"shortest_edge": CROP}, crop_size={"height": CROP, "width": CROP}, **settings
    )


def banner(width=120, height=40):
    """A wide picture: a white square in its middle, red on both sides."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(WHITE, ((width - height) // 2, 0, (width + height) // 2, height))
    return image


def traced(host="llava_clip", rows=None, method=None):
    model = model_for(host)
    with (method or FastV(KEPT)).on(model) as trace, torch.no_grad():
        model(**prompt(host, rows or [[3, Picture(1), 4]]))
    return trace


def drawn(axes):
    """Colours of the drawn picture that are not darkened: what is shown as kept."""
    pixels = np.asarray(axes.images[0].get_array())
    return {tuple((255 * pixel).round().astype(int)) for pixel in pixels.reshape(-1, 3)
            if pixel.max() > 0.5}  # fmt: skip


def test_what_the_processor_cut_away_is_not_drawn():
    image, processor = banner(), cropping()
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    inputs["pixel_values"] = processor(images=image, return_tensors="pt")["pixel_values"].double()
    with FasterVLM(KEPT).on(model) as trace, torch.no_grad():
        model(**inputs)
    axes = trace.plot(image, processor)
    assert all(min(colour) > 200 for colour in drawn(axes)), "nothing but white, or nearly"
    assert RED in drawn(draw_kept_patches(image, *trace.picture())), "the test can fail"
    assert axes.get_title() == f"{KEPT} of {PATCHES} patches kept"
    with pytest.raises(TraceError, match=r"120 x 40 pixels is not known .* pass processor="):
        trace.plot(image)


def test_a_processor_that_squeezes_shows_the_squeezed_picture():
    """The whole picture in one square: red on both sides of white, a third each."""
    processor = CLIPImageProcessor(
        size={"height": CROP, "width": CROP}, do_center_crop=False, resample=0
    )
    trace = traced(method=Random(PATCHES))
    pixels = np.asarray(trace.plot(banner(), processor).images[0].get_array())
    assert pixels.shape[:2] == (CROP, CROP)
    assert [(pixels == c).all(-1).sum() / CROP for c in ((1, 0, 0), (1, 1, 1))] == [16, 8]


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_normalize": False}, {"do_normalize": False, "do_rescale": False},
     {"image_mean": [0.5] * 3, "image_std": [0.25, 0.5, 1.0]}, {"rescale_factor": 1 / 127.5}],
)  # fmt: skip
def test_colours_are_those_of_the_picture(settings):
    trace = traced(method=Random(PATCHES))
    image = Image.new("RGB", (60, 60), (200, 30, 90))
    assert drawn(trace.plot(image, cropping(**settings))) == {(200, 30, 90)}


def test_a_square_picture_needs_no_processor():
    trace = traced()
    assert drawn(trace.plot(Image.new("RGB", (97, 96), WHITE))) == {WHITE}
    with pytest.raises(TraceError, match="pass processor="):
        trace.plot(Image.new("RGB", (120, 96), WHITE))


def test_tiles_are_drawn_as_the_tower_saw_them():
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": CROP}, crop_size={"height": CROP, "width": CROP},
        image_grid_pinpoints=GRIDS, resample=0,
    )  # fmt: skip
    image = Image.new("RGB", (48, 48))
    for i, colour in enumerate(CORNERS):
        image.paste(colour, (i % 2 * 24, i // 2 * 24, i % 2 * 24 + 24, i // 2 * 24 + 24))
    trace = traced("llava_next", [[3, Picture(4, 48, 48), 4]], make("random", PATCHES))
    assert drawn(trace.plot(image, processor)) == set(CORNERS)
    for crop, colour in enumerate(CORNERS, 1):
        assert drawn(trace.plot(image, processor, crop=crop)) == {colour}
    with pytest.raises(TraceError, match=r"crop 4 of 5, .* pass processor="):
        trace.plot(image, crop=3)
    with pytest.raises(TraceError, match=r"no crop 5 .* from 0 to 4"):
        trace.plot(image, processor, crop=5)
    with pytest.raises(TraceError, match=r"saw 5 crops .* makes 1 of 24 x 24"):
        trace.plot(image, cropping())


def test_crops_count_over_all_pictures_of_a_batch():
    rows = [[3, Picture(1), 4], [2, Picture(2), 5]]
    trace = traced(rows=rows, method=Random(KEPT))
    axes = [trace.plot(Image.new("RGB", (24, 24), WHITE), crop=crop) for crop in (0, 1)]
    shown = [np.asarray(ax.images[0].get_array()) for ax in axes]
    assert (shown[0] != shown[1]).any(), "each picture keeps patches of its own"
    with pytest.raises(TraceError, match="no crop 2"):
        trace.plot(Image.new("RGB", (24, 24)), crop=2)


def test_a_layer_can_be_chosen():
    trace, image = traced(), Image.new("RGB", (24, 24), WHITE)
    assert trace.plot(image, layer=0).get_title() == f"{PATCHES} of {PATCHES} patches kept"
    assert trace.plot(image).get_title() == f"{KEPT} of {PATCHES} patches kept"


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda t: t.kept_at(LAYERS), f"no layer {LAYERS} .* 0 to {LAYERS - 1}"),
        (lambda t: t.kept_at(-1), "no layer -1"),
        (lambda t: t.kept_at(True), "no layer True"),
        (lambda t: t.kept_at("1"), "no layer '1'"),
        (lambda t: t.picture(3), "no crop 3"),
        (lambda t: t.picture(layer=9), "no layer 9"),
        (lambda t: t.plot("x.png"), r"got str: open it with PIL\.Image\.open"),
        (lambda t: t.plot(np.zeros((24, 24, 3))), "got ndarray"),
        (lambda t: t.plot(Image.new("RGB", (24, 24)), crop=-1), "no crop -1"),
        (lambda t: t.plot(Image.new("RGB", (24, 24)), object()), "object makes no pixels"),
        (lambda t: t.plot(Image.new("RGB", (24, 24)), ax="x"), "ax is axes of matplotlib"),
    ],
)
def test_wrong_questions_get_one_sentence(ask, said):
    with pytest.raises(FrugalError, match=said) as caught:
        ask(traced())
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert ". " not in str(caught.value).replace("(...). ", "")


def test_layers_of_numpy_are_layers():
    trace = traced()
    assert trace.kept_at(np.int64(LAYERS - 1)) == trace.kept


def test_a_trace_without_a_picture_says_so():
    model = model_for("llava_clip")
    with FastV(KEPT).on(model) as trace, torch.no_grad():
        with pytest.raises(TraceError, match="Nothing was traced"):
            trace.plot(Image.new("RGB", (24, 24)))
        model(**prompt("llava_clip", [[6]]))
        for ask in (trace.picture, lambda: trace.plot(Image.new("RGB", (24, 24)))):
            with pytest.raises(TraceError, match="no image"):
                ask()
    with EarlyExit().on(model) as trace, pytest.raises(TraceError, match="Nothing was decoded"):
        trace.mean_layers  # noqa: B018


def test_without_matplotlib_one_sentence_names_it(monkeypatch):
    trace = traced()
    monkeypatch.delattr(frugalvlm, "drawing", raising=False)
    monkeypatch.delitem(sys.modules, "frugalvlm.drawing", raising=False)
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TraceError, match=r"needs matplotlib.*pip install matplotlib"):
        trace.plot(Image.new("RGB", (24, 24)))
