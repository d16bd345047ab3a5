"""Contract 11: masks of every kind are served or named; scores see what the mask shows."""

from dataclasses import dataclass

import pytest
import torch
from reference import hidden_keys
from tiny_hosts import HOSTS, IMAGE, KEPT, MANY, PAIRS, K, Picture, make, model_for, prompt

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


@pytest.mark.parametrize("key", ["visionzip", "fastv", "aim", "sparsevlm", "aim_mask", "sgl"])
@pytest.mark.parametrize("host", ["llava_clip", "llava_next"])
def test_attention_maps_are_those_of_the_prompt(key, host):
    """A column for every token: what is gone gets nothing, and the others all of it."""
    # In float64 padding is NaN in eager attention, of the untouched model, too.
    model = model_for(host, "eager", torch.float32)
    inputs = prompt(host, MANY, dtype=torch.float32)
    places, (batch, length) = inputs["input_ids"] == IMAGE, inputs["input_ids"].shape
    with make(key).on(model) as trace, torch.no_grad():
        out = model(**inputs, output_attentions=True)
        more = {
            "input_ids": torch.full((batch, 2), 5),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1),
        }
        later = model(**more, past_key_values=out.past_key_values, output_attentions=True)
    assert {(*m.shape[:1], *m.shape[2:]) for m in out.attentions} == {(batch, length, length)}
    assert {m.shape[2:] for m in later.attentions} == {(2, length + 2)}
    for layer, (maps, steps) in enumerate(zip(out.attentions, later.attentions, strict=True)):
        last = (inputs["attention_mask"] * torch.arange(length)).argmax(-1)
        asked = maps[torch.arange(batch), :, last]
        for rows in (asked, steps[:, :, 0], steps[:, :, 1]):
            torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]))
        # Random weights leave no key that is there without attention.
        seen = ((steps[:, :, 1, :length] > 0).any(1) & places).sum().item()
        visual = trace.visible_per_layer[layer]
        assert seen == round(visual * sum(isinstance(p, Picture) for row in MANY for p in row))
        assert not (steps[:, :, 1, :length] * (1 - inputs["attention_mask"][:, None])).any()


def test_attention_maps_behind_a_cut_are_those_of_a_run_with_hidden_keys():
    model, inputs = model_for("llava_clip", "eager"), prompt("llava_clip")
    places = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
    with make("fastv").on(model) as trace, torch.no_grad():
        out = model(**inputs, output_attentions=True).attentions
    gone = [place for n, place in enumerate(places) if n not in trace.kept[0]]
    with hidden_keys(model, gone, K), torch.no_grad():
        layers = model.model.language_model.layers
        hooks = [layer.register_forward_pre_hook(_added, with_kwargs=True) for layer in layers]
        whole = model(**inputs, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    there = [i for i in range(inputs["input_ids"].shape[1]) if i not in gone]
    for maps, expected in zip(out, whole, strict=True):
        torch.testing.assert_close(maps[:, :, there], expected[:, :, there], rtol=1e-4, atol=1e-6)


def _added(module, args, kwargs):
    """Eager attention adds masks."""
    mask = kwargs["attention_mask"]
    least = torch.finfo(torch.float32).min
    return args, {**kwargs, "attention_mask": torch.zeros(mask.shape).masked_fill(~mask, least)}
