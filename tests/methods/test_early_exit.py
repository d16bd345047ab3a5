"""Early exit against a token-by-token transcription in plain matrices, and plausible mistakes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from reference import rotate
from tiny_hosts import (
    HOSTS,
    KEPT,
    LAYERS,
    MANY,
    Picture,
    build,
    cache_lengths,
    fingerprint_of,
    model_for,
    prompt,
    steps_by_hand,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from frugalvlm.engine import exits
from frugalvlm.methods import EarlyExit, FastV, VisionZip
from frugalvlm.views import BudgetError, UnsupportedError

STEPS = 8
ROW = [3, Picture(1), 5]
GATES = [("confidence", 0.25), ("entropy", 0.75), ("patience", 1)]
COPIES = ["hidden", "keys_values", "recompute"]
TEXT_FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config,
                 "qwen3": Qwen3Config}  # fmt: skip


def says(model: Any, hidden: Tensor) -> list[float]:
    """Probabilities of the next token, read off a state."""
    norm = model.get_decoder().norm
    x = hidden / (hidden.pow(2).mean() + norm.variance_epsilon).sqrt() * norm.weight
    z = [float(row @ x) for row in model.lm_head.weight]
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def may_leave(method: EarlyExit, read: list[list[float]]) -> bool:
    """The gate, from the probabilities of all layers so far."""
    p = read[-1]
    if method.gate == "confidence":
        return max(p) >= method.threshold
    if method.gate == "entropy":
        return -sum(x * math.log(x) for x in p) / math.log(len(p)) <= method.threshold
    words = [q.index(max(q)) for q in read]
    k = int(method.threshold)
    return len(words) > k and len(set(words[-k - 1 :])) == 1


@torch.no_grad()
def transcribed(
    model: Any, inputs: dict, tokens: list[int], method: EarlyExit, mistake: str = ""
) -> tuple[Tensor, list[int], Tensor]:
    """Logits behind each token of an answer, where each left, and the cache at the end.

    One prompt, one token, one head at a time.
    """
    decoder = model.get_decoder()
    cache = model(**inputs).past_key_values
    keys = [list(layer.keys[0].unbind(1)) for layer in cache.layers]  # per position [heads, dim]
    values = [list(layer.values[0].unbind(1)) for layer in cache.layers]
    logits, left = [], []
    for token in tokens:
        h = model.get_input_embeddings().weight[token]
        at = len(keys[0]) + (mistake == "position off by one")
        read: list[list[float]] = []
        exit_at, state, pairs = len(decoder.layers), None, []
        for number, layer in enumerate(decoder.layers, 1):
            gone = state is not None
            x = state if gone and method.kv_copy == "hidden" else h
            pairs.append(key_value(layer, x, decoder, at if gone else len(keys[0])))
            if gone and mistake == "final norm on the copied state":
                pairs[-1] = key_value(layer, decoder.norm(x), decoder, at)
            if gone and mistake == "without the block's input norm":
                pairs[-1] = key_value(layer, x, decoder, at, normed=False)
            if gone and method.kv_copy == "keys_values":
                pairs[-1] = pairs[exit_at - 1 - (mistake == "one block too low")]
            h = block(layer, h, decoder, keys[number - 1], values[number - 1], pairs[-1])
            read.append(says(model, h))
            if mistake == "gate without the final norm":
                z = model.lm_head.weight @ h
                read[-1] = z.softmax(-1).tolist()
            may = number >= method.first_layer and number < len(decoder.layers)
            if not gone and may and may_leave(method, read[method.first_layer - 1 :]):
                exit_at, state = number, h
        for number, (key, value) in enumerate(pairs):
            keys[number].append(key)
            values[number].append(value)
        logits.append(model.lm_head(decoder.norm(h if state is None else state)))
        left.append(exit_at)
    cached = [torch.stack([torch.stack(layer, 1) for layer in part]) for part in (keys, values)]
    return torch.stack(logits), left, torch.stack(cached)


def key_value(
    layer: Any, x: Tensor, decoder: Any, at: int, normed: bool = True
) -> tuple[Tensor, Tensor]:
    """Rotated key and value [heads, dim] of one token."""
    attention = layer.self_attn
    x = layer.input_layernorm(x) if normed else x
    cos, sin = (t[0] for t in decoder.rotary_emb(x, torch.tensor([[at]])))
    key = attention.k_proj(x).view(-1, attention.head_dim)
    if hasattr(attention, "k_norm"):
        key = attention.k_norm(key)
    return rotate(key, cos, sin), attention.v_proj(x).view(-1, attention.head_dim)


def block(
    layer: Any, h: Tensor, decoder: Any, keys: list[Tensor], values: list[Tensor], own: tuple
) -> Tensor:
    """A decoder block on one token, given what the cache holds and the token's own entry."""
    attention = layer.self_attn
    x = layer.input_layernorm(h)
    cos, sin = (t[0] for t in decoder.rotary_emb(x, torch.tensor([[len(keys)]])))
    queries = attention.q_proj(x).view(-1, attention.head_dim)
    if hasattr(attention, "q_norm"):
        queries = attention.q_norm(queries)
    heads = []
    for head, query in enumerate(rotate(queries, cos, sin)):
        group = head // attention.num_key_value_groups
        k = torch.stack([key[group] for key in (*keys, own[0])])
        v = torch.stack([value[group] for value in (*values, own[1])])
        heads.append((k @ query * attention.scaling).softmax(-1) @ v)
    h = h + attention.o_proj(torch.cat(heads))
    return h + layer.mlp(layer.post_attention_layernorm(h))


def answer_of(model: Any, inputs: dict, method: EarlyExit) -> tuple[list[int], list[int]]:
    """What generate says with a method, and where its tokens left."""
    with method.on(model) as trace:
        said = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    return said[0, inputs["input_ids"].shape[1] :].tolist(), [row[0] for row in trace.exits]


def compare(host: str, method: EarlyExit, mistake: str = "") -> None:
    """Logits and exits of the kit against the transcription, on the kit's own answer."""
    model, inputs = model_for(host), prompt(host, [ROW])
    answer, left = answer_of(model, inputs, method)
    with method.on(model) as trace:
        logits, cache = steps_by_hand(model, inputs, torch.tensor([answer[:-1]]), [1] * (STEPS - 1))
    assert [row[0] for row in trace.exits] == left, "generate and steps by hand differ"
    expected, layers, cached = transcribed(model, inputs, answer[:-1], method, mistake)
    assert left == layers, "tokens left elsewhere"
    assert len(set(cache_lengths(cache))) == 1, "a skipped block wrote nothing"
    # The library computes rotary angles in float32.
    torch.testing.assert_close(logits[0, 1:], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(contents(cache), cached, rtol=1e-6, atol=1e-6)


def contents(cache: Any) -> Tensor:
    """Keys and values of a cache of one row, [2, layers, heads, length, dim]."""
    pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(pairs, 1)


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
@pytest.mark.parametrize(("gate", "threshold"), GATES)
@pytest.mark.parametrize("kv_copy", COPIES)
def test_every_gate_and_copy_equals_the_transcription(host, gate, threshold, kv_copy):
    method = EarlyExit(gate, threshold, kv_copy)
    compare(host, method)
    _, left = answer_of(model_for(host), prompt(host, [ROW]), method)
    assert min(left) < LAYERS, "nothing left early: the comparison shows nothing"


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("kv_copy", COPIES)
def test_always_leaving_after_a_layer(layer, kv_copy):
    method = EarlyExit("confidence", 0.0, kv_copy, first_layer=layer)
    compare("llava_gqa", method)
    assert set(answer_of(model_for("llava_gqa"), prompt("llava_gqa", [ROW]), method)[1]) == {layer}


MISTAKES = {
    "position off by one": "hidden",
    "final norm on the copied state": "hidden",
    "without the block's input norm": "hidden",
    "one block too low": "keys_values",
    "gate without the final norm": "hidden",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_found(mistake):
    method = EarlyExit("confidence", 0.2, MISTAKES[mistake], first_layer=2)
    compare("llava_clip", method)
    with pytest.raises(AssertionError):
        compare("llava_clip", method, mistake)


def test_the_copies_are_told_apart():
    """A transcription of one copy is rejected for every other."""
    model, inputs = model_for("llava_clip"), prompt("llava_clip", [ROW])
    runs = [
        transcribed(model, inputs, list(range(5, 20)), EarlyExit("confidence", 0.2, kv_copy))
        for kv_copy in COPIES
    ]
    for i, (logits, left, cached) in enumerate(runs):
        first = next(place for place, layer in enumerate(left) if layer < LAYERS)
        for other, _, other_cached in runs[:i]:
            assert torch.equal(logits[: first + 1], other[: first + 1]), "nothing copied so far"
            assert (logits - other).abs().max() > 1e-3
            assert (cached - other_cached).abs().max() > 1e-3


NEVER = [EarlyExit("confidence", 1.5), EarlyExit("entropy", -1.0), EarlyExit("patience", LAYERS),
         EarlyExit("confidence", 0.0, first_layer=LAYERS)]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", NEVER, ids=lambda m: m.gate)
@pytest.mark.parametrize("kv_copy", COPIES)
def test_never_leaving_is_the_untouched_model_bit_for_bit(host, method, kv_copy):
    model, inputs = model_for(host), prompt(host, MANY)
    method = EarlyExit(method.gate, method.threshold, kv_copy, method.first_layer)
    tokens = torch.arange(2, 18).view(len(MANY), 4)
    before, cache = steps_by_hand(model, inputs, tokens, [1] * 4)
    said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with method.on(model) as trace:
        logits, other = steps_by_hand(model, inputs, tokens, [1] * 4)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), said)
    assert torch.equal(logits, before)
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
    assert trace.exits == [[LAYERS] * len(MANY)] * 7
    assert trace.mean_layers == LAYERS


@pytest.mark.parametrize("kv_copy", COPIES)
def test_skipped_blocks_do_not_run(kv_copy):
    """Counted where the work is: queries, MLPs and key projections of every block."""
    model, inputs, calls = model_for("llava_clip"), prompt("llava_clip", [ROW]), Counter()
    handles = [
        module.register_forward_hook(lambda *_, at=(name, i): calls.update([at]))
        for i, layer in enumerate(model.get_decoder().layers, 1)
        for name, module in (("mlp", layer.mlp), ("q", layer.self_attn.q_proj),
                             ("k", layer.self_attn.k_proj))
    ]  # fmt: skip
    try:
        method = EarlyExit("confidence", 0.25, kv_copy)
        with method.on(model) as trace:
            model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    finally:
        for handle in handles:
            handle.remove()
    left = [row[0] for row in trace.exits]
    assert len(set(left)) > 1
    for number in range(1, LAYERS + 1):
        runs = 1 + sum(kv_copy == "recompute" or at >= number for at in left)  # 1: the prompt
        assert calls["mlp", number] == calls["q", number] == runs
        assert calls["k", number] == (STEPS if kv_copy == "hidden" else runs)


def test_a_batch_runs_a_block_while_any_row_needs_it():
    """Rows leave where they would alone; the block is saved once the last one has left."""
    model, runs = model_for("llava_clip"), Counter()
    inputs, tokens = prompt("llava_clip", MANY), torch.arange(2, 22).view(len(MANY), 5)
    method = EarlyExit("confidence", 0.12)
    handles = [
        layer.mlp.register_forward_hook(lambda *_, i=i: runs.update([i]))
        for i, layer in enumerate(model.get_decoder().layers, 1)
    ]
    try:
        with method.on(model) as trace:
            steps_by_hand(model, inputs, tokens, [1] * 5)
            together = trace.exits
    finally:
        for handle in handles:
            handle.remove()
    alone = []
    for row, line in zip(MANY, tokens, strict=True):
        with method.on(model) as trace:
            steps_by_hand(model, prompt("llava_clip", [row]), line[None], [1] * 5)
        alone.append([step[0] for step in trace.exits])
    assert [list(column) for column in zip(*together, strict=True)] == alone
    assert any(len(set(step)) > 1 for step in together), "all rows leave alike: nothing shown"
    assert any(max(step) < LAYERS for step in together), "no block is saved: nothing shown"
    for number in range(1, LAYERS + 1):
        assert runs[number] == 1 + sum(max(step) >= number for step in together)


@pytest.mark.parametrize("kv_copy", COPIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_equal_themselves_alone(kv_copy, side):
    model, tokens = model_for("llava_gqa"), torch.arange(2, 22).view(len(MANY), 5)
    method = EarlyExit("confidence", 0.12, kv_copy)
    with method.on(model) as trace:
        together, _ = steps_by_hand(model, prompt("llava_gqa", MANY, side), tokens, [1] * 5)
        assert any(len(set(step)) > 1 for step in trace.exits)
        for index, row in enumerate(MANY):
            inputs = prompt("llava_gqa", [row])
            alone, _ = steps_by_hand(model, inputs, tokens[index : index + 1], [1] * 5)
            torch.testing.assert_close(together[index, 1:], alone[0, 1:], rtol=1e-6, atol=1e-6)


def test_prompts_and_several_tokens_at_once_run_all_blocks():
    model, inputs = model_for("llava_clip"), prompt("llava_clip", MANY)
    tokens = torch.arange(2, 18).view(len(MANY), 4)
    before, _ = steps_by_hand(model, inputs, tokens, [2, 2])
    with EarlyExit("confidence", 0.0).on(model) as trace, torch.no_grad():
        inside, _ = steps_by_hand(model, inputs, tokens, [2, 2])
        model(input_ids=torch.tensor([[5]]))  # a prompt of one token
        with pytest.raises(ValueError, match="Nothing was decoded"):
            trace.mean_layers  # noqa: B018
    assert torch.equal(before, inside)
    assert trace.exits == []


def test_an_exception_leaves_nothing_behind():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    model.generate(**inputs, max_new_tokens=1)
    before = fingerprint_of(model)
    method = EarlyExit("confidence", 0.25)
    answer = answer_of(model, inputs, method)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with method.on(model):
        handle = model.get_decoder().norm.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, max_new_tokens=4)
        handle.remove()
        said = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        assert said[0, -STEPS:].tolist() == answer[0]
    with pytest.raises(KeyboardInterrupt), method.on(model):
        raise KeyboardInterrupt
    assert fingerprint_of(model) == before
    assert not exits._BUSY


def test_a_forward_of_the_users_own_survives():
    model = build("llava_clip")
    layer, calls = model.get_decoder().layers[1], []
    own = type(layer).forward.__get__(layer)
    layer.forward = mine = lambda *a, **k: calls.append(1) or own(*a, **k)
    inputs = prompt("llava_clip", dtype=torch.float32)
    with EarlyExit("confidence", 0.0).on(model):
        model.generate(**inputs, max_new_tokens=3)
    assert layer.forward is mine
    assert calls == [1], "once for the prompt; the two other tokens left before"


@pytest.mark.parametrize("inner", [VisionZip(4, 2), FastV(KEPT)], ids=lambda m: m.key)
def test_together_with_token_reducers(inner):
    """On either side of a reducer, in blocks left in any order; caches differ in length then."""
    model, inputs = model_for("llava_gqa"), prompt("llava_gqa", MANY)
    method = EarlyExit("confidence", 0.25)

    def say() -> list:
        return model.generate(**inputs, max_new_tokens=STEPS, do_sample=False).tolist()

    with inner.on(model):
        reduced = say()
        with EarlyExit("confidence", 2.0).on(model):
            assert say() == reduced
        with method.on(model) as trace:
            both = say()
    assert trace.mean_layers < LAYERS
    outer, other = method.on(model), inner.on(model)
    outer.__enter__()
    other.__enter__()
    assert say() == both
    outer.__exit__(None, None, None)
    assert say() == reduced
    other.__exit__(None, None, None)


def test_a_second_block_on_one_decoder_is_refused():
    model = model_for("llava_clip")
    with EarlyExit().on(model):
        with pytest.raises(UnsupportedError, match="Leave the outer block"):
            EarlyExit("patience", 1).on(model).__enter__()
        with EarlyExit().on(model_for("llava_gqa")):
            pass


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_plain_language_models(family):
    """Every family, without a picture: the transcription again."""
    torch.manual_seed(0)
    config = TEXT_FAMILIES[family](
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    inputs = {"input_ids": torch.arange(1, 7)[None], "attention_mask": torch.ones(1, 6).long()}
    for kv_copy in COPIES:
        method = EarlyExit("patience", 1, kv_copy)
        answer, left = answer_of(model, inputs, method)
        assert len(set(left)) > 1
        with method.on(model):
            logits, cache = steps_by_hand(model, inputs, torch.tensor([answer]), [1] * STEPS)
        expected, layers, cached = transcribed(model, inputs, answer, method)
        assert layers[:-1] == left
        torch.testing.assert_close(logits[0, 1:], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(contents(cache), cached, rtol=1e-6, atol=1e-6)


def test_gates_by_hand():
    """Two tokens over three words: p = (1/2, 1/4, 1/4) and (1/3, 1/3, 1/3)."""
    logits = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]]) * math.log(2)
    repeats = torch.tensor([3, 0])
    score = {g: EarlyExit(g, 1).score(logits, repeats).tolist() for g, _ in GATES}
    assert score["confidence"] == pytest.approx([1 / 2, 1 / 3])
    assert score["entropy"] == pytest.approx([1.5 * math.log(2) / math.log(3), 1.0])
    assert score["patience"] == [3, 0]
    some = torch.tensor([0.2, 0.5, 0.8])
    assert EarlyExit("confidence", 0.5).fires(some).tolist() == [False, True, True]
    assert EarlyExit("entropy", 0.5).fires(some).tolist() == [True, True, False]
    assert EarlyExit("patience", 2).fires(torch.tensor([1.0, 2.0])).tolist() == [False, True]


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"gate": "margin"}, "'confidence', 'entropy', 'patience'"),
        ({"kv_copy": "copy"}, "'hidden', 'keys_values', 'recompute'"),
        ({"gate": "patience", "threshold": 0.9}, "whole number from 1"),
        ({"threshold": math.nan}, "finite"),
        ({"first_layer": 0}, "whole number from 1"),
        ({"first_layer": 5}, r"1\.\.4"),
    ],
)
def test_impossible_fields(fields, remedy):
    with pytest.raises(UnsupportedError, match=remedy):
        EarlyExit(**fields).on(model_for("llava_clip")).__enter__()


def test_models_and_caches_that_do_not_fit():
    with pytest.raises(UnsupportedError, match="one of llama"):
        EarlyExit().on(torch.nn.Linear(2, 2)).__enter__()  # type: ignore[arg-type]
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    with EarlyExit().on(model), pytest.raises(UnsupportedError, match="default dynamic cache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(BudgetError):
        EarlyExit.for_budget(5, 16)
    assert EarlyExit.for_budget(16, 16) == EarlyExit("confidence", 0.9, "hidden")
