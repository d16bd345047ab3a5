"""DyVTE against its released code written out slowly, and against plausible mistakes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import embeddings
from reference_inside import hiding
from tiny_hosts import (
    KEPT,
    LAYERS,
    MANY,
    ONE,
    PATCHES,
    Picture,
    cache_lengths,
    make,
    model_for,
    pictures_of,
    prompt,
    tiny_weights,
)
from torch import Tensor

from frugalvlm.methods import DyVTE, DyVTEFastV, DyVTERate, FastV, ManualExit, NoImage, VisionZip
from frugalvlm.views import BudgetError, UnsupportedError

ROWS = [[[3, Picture(seed), 2 + seed % 4]] for seed in range(40, 50)]
HOSTS = ["llava_clip", "llava_gqa"]


def gates(host: str, kind: Any = DyVTE, factor: float = 1.0, **changes: Any) -> Any:
    """A method with random gates for a tiny model."""
    learnt = tiny_weights(kind, model_for(host), factor)
    return replace(kind(**changes), learnt=learnt)


@torch.no_grad()
def by_hand(
    model: Any, weights: dict[str, Tensor], row: list, host: str, *, renumber: bool = False,
    late: int = 0, early_states: bool = False, whole_mean: bool = False, system: bool = False,
    relu: bool = False, swapped: bool = False, normed: bool = False,
) -> tuple[list[list[float]], Tensor]:  # fmt: skip
    """Logits of every gate that is asked, and of the last token, as the released code runs.

    One prompt, layers one by one, the sequence cut by hand. The keywords are mistakes.
    """
    embeds, (image,) = embeddings(make("vanilla"), model, host, row[0], [])
    decoder, x, before = model.model.language_model, embeds, embeds
    positions, asked, start, end = torch.arange(x.shape[1])[None], [], image[0], image[-1] + 1
    leaving = None
    for index, layer in enumerate(decoder.layers):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
        rotary = decoder.rotary_emb(x, positions)
        before, x = x, layer(x, attention_mask=mask, position_embeddings=rotary)
        if leaving is None and index < LAYERS - 1:
            seen = (decoder.norm(x) if normed else before if early_states else x)[0]
            text = [t for t in range(0 if system else end, len(seen)) if not start <= t < end]
            words = [seen[t].tolist() for t in text]
            count = words if whole_mean or len(words) == 1 else words[:-1]
            mean = [sum(column) / len(count) for column in zip(*count, strict=True)]
            features = words[-1] + mean if swapped else mean + words[-1]
            w1, w2 = (weights[f"{index}.{name}.weight"].tolist() for name in ("w1", "w2"))
            inner = [sum(w * f for w, f in zip(line, features, strict=True)) for line in w1]
            inner = [
                max(v, 0.0) if relu else v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in inner
            ]
            asked.append([sum(w * v for w, v in zip(line, inner, strict=True)) for line in w2])
            if asked[-1][1] > asked[-1][0]:
                leaving = index + late
        if leaving == index:
            x = torch.cat([x[:, :start], x[:, end:]], 1)
            positions = torch.cat([positions[:, :start], positions[:, end:]], 1)
            if renumber:
                positions = torch.arange(x.shape[1])[None]
    return asked, model.lm_head(decoder.norm(x))[0, -1]


def by_method(method: Any, row: list, host: str) -> tuple[list[list[float]], Tensor]:
    """The same of the kit's."""
    asked: list[list[float]] = []
    hooks = [
        gate.register_forward_hook(lambda m, args, out: asked.append(out[0].tolist()))
        for gate in method.learnt.own
    ]
    try:
        with method.on(model_for(host)), torch.no_grad():
            logits = model_for(host)(**prompt(host, row)).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()
    return asked, logits


def equal(a: tuple[list[list[float]], Tensor], b: tuple[list[list[float]], Tensor]) -> bool:
    same_gates = len(a[0]) == len(b[0]) and torch.allclose(
        torch.tensor(a[0]).double(), torch.tensor(b[0]).double(), rtol=1e-9, atol=1e-9
    )
    return same_gates and torch.allclose(a[1], b[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("host", HOSTS)
def test_gates_and_logits_are_those_of_the_released_code(host):
    method = gates(host)
    weights = method.learnt.own.state_dict()
    exits = set()
    for row in ROWS:
        own, theirs = by_method(method, row, host), by_hand(model_for(host), weights, row, host)
        assert equal(own, theirs), "gate inputs, GELU without biases, exit behind layer k"
        exits.add(len(own[0]))
    assert len(exits) > 1, "these prompts do not tell exit layers apart"


MISTAKES = (
    "renumber", "early_states", "whole_mean", "system", "relu", "swapped", "normed",
)  # fmt: skip


@pytest.mark.parametrize("mistake", [*MISTAKES, "late"])
def test_mistakes_are_told_apart(mistake):
    host = "llava_clip"
    weights = gates(host).learnt.own.state_dict()
    changed = {mistake: 1 if mistake == "late" else True}
    pairs = [
        (by_method(gates(host), row, host), by_hand(model_for(host), weights, row, host, **changed))
        for row in ROWS
    ]
    assert not all(equal(own, wrong) for own, wrong in pairs)


@pytest.mark.parametrize("host", HOSTS)
def test_without_an_exit_the_answers_are_the_untouched_models(host):
    """The released code stops with an error at the first new token then."""
    model, silent = model_for(host), gates(host, factor=0.0)
    inputs = prompt(host)
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with silent.on(model) as trace:
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), plain)
    assert trace.tokens_per_layer == [PATCHES] * LAYERS


@pytest.mark.parametrize("cached", [True, False])
def test_gates_are_asked_while_the_prompt_is_read_only(cached):
    host = "llava_clip"
    asked = []
    method = gates(host, factor=0.0)  # every gate is asked
    hooks = [g.register_forward_hook(lambda *_: asked.append(1)) for g in method.learnt.own]
    with method.on(model_for(host)):
        model_for(host).generate(
            **prompt(host), max_new_tokens=4, do_sample=False, use_cache=cached
        )
    for hook in hooks:
        hook.remove()
    assert len(asked) == LAYERS - 1


def test_prompts_of_a_batch_exit_by_themselves_and_caches_are_short():
    host, method = "llava_clip", gates("llava_clip")
    model, left = model_for(host), []
    for row in MANY:
        if pictures_of(row):
            with method.on(model) as trace, torch.no_grad():
                cache = model(**prompt(host, [row])).past_key_values
            whole = len(pictures_of(row)) * PATCHES
            text = cache_lengths(cache)[0] - whole
            lengths = [text + len(pictures_of(row)) * t for t in trace.tokens_per_layer]
            assert cache_lengths(cache) == lengths
            left += [trace.tokens_per_layer] * len(pictures_of(row))
    with method.on(model) as trace, torch.no_grad():
        model(**prompt(host, MANY))
    means = [sum(layer) / len(left) for layer in zip(*left, strict=True)]
    assert trace.tokens_per_layer == means
    assert any(low == 0 and high == PATCHES for low, high in trace.spread), "all exit together"


def test_all_pictures_of_a_prompt_leave_together():
    host, row = "llava_clip", [[2, Picture(3), 1, Picture(4), 3]]
    with gates(host).on(model_for(host)) as trace, torch.no_grad():
        model_for(host)(**prompt(host, row))
    assert all(low == high for low, high in trace.spread)


def test_the_knob():
    host = "llava_clip"
    seen = {}
    for threshold in (0.0, 0.5, 1.0):
        method = gates(host, DyVTERate, threshold=threshold)
        with method.on(model_for(host)) as trace, torch.no_grad():
            logits = model_for(host)(**prompt(host, MANY)).logits
        seen[threshold] = trace.mean_tokens, logits
    with gates(host).on(model_for(host)), torch.no_grad():
        plain = model_for(host)(**prompt(host, MANY)).logits
    assert torch.equal(seen[0.5][1], plain)
    assert seen[0.0][0] == PATCHES / LAYERS  # every gate is sure enough
    assert seen[0.0][0] < seen[0.5][0] < seen[1.0][0] == PATCHES


def test_with_fastv_both_cut():
    """Where no gate fires it is FastV; where one does before FastV's cut it is DyVTE."""
    host, row = "llava_clip", ONE
    model = model_for(host)
    silent = gates(host, DyVTEFastV, 0.0, kept_tokens=KEPT)
    with silent.on(model) as trace, torch.no_grad():
        both = model(**prompt(host, row)).logits
    with FastV(KEPT).on(model), torch.no_grad():
        assert torch.equal(both, model(**prompt(host, row)).logits)
    assert trace.tokens_per_layer == [PATCHES, PATCHES, KEPT, KEPT]
    method = gates(host, DyVTEFastV, kept_tokens=KEPT)
    with method.on(model) as trace, torch.no_grad():
        model(**prompt(host, MANY))
    with gates(host).on(model) as alone, torch.no_grad():
        model(**prompt(host, MANY))
    assert trace.tokens_per_layer[:2] == alone.tokens_per_layer[:2]
    assert {high for _, high in trace.spread[2:]} <= {0, KEPT}
    with (
        pytest.raises(UnsupportedError, match="choose k in"),
        gates(host, DyVTEFastV, kept_tokens=KEPT, k=LAYERS).on(model),
    ):
        pass


def test_behind_an_encoder_reducer():
    host = "llava_clip"
    with (VisionZip(4, 2) | gates(host)).on(model_for(host)) as trace, torch.no_grad():
        model_for(host)(**prompt(host, MANY))
    assert trace.tokens_per_layer[0] == 6
    assert {high for _, high in trace.spread} <= {0, 6}


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_manual_exit_hides_the_picture_from_later_layers(after):
    host = "llava_clip"
    model = model_for(host)
    with ManualExit(after).on(model) as trace, torch.no_grad():
        logits = model(**prompt(host, ONE)).logits[0, -1]
    embeds, (image,) = embeddings(make("vanilla"), model, host, ONE[0], [])
    with hiding(model, {after: image}, see_themselves=True), torch.no_grad():
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
    torch.testing.assert_close(logits, model.lm_head(hidden)[0, -1], rtol=1e-9, atol=1e-9)
    assert trace.tokens_per_layer == [PATCHES] * after + [0] * (LAYERS - after)


def test_a_manual_exits_budget_is_a_mean_over_layers():
    assert [ManualExit.for_mean(n, 144, 12).after for n in (36, 72, 108, 144, 1)] == [
        3,
        6,
        9,
        12,
        1,
    ]
    assert ManualExit(12).layers(12) == ()
    assert ManualExit.for_budget(144, 144).layers(12) == ()
    with pytest.raises(BudgetError, match="for_mean"):
        ManualExit.for_budget(72, 144)


@pytest.mark.parametrize("host", ["llava_clip", "llava_next"])
def test_text_only_is_the_prompt_without_its_picture(host):
    model, inputs = model_for(host), prompt(host)
    with NoImage().on(model) as trace, torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    words = inputs["input_ids"][inputs["input_ids"] != 60][None]
    with torch.no_grad():
        plain = model(input_ids=words).logits[0, -1]
    torch.testing.assert_close(logits, plain, rtol=1e-9, atol=1e-9)
    alone = model.generate(input_ids=words, max_new_tokens=3, do_sample=False)
    assert torch.equal(said[:, inputs["input_ids"].shape[1] :], alone[:, words.shape[1] :])
    assert trace.tokens_per_layer == [0] * LAYERS


@pytest.mark.parametrize("inputs", [("last_text",), ("mean_visual", "last_text")])
def test_gates_are_as_wide_as_what_they_see(inputs):
    sizes = tiny_weights(DyVTE, model_for("llava_clip"), 1.0).sizes
    assert DyVTE(inputs=inputs).build(sizes)[0].w1.in_features == 32 * len(inputs)
    assert DyVTE(inputs=inputs, hidden=5).build(sizes)[0].w2.in_features == 5


def test_what_a_gate_may_see():
    host = "llava_clip"
    method = DyVTE(inputs=("mean_visual", "last_visual"))
    learnt = tiny_weights(lambda: method, model_for(host), 1.0)
    seen = []
    hook = learnt.own[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with replace(method, learnt=learnt).on(model_for(host)), torch.no_grad():
        out = model_for(host)(**prompt(host), output_hidden_states=True)
    hook.remove()
    visual = out.hidden_states[1][0][prompt(host)["input_ids"][0] == 60]
    torch.testing.assert_close(seen[0][0], torch.cat([visual[:-1].mean(0), visual[-1]]))
    with pytest.raises(UnsupportedError, match="inputs"):
        DyVTE(inputs=())
