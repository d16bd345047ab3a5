"""Methods on a model without weights, and in training."""

import os
from unittest import mock

import pytest
import torch
from tiny_hosts import (
    IMAGE,
    KEPT,
    LAYERS,
    PAIRS,
    VOCAB,
    K,
    Picture,
    build,
    cache_lengths,
    make,
    model_for,
    prompt,
)


@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_shapes_on_the_meta_device(key, host):
    with torch.device("meta"):
        model = build(host)
    inputs = prompt(host, dtype=torch.float32)
    placeholders = inputs["input_ids"] == IMAGE
    length = placeholders.shape[1]
    inputs = {k: v if k == "image_sizes" else v.to("meta") for k, v in inputs.items()}
    del inputs["attention_mask"]
    unchecked = mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")
    with unchecked, make(key).on(model, placeholders=placeholders) as trace, torch.no_grad():
        out = model(**inputs)
    assert out.logits.shape == (1, length, VOCAB)
    assert out.logits.is_meta
    gone = Picture(1).tokens(host) - KEPT * Picture(1).crops(host)
    first = {"vanilla": LAYERS, "fastv": K}.get(key, 0)
    assert cache_lengths(out.past_key_values) == [
        length - (gone if i >= first else 0) for i in range(LAYERS)
    ]
    if key != "vanilla":
        assert trace.tokens_per_layer[-1] == KEPT * Picture(1).crops(host)
        assert "placeholders" not in model.__dict__


@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_gradients_flow_through_a_pruned_forward(key, host):
    """A finite loss; gradients at the projector equal to those of the same run by differences."""
    model, inputs = model_for(host), prompt(host)
    labels = inputs["input_ids"].clone()
    labels[labels == IMAGE] = -100
    weight = model.model.multi_modal_projector.linear_2.weight
    try:
        with make(key).on(model):
            loss = model(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
            assert torch.isfinite(loss)
            gradient = weight.grad.clone()
            assert gradient.abs().max() > 0
            # The loss really has this slope: a small step along the gradient.
            step = 1e-3 * gradient / gradient.norm()
            with torch.no_grad():
                weight += step
                up = model(**inputs, labels=labels, use_cache=False).loss
                weight -= 2 * step
                down = model(**inputs, labels=labels, use_cache=False).loss
                weight += step
        slope = float((up - down) / 2e-3)  # the loss is computed in float32
        assert slope == pytest.approx(float(gradient.norm()), rel=2e-3)
    finally:
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("host", ["llava_clip", "llava_next"])
def test_the_token_behind_the_picture_is_predicted_by_the_last_visual_one(host):
    """Labels count prompt positions; a gone token shows the last survivor before it."""
    model, inputs = model_for(host), prompt(host, [[3, Picture(1), 4]])
    end = int((inputs["input_ids"][0] == IMAGE).nonzero().max())
    for key in ("fastv", "visionzip"):
        with make(key).on(model) as trace, torch.no_grad():
            hidden = model.model(**inputs).last_hidden_state[0]
            assert trace.calls == 1
        assert hidden.shape[0] == inputs["input_ids"].shape[1]
        assert hidden[end].abs().max() > 0
        same = [bool(torch.equal(hidden[i], hidden[i - 1])) for i in range(1, len(hidden))]
        gone = Picture(1).tokens(host) - KEPT * Picture(1).crops(host)
        assert sum(same) == gone


def test_gradient_checkpointing_is_refused_for_cuts():
    from frugalvlm.methods import FastV
    from frugalvlm.views import UnsupportedError

    model = build("llava_clip").train()
    model.gradient_checkpointing_enable()
    inputs = prompt("llava_clip", dtype=torch.float32)
    with FastV(KEPT).on(model), pytest.raises(UnsupportedError, match="switch it off"):
        model(**inputs)
