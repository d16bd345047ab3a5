"""Contract 11: masks of every kind are served or named; scores see what the mask shows."""

from dataclasses import dataclass

import pytest
import torch
from tiny_hosts import HOSTS, IMAGE, KEPT, MANY, PAIRS, Picture, make, model_for, prompt

from frugalvlm.methods import FastV, Vanilla, VisionZip
from frugalvlm.views import UnsupportedError

METHODS = (FastV(KEPT), VisionZip(4, 2))


def shorter(mask, ids):
    return mask[:, 3:]


def longer(mask, ids):
    return torch.nn.functional.pad(mask, (0, 2), value=1)


def all_zero(mask, ids):
    return mask * torch.tensor([[1], [0], [1], [1]])


def half_a_picture(mask, ids):
    places = (ids[0] == IMAGE).nonzero()[:, 0]
    mask = mask.clone()
    mask[0, places[: len(places) // 2]] = 0
    return mask


def three_axes(mask, ids):
    return mask[:, None]


def small_square(mask, ids):
    return torch.ones(len(mask), 1, 5, 5, dtype=torch.bool)


def several(mask, ids):
    return {"full_attention": mask}


WRONG = {
    shorter: "pass the processor's own",
    longer: "pass the processor's own",
    all_zero: "leave that row out",
    half_a_picture: "mask no part of a picture",
    three_axes: "2-D or 4-D",
    small_square: "pass the processor's own",
    several: "2-D or 4-D",
}


@pytest.mark.parametrize("host", ["llava_clip", "llava_next"])
@pytest.mark.parametrize("change", WRONG)
def test_masks_that_cannot_be_served_are_named(change, host):
    model, inputs = model_for(host), prompt(host, MANY)
    inputs["attention_mask"] = change(inputs["attention_mask"], inputs["input_ids"])
    for method in METHODS:
        with method.on(model), pytest.raises(UnsupportedError, match=WRONG[change]):
            model(**inputs)


@pytest.mark.parametrize("change", [half_a_picture, all_zero])
def test_the_untouched_model_takes_its_own_masks(change):
    model, inputs = model_for("llava_clip"), prompt("llava_clip", MANY)
    inputs["attention_mask"] = change(inputs["attention_mask"], inputs["input_ids"])
    with torch.no_grad():
        plain = model(**inputs).logits
        with Vanilla().on(model) as trace:
            assert torch.equal(model(**inputs).logits, plain)
        assert trace.calls == 1


@pytest.mark.parametrize("kind", ["bool", "additive", "biased"])
@pytest.mark.parametrize("host", HOSTS)
def test_scores_see_what_a_4d_mask_shows(host, kind):
    """Image tokens that see each other both ways: FastV must rank by just that attention."""
    model, eager = (model_for(host, a, torch.float32) for a in ("sdpa", "eager"))
    picture = Picture(1)
    # The picture ends the prompt, so that the asking token has later keys to see.
    inputs = prompt(host, [[3, picture]], dtype=torch.float32)
    inputs["input_ids"][0, -1] = 7  # and one word behind it
    inputs["input_ids"][0, 3] = IMAGE
    places = inputs["input_ids"][0] == IMAGE
    length = len(places)
    seen = torch.ones(length, length, dtype=torch.bool).tril() | (places[:, None] & places)
    seen = seen[None, None]
    least = torch.finfo(torch.float32).min
    mask = torch.zeros(seen.shape).masked_fill(~seen, least)
    if kind == "biased":
        mask = mask - 3.0 * (torch.arange(length) % 3 == 0) * seen
    inputs["attention_mask"] = seen if kind == "bool" else mask
    asked = int(places.nonzero()[2])
    rows = []

    @dataclass(frozen=True)
    class Spy(FastV):
        def keep(self, view):
            rows.append(view.attention_rows(torch.tensor([[asked, length - 1]])))
            return super().keep(view)

    with Spy(KEPT).on(model), torch.no_grad():
        model(**inputs)
    with torch.no_grad():
        out = eager(**{**inputs, "attention_mask": mask}, output_attentions=True)
    expected = out.attentions[1][:, :, [asked, length - 1]]
    torch.testing.assert_close(rows[0], expected, rtol=1e-3, atol=2e-5)
    assert expected[0, :, 0, asked + 1 :].sum() > 0.01, "nothing later is seen"


@pytest.mark.parametrize(
    ("key", "host"), [p for p in PAIRS if p[1] in ("llava_clip", "llava_next")]
)
def test_hidden_states_are_those_of_the_prompt(key, host):
    """As many as layers and one, each of the prompt's length, the last the decoder's output."""
    model, inputs = model_for(host), prompt(host, MANY)
    with make(key).on(model), torch.no_grad():
        out = model.model(**inputs, output_hidden_states=True)
    batch, length = inputs["input_ids"].shape
    assert {tuple(h.shape[:2]) for h in out.hidden_states} == {(batch, length)}
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    # Words behind the pictures stand where they stood: what each layer made of the last one.
    seen = []
    hooks = [
        layer.register_forward_hook(lambda m, a, o: seen.append(o[:, -1]))
        for layer in model.model.language_model.layers
    ]
    with make(key).on(model), torch.no_grad():
        model.model(**inputs)
    for hook in hooks:
        hook.remove()
    for states, last in zip(out.hidden_states[1:-1], seen, strict=False):
        assert torch.equal(states[:, -1], last)
