"""Labels and steps of DyVTE's training against the released code written out slowly."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_hosts import IMAGE, LAYERS, PAD, Picture, model_for, prompt, tiny_weights
from torch import nn

from frugalvlm.hosts import host_for
from frugalvlm.methods import DyVTE
from frugalvlm.methods.dyvte import gate_input
from frugalvlm.training import dyvte
from frugalvlm.training.data import IGNORED
from frugalvlm.training.dyvte import ExitObjective, exit_labels, lesson_of_layer
from frugalvlm.views import UnsupportedError

ANSWERS = [[7, 8, 9], [11], [12, 13], [14, 15, 16, 17]]
ROWS = [[3, Picture(seed), 2 + seed % 3] for seed in range(60, 64)]


def batch_of(host: str = "llava_clip", rows: list = ROWS, answers: list = ANSWERS) -> dict:
    """Prompts with answers, padded on the right."""
    made = [prompt(host, [row]) for row in rows]
    ids = [
        torch.cat([m["input_ids"][0], torch.tensor(a)]) for m, a in zip(made, answers, strict=True)
    ]
    labels = [
        torch.cat([torch.full_like(i[: -len(a)], IGNORED), torch.tensor(a)])
        for i, a in zip(ids, answers, strict=True)
    ]
    padded = nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(i) for i in ids])[:, None]
    stacked = padded(ids, batch_first=True, padding_value=PAD)
    inputs = {
        "input_ids": stacked,
        "attention_mask": (torch.arange(stacked.shape[1]) < lengths).long(),
        "pixel_values": torch.cat([m["pixel_values"] for m in made]),
    }
    return {
        "inputs": inputs,
        "labels": padded(labels, batch_first=True, padding_value=IGNORED),
        "numbers": torch.arange(len(rows)),
    }


@torch.no_grad()
def by_hand(model, row, answer, layer, *, from_layer=None, answer_in=False, blind=True):
    """One prompt as the released code trains on it: gate input, and logits of both runs.

    The keywords are mistakes: another first layer that is blind, the answer among the gate's
    words, nothing hidden at all.
    """
    made = prompt("llava_clip", [row])
    ids = torch.cat([made["input_ids"][0], torch.tensor(answer)])
    embeds = model.get_input_embeddings()(ids)[None].clone()
    image = (ids == IMAGE).nonzero()[:, 0].tolist()
    embeds[0, image] = model.get_image_features(made["pixel_values"]).pooler_output[0]
    decoder, length = model.model.language_model, len(ids)
    rotary = decoder.rotary_emb(embeds, torch.arange(length)[None])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    hidden_image = causal.clone()
    hidden_image[:, image] = False
    hidden_image |= torch.eye(length, dtype=torch.bool)
    outs, features = [], None
    for run in ("default", "exit"):
        x = embeds
        for index, block in enumerate(decoder.layers):
            first = layer + 1 if from_layer is None else from_layer
            gone = run == "exit" and index >= first and blind
            mask = (hidden_image if gone else causal)[None, None]
            x = block(x, attention_mask=mask, position_embeddings=rotary)
            if index == layer and features is None:
                text = x[0, image[-1] + 1 :]
                text = text if answer_in else text[: -len(answer)]
                features = torch.cat([text[:-1].mean(0), text[-1]])
        logits = model.lm_head(decoder.norm(x))[0]
        outs.append(logits[length - len(answer) - 1 : -1])
    return features, *outs


def label_by_hand(default, left, answer) -> int:
    same = sum(int(a.argmax() == b.argmax()) for a, b in zip(default, left, strict=True))
    losses = [
        sum(-float(row.log_softmax(-1)[t]) for row, t in zip(rows, answer, strict=True))
        / len(answer)
        for rows in (default, left)
    ]
    return int(same / len(answer) > 0.99 and losses[1] < losses[0] * 1.03)


def steps(layer: int, **mistake):
    """Gate inputs and labels of the batch, by the kit and by hand."""
    model, batch = model_for("llava_clip"), batch_of()
    hidden, parts, labels = lesson_of_layer(host_for(model), batch, layer)
    hand = [by_hand(model, r, a, layer, **mistake) for r, a in zip(ROWS, ANSWERS, strict=True)]
    theirs = [label_by_hand(*h[1:], a) for h, a in zip(hand, ANSWERS, strict=True)]
    return gate_input(hidden, parts), torch.stack([h[0] for h in hand]), labels.tolist(), theirs


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_step_is_the_released_codes(layer):
    own, theirs, labels, by_loops = steps(layer)
    torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9)
    assert labels == by_loops
    if layer == LAYERS - 1:
        assert labels == [1] * len(ROWS), "behind the last layer nothing can change"


def runs(layer: int):
    """Both runs' answer logits, by the kit's own doubled pass, prompt by prompt."""
    model, batch, heard = model_for("llava_clip"), batch_of(), []

    def listening(whole, without, wanted, owner):
        heard.append((whole, without, owner))
        return exit_labels(whole, without, wanted, owner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dyvte, "exit_labels", listening)
        lesson_of_layer(host_for(model), batch, layer)
    whole, without, owner = heard[0]
    return [(whole[owner == i], without[owner == i]) for i in range(len(ROWS))]


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_doubled_pass_is_two_passes(layer):
    for (whole, without), row, answer in zip(runs(layer), ROWS, ANSWERS, strict=True):
        _, default, left = by_hand(model_for("llava_clip"), row, answer, layer)
        torch.testing.assert_close(whole.double(), default, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(without.double(), left, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mistake", [{"from_layer": 1}, {"from_layer": 3}, {"blind": False}])
def test_another_first_layer_is_told_apart(mistake):
    apart = []
    for (_, without), row, answer in zip(runs(1), ROWS, ANSWERS, strict=True):
        wrong = by_hand(model_for("llava_clip"), row, answer, 1, **mistake)[2]
        apart.append(float((without - wrong).abs().max().detach()))
    assert min(apart) > 1e-3


def test_the_answer_is_no_part_of_what_a_gate_sees():
    own, wrong, *_ = steps(1, answer_in=True)
    assert (own - wrong).abs().max() > 1e-3


def test_labels_of_equations_4_to_6():
    """Tokens must agree, and the loss may grow by less than 3 %."""
    wanted, owner = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 2])
    whole = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    usual = math.log(1 + math.exp(-2))

    def margin(factor: float) -> float:  # the logit at which the loss is so much larger
        return -math.log(math.expm1(usual * factor))

    nearly, too_far = margin(1.02), margin(1.04)
    without = torch.tensor([[nearly, 0.0], [0.0, nearly], [too_far, 0.0], [-0.1, 0.0]])
    assert exit_labels(whole, without, wanted, owner).tolist() == [1, 0, 0]
    flipped = without.clone()
    flipped[1] = torch.tensor([2.1, 2.0])  # one of two answer tokens changes
    assert exit_labels(whole, flipped, wanted, owner).tolist()[0] == 0


def test_gradients_reach_the_drawn_gate_and_nothing_else():
    model = model_for("llava_clip")
    learnt = tiny_weights(DyVTE, model, 1.0)
    objective = ExitObjective(replace(DyVTE(), learnt=learnt), model)
    model.zero_grad(set_to_none=True)
    drawn = set()
    for seed in range(8):
        learnt.own.zero_grad(set_to_none=True)
        loss, told = objective(batch_of(), np.random.default_rng(seed))
        loss.backward()
        reached = {i for i, g in enumerate(learnt.own) if g.w1.weight.grad is not None}
        assert reached == {told["layer"]}
        drawn |= reached
    assert len(drawn) > 1
    assert all(p.grad is None for p in model.parameters())


def test_every_gate_but_the_last_is_drawn_alike():
    layers = [int(np.random.default_rng([0, 0, i]).integers(4)) for i in range(400)]
    assert min(map(layers.count, range(4))) > 70


def test_kernels_that_take_no_mask_are_refused():
    model = model_for("llava_clip")
    config = model.model.language_model.config
    before = config._attn_implementation
    config._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(UnsupportedError, match="attn_implementation='sdpa'"):
            lesson_of_layer(host_for(model), batch_of(), 1)
    finally:
        config._attn_implementation = before


def test_eager_attention_gives_the_same_step():
    sdpa = lesson_of_layer(host_for(model_for("llava_clip")), batch_of(), 1)
    eager = lesson_of_layer(host_for(model_for("llava_clip", "eager")), batch_of(), 1)
    torch.testing.assert_close(sdpa[0], eager[0], rtol=1e-4, atol=1e-4)  # softmax in float32
    assert sdpa[2].tolist() == eager[2].tolist()
