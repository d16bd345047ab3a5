"""Controls: no picture at all, a grey one, and a method's own cuts with dice for a ranking."""

import pytest
import torch
from tiny_hosts import HOSTS, IMAGE, LAYERS, MANY, PATCHES, fingerprint_of, model_for, prompt

from frugalvlm import methods
from frugalvlm.methods import CONTROLS, METHODS, VARIANTS, method_class
from frugalvlm.methods.random_cut import dice
from frugalvlm.views import LayerView, Text, UnsupportedError

# Each twin with the method whose cuts it has, and the hyper-parameters of both.
TWINS = {
    "random_fastv": ("fastv", {"kept_tokens": 6}),
    "random_pyramiddrop": ("pyramiddrop", {"ratio": 0.6}),
    "random_gsearch": ("gsearch", {"rates": (1.0, 1.0, 0.6, 0.4)}),
    "random_sparsevlm": ("sparsevlm", {"kept": (9, 6, 3)}),
    "random_aim": ("aim", {"kept_tokens": 8, "l1": 0, "l2": 4}),
}
BLIND = (methods.Blank(), methods.NoImage(), methods.NoImageAfter(2))
ALL = [*BLIND, *(method_class(key)(**knobs) for key, (_, knobs) in TWINS.items()),
       methods.RandomSGL(6, 0.5)]  # fmt: skip


def logits(method, host="llava_clip", inputs=None):
    inputs = prompt(host) if inputs is None else inputs
    with torch.no_grad(), method.on(model_for(host)) as trace:
        return model_for(host)(**inputs).logits, trace


def test_controls_are_known_by_name_and_apart_from_methods():
    assert len(set(CONTROLS)) == len(CONTROLS)
    assert set(CONTROLS) <= METHODS.keys() | VARIANTS.keys()
    assert {key for key in VARIANTS if key.startswith("random_")} == set(TWINS) | {"random_sgl"}
    assert set(TWINS) < set(CONTROLS)
    assert {"blank", "no_image", "no_image_after"} < set(CONTROLS)
    assert not {"fastv", "visionzip", "vtw", "visionzip_dominant"} & set(CONTROLS)


# -- no picture ------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_a_blank_picture_is_zeros_in_place_of_the_picture(host):
    inputs = prompt(host)
    grey = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    with torch.no_grad():
        expected, seen = (model_for(host)(**given).logits[:, -1] for given in (grey, inputs))
    answer, trace = logits(methods.Blank(), host)
    torch.testing.assert_close(answer[:, -1], expected)
    assert not torch.allclose(answer[:, -1], seen)
    whole = logits(methods.Vanilla(), host)[1].tokens_per_layer
    assert trace.tokens_per_layer == whole, "every token is there"


@pytest.mark.parametrize("host", HOSTS)
def test_without_an_image_the_answer_is_that_to_the_text_alone(host):
    inputs = prompt(host)
    words = inputs["input_ids"][inputs["input_ids"] != IMAGE][None]
    with torch.no_grad():
        expected = model_for(host)(input_ids=words).logits[:, -1]
    answer, trace = logits(methods.NoImage(), host)
    torch.testing.assert_close(answer[:, -1], expected, rtol=1e-6, atol=1e-8)
    assert trace.tokens_per_layer == [0] * LAYERS


def test_no_budget_matters_without_a_picture():
    for kind in (methods.Blank, methods.NoImage, methods.NoImageAfter):
        assert kind.for_budget(144, 144) == kind.for_budget(16, 144)
    assert methods.NoImageAfter.for_budget(16, 144).layer == methods.FastV.k == 2
    with pytest.raises(UnsupportedError, match="1 to 3, not 4"):
        logits(methods.NoImageAfter(4))


# -- random at the same cut ------------------------------------------------------------------------


@pytest.mark.parametrize("key", TWINS)
@pytest.mark.parametrize("host", ["llava_clip", "llava_next"])
def test_a_twin_keeps_as_many_tokens_in_every_layer_and_others(key, host):
    rival, knobs = TWINS[key]
    ours, own = (logits(method_class(name)(**knobs), host) for name in (key, rival))
    assert ours[1].tokens_per_layer == own[1].tokens_per_layer
    assert ours[1].tokens_per_layer[-1] < ours[1].tokens_per_layer[0]
    assert not torch.allclose(ours[0][:, -1], own[0][:, -1])
    again = logits(method_class(key)(**knobs), host)[0]
    assert torch.equal(ours[0], again), "the same choice in every run"
    other = logits(method_class(key)(**knobs, seed=1), host)[0]
    assert not torch.allclose(ours[0][:, -1], other[:, -1]), "another seed, another choice"


def test_the_twin_of_sgl_needs_no_guide_and_has_its_layer():
    for kept in (7, 29, 58):
        ours, own = (kind.for_budget(kept, 144) for kind in (methods.RandomSGL, methods.SGL))
        assert (ours.kept_tokens, ours.layers(12)) == (own.kept_tokens, own.layers(12))
    trace = logits(methods.RandomSGL(6, 0.5))[1]
    assert trace.tokens_per_layer == [PATCHES] * 2 + [6] * 2


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.key)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_its_prompts_give_alone(method, side):
    """Dice know the words of a prompt, and not its place in a batch."""
    batch = prompt("llava_clip", MANY, side)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together, _ = logits(method, inputs={**batch, "position_ids": positions})
    for number, row in enumerate(MANY):
        alone, _ = logits(method, inputs=prompt("llava_clip", [row]))
        real = batch["attention_mask"][number].bool()
        torch.testing.assert_close(together[number][real], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("key", [*TWINS, "random_sgl"])
def test_keeping_all_is_the_untouched_model(key):
    method = method_class(key).for_budget(PATCHES, PATCHES)
    with torch.no_grad():
        expected = model_for("llava_clip")(**prompt("llava_clip")).logits
    assert torch.equal(logits(method)[0], expected)


def seen(words, layer=1, count=400):
    """What dice look at: prompts with three words behind a picture, the same for equal numbers."""
    slots = len(words)
    drawn = [torch.randn(3, 8, generator=torch.Generator().manual_seed(w)) for w in words]
    text = Text(
        torch.zeros(slots, 3, dtype=torch.long), torch.ones(slots, 3, dtype=torch.bool),
        torch.stack(drawn), torch.zeros(slots, count, 8),
    )  # fmt: skip
    return LayerView(
        layer, torch.zeros(slots, count + 3, 8), torch.arange(count).expand(slots, -1),
        (count,) * slots, (1,) * slots, count, torch.arange(slots),
        torch.full((slots,), count + 2), lambda queries: None, text_of=lambda: text,
    )  # fmt: skip


def test_dice_are_even_and_differ_by_words_layer_and_seed():
    same, twin, other = dice(seen([5, 5, 6]), 0)
    assert torch.equal(same, twin)
    rolls = [same, other, dice(seen([5]), 1)[0], dice(seen([5], layer=2), 0)[0]]
    for number, roll in enumerate(rolls):
        assert roll.min() >= 0
        assert roll.mean() == pytest.approx(0.5, abs=0.06)
        for later in rolls[number + 1 :]:
            assert abs(float(torch.corrcoef(torch.stack([roll, later]))[0, 1])) < 0.2


def test_everything_is_put_back():
    model = model_for("llava_clip")
    with torch.no_grad():
        answer = model(**prompt("llava_clip")).logits
        before = fingerprint_of(model)
        for method in ALL:
            logits(method)
        assert fingerprint_of(model).keys() == before.keys()
        assert torch.equal(model(**prompt("llava_clip")).logits, answer)
