"""Methods on a model without weights, and in training."""

import os
from unittest import mock

import pytest
import torch
from tiny_hosts import (
    ADAPTIVE,
    IMAGE,
    KEPT,
    OWN_REFERENCE,
    PAIRS,
    VOCAB,
    Picture,
    build,
    cache_lengths,
    layer_tokens,
    make,
    model_for,
    prompt,
)

from frugalvlm.views import UnsupportedError


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
    if key in ("sparsevlm_rank", "dyvte"):  # counts are values here, and there are none
        with unchecked, make(key).on(model, placeholders), pytest.raises(UnsupportedError):
            model(**inputs)
        return
    with unchecked, make(key).on(model, placeholders=placeholders) as trace, torch.no_grad():
        try:
            out = model(**inputs)
        except UnsupportedError:
            assert key in ADAPTIVE, "only what keeps what a picture needs may refuse"
            assert key not in OWN_REFERENCE
            return
    assert out.logits.shape == (1, length, VOCAB)
    assert out.logits.is_meta
    tokens = trace.tokens_per_layer if _own_count(key) else layer_tokens(key, Picture(1), host)
    whole = Picture(1).tokens(host)
    assert cache_lengths(out.past_key_values) == [length - whole + t for t in tokens]
    assert trace.tokens_per_layer == tokens
    assert "placeholders" not in model.__dict__


def _own_count(key):
    """Whether a method, which has no reference of its own, keeps what a picture needs."""
    return key in ADAPTIVE and key not in OWN_REFERENCE


def _chosen(trace):
    """The patches at every layer."""
    return [trace.kept_at(i) for i in range(trace.decoder_layers)]


@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_gradients_flow_through_a_pruned_forward(key, host):
    """A finite loss; gradients at the projector equal to those of the same run by differences."""
    model, inputs = model_for(host), prompt(host)
    labels = inputs["input_ids"].clone()
    labels[labels == IMAGE] = -100
    weight = model.model.multi_modal_projector.linear_2.weight
    try:
        with make(key).on(model) as trace:
            loss = model(**inputs, labels=labels, use_cache=False).loss
            chosen = _chosen(trace)
            loss.backward()
            assert torch.isfinite(loss)
            gradient = weight.grad.clone()
            assert gradient.abs().max() > 0
            # The loss really has this slope: a small step along the gradient.
            for size in (1e-3, 5e-4, 2e-4, 1e-4):  # where other tokens are chosen the loss jumps
                step = size * gradient / gradient.norm()
                with torch.no_grad():
                    weight += step
                    up = model(**inputs, labels=labels, use_cache=False).loss
                    above = _chosen(trace)
                    weight -= 2 * step
                    down = model(**inputs, labels=labels, use_cache=False).loss
                    below = _chosen(trace)
                    weight += step
                # Which of the dropped tokens SparseVLM recycles, no trace says. When two of them
                # swap places at the edge of that pool (SigLIP's second cut: rated 0.04 % apart) the
                # loss jumps as well, and up and down no longer mirror each other.
                mirrored = abs(float(up + down - 2 * loss.detach())) < 0.05 * abs(float(up - down))
                same = mirrored and above == below == chosen
                if same:
                    break
        assert same, "no step keeps the same tokens: take another picture"
        slope = float((up - down) / (2 * size))  # the loss is computed in float32
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
