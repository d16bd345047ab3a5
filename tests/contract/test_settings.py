"""Contract 6: attention kernels, caches, decoding strategies, and steps by hand agree."""

import copy

import pytest
import torch
from tiny_hosts import (
    EVERY,
    HOSTS,
    KEPT,
    LAYERS,
    MANY,
    ONE,
    PAIRS,
    UNTRACED,
    VOCAB,
    K,
    Picture,
    cache_lengths,
    make,
    model_for,
    prompt,
    steps_by_hand,
)

from frugalvlm.methods import FastV, VisionZip

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
# At most one picture a prompt, so that beams are possible, and rows of different length.
FEW = [[3, Picture(1), 5], [1, Picture(2, 32, 48), 2], [6]]
DECODING = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
}


def generated(model, inputs, seed=0, steps=4, **settings):
    torch.manual_seed(seed)
    return model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, **settings)


@pytest.mark.parametrize(("key", "host"), EVERY)
@pytest.mark.parametrize("rows", [ONE, MANY], ids=["one", "many"])
def test_sdpa_and_eager_agree(key, host, rows):
    # In float64 the library's eager attention turns padding rows into NaN.
    inputs, logits, kept = prompt(host, rows, dtype=torch.float32), [], []
    for attention in ("sdpa", "eager"):
        model = model_for(host, attention, torch.float32)
        with make(key).on(model) as trace:
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False, output_logits=True,
                                 return_dict_in_generate=True)  # fmt: skip
            kept.append(trace.kept if key not in UNTRACED else [])
        logits.append(torch.stack(out.logits))
    assert kept[0] == kept[1]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("key", "host"), PAIRS)
@pytest.mark.parametrize("decoding", DECODING)
def test_with_and_without_a_cache(key, host, decoding):
    model, inputs, settings = model_for(host), prompt(host, FEW), DECODING[decoding]
    with make(key).on(model):
        cached = generated(model, inputs, **settings)
        again = generated(model, inputs, **settings)
        fresh = generated(model, inputs, use_cache=False, **settings)
    assert torch.equal(cached, again), "two calls with one seed differ"
    assert torch.equal(cached, fresh), "the answer depends on the cache"
    assert len(cached) == len(FEW) * settings.get("num_return_sequences", 1)


@pytest.mark.parametrize(("key", "host"), EVERY)
def test_beams_and_answers_in_a_batch_equal_those_alone(key, host):
    model, settings = model_for(host), DECODING["several beams"]
    with make(key).on(model):
        together = generated(model, prompt(host, FEW), **settings)[:, -4:]
        alone = [generated(model, prompt(host, [row]), **settings)[:, -4:] for row in FEW]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize(("key", "host"), PAIRS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_steps_by_hand(key, host, attention):
    """Every way to feed the same tokens: one by one, several at once, mask and positions or not."""
    model, tokens = model_for(host, attention), torch.arange(5, 9)[None]
    tolerance = CLOSE if attention == "sdpa" else {"rtol": 1e-5, "atol": 1e-5}
    with make(key).on(model):
        expected, cache = steps_by_hand(model, prompt(host), tokens, [1] * 4, True, True)
        for chunks in ([1] * 4, [3, 1], [4]):
            for with_mask in (True, False):
                for with_positions in (True, False):
                    logits, other = steps_by_hand(
                        model, prompt(host), tokens, chunks, with_mask, with_positions
                    )
                    torch.testing.assert_close(
                        logits, expected, **tolerance,
                        msg=lambda m, c=chunks, a=with_mask, b=with_positions:
                        f"chunks {c}, mask {a}, positions {b}: {m}",
                    )  # fmt: skip
                    assert cache_lengths(other) == cache_lengths(cache)


@pytest.mark.parametrize(("key", "host"), PAIRS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_by_hand_in_a_padded_batch(key, host, side):
    model, tokens = model_for(host), torch.arange(2, 18).view(len(MANY), 4)
    alone = []
    with make(key).on(model):
        for row, line in zip(MANY, tokens, strict=True):
            alone.append(
                steps_by_hand(model, prompt(host, [row]), line[None], [1] * 4, True, True)[0]
            )
        for chunks in ([1] * 4, [3, 1]):
            logits, _ = steps_by_hand(model, prompt(host, MANY, side), tokens, chunks, True, True)
            first = 0 if side == "left" else 1  # the last column of a short row is padding
            torch.testing.assert_close(logits[:, first:], torch.cat(alone)[:, first:], **CLOSE)


@pytest.mark.parametrize(("key", "host"), PAIRS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_uneven_rows_without_any_mask(key, host, attention):
    """Prompts of equal length with one picture and with two: only the kit knows who is shorter."""
    a, b, c = Picture(1), Picture(2), Picture(3, 16, 48)
    total = b.tokens(host) + c.tokens(host) + 5
    rows = [[2, b, 1, c, 2], [3, a, total - a.tokens(host) - 3], [total]]
    dtype = torch.float64 if attention == "sdpa" else torch.float32
    model, inputs = model_for(host, attention, dtype), prompt(host, rows, dtype=dtype)
    assert inputs["attention_mask"].all()
    tokens = torch.arange(2, 14).view(3, 4)
    # Shorter rows stand further back; the rotary embedding is computed in float32.
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    with make(key).on(model):
        for with_mask in (False, True):
            logits, _ = steps_by_hand(model, inputs, tokens, [1, 3], with_mask, False)
            for index, row in enumerate(rows):
                alone, _ = steps_by_hand(
                    model,
                    prompt(host, [row], dtype=dtype),
                    tokens[index : index + 1],
                    [1, 3],
                    False,
                    False,
                )
                torch.testing.assert_close(logits[index], alone[0], **tolerance)


@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_a_conversation_goes_on(key, host):
    """A second turn on the cache of the first, through generate() and by hand."""
    model, first = model_for(host), prompt(host)
    with make(key).on(model) as trace:
        out = model.generate(**first, max_new_tokens=3, do_sample=False,
                             return_dict_in_generate=True)  # fmt: skip
        cache, said = out.past_key_values, out.sequences
        kept = trace.tokens_per_layer
        turn = torch.tensor([[7, 8, 9, 10]])
        whole = torch.cat([said, turn], 1)
        spare = copy.deepcopy(cache)  # a copy of a cache knows what was cut
        settings = {"attention_mask": torch.ones_like(whole), "max_new_tokens": 3}
        second = model.generate(whole, past_key_values=cache, do_sample=False, **settings)
        assert trace.tokens_per_layer == kept, "a second turn is no new prompt"
        last = whole[:, -5:]  # one token of the first answer is not in the cache yet
        third = model.generate(last, past_key_values=spare, do_sample=False, **settings)
        prompt_length = first["input_ids"].shape[1]
        fed = torch.cat([whole[:, prompt_length:], second[:, -3:]], 1)
        logits, _ = steps_by_hand(model, first, fed, [2, 5, 1, 1, 1], False, False)
    assert second[0, -3:].tolist() == logits[0, -4:-1].argmax(-1).tolist()
    assert third[0, -3:].tolist() == second[0, -3:].tolist()


@pytest.mark.parametrize("host", HOSTS)
def test_several_generations_under_way(host):
    """Two caches in turns: what was cut belongs to the cache, not to the model."""
    model, tokens = model_for(host), torch.tensor([[5]])
    prompts = [prompt(host), prompt(host, [[1, Picture(9, 16, 48), 9]])]
    for method in (FastV(KEPT), VisionZip(4, 2)):
        with method.on(model), torch.no_grad():
            expected = [steps_by_hand(model, p, tokens, [1], True, False)[0] for p in prompts]
            caches = [model(**p).past_key_values for p in prompts]
            for p, cache, logits in zip(prompts, caches, expected, strict=True):
                mask = torch.cat([p["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
                out = model(input_ids=tokens, attention_mask=mask, past_key_values=cache)
                torch.testing.assert_close(out.logits[:, -1:], logits[:, -1:], **CLOSE)


@pytest.mark.parametrize("host", HOSTS)
def test_a_cut_sequence_hides_nothing_in_a_4d_mask(host):
    """A 4-D mask of the caller's own, bool or additive, is cut like a 2-D one."""
    model, inputs = model_for(host), prompt(host, MANY)
    mask = inputs.pop("attention_mask").bool()
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    length = mask.shape[1]
    square = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None]
    square |= torch.eye(length, dtype=torch.bool)
    least = torch.finfo(torch.float64).min
    additive = torch.zeros_like(square, dtype=torch.float64).masked_fill(~square, least)
    for method in (FastV(KEPT), VisionZip(4, 2)):
        with method.on(model), torch.no_grad():
            expected = model(**inputs, attention_mask=mask.long()).logits[:, -1]
            for given in (square, additive):
                logits = model(**inputs, attention_mask=given).logits[:, -1]
                torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("host", HOSTS)
def test_the_cache_is_short_where_the_method_says_so(host):
    model, inputs = model_for(host), prompt(host)
    gone = Picture(1).tokens(host) - KEPT * Picture(1).crops(host)
    full = inputs["input_ids"].shape[1]
    with torch.no_grad(), FastV(KEPT).on(model):
        assert cache_lengths(model(**inputs).past_key_values) == [full] * K + [full - gone] * (
            LAYERS - K
        )
    with torch.no_grad(), VisionZip(4, 2).on(model):
        assert cache_lengths(model(**inputs).past_key_values) == [full - gone] * LAYERS


@pytest.mark.parametrize("side", ["before", "behind"])
def test_a_picture_at_the_very_end_of_the_prompt(side):
    """The last token may be a visual one that goes; the last survivor then says what follows."""
    model, picture = model_for("llava_clip"), Picture(1)
    inputs = prompt("llava_clip", [[4, picture]] if side == "behind" else [[0, picture, 3]])
    for method in (FastV(KEPT), VisionZip(4, 2)):
        with method.on(model), torch.no_grad():
            first = model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True,
                                   return_dict_in_generate=True).logits[0]  # fmt: skip
            assert first.abs().max() > 0.1
            assert first.shape == (1, VOCAB)


def flash_like(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Flash attention's contract in plain torch: a 2-D mask or none, causal from the last key."""
    assert attention_mask is None or attention_mask.shape == (len(query), key.shape[2])
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        seen = seen & (attention_mask[:, None, None] != 0)
    logits = (query @ key.mT * scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
    return (logits.softmax(-1) @ value).transpose(1, 2), None


@pytest.fixture
def use_kernel():
    """A CPU stand-in that Transformers hands what it hands flash attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("flash_like", flash_like)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_like", flash_attention_mask)
    configs = []

    def use(model, kernel):
        configs.append(model.model.language_model.config)
        configs[-1]._attn_implementation = kernel

    yield use
    for config in configs:
        config._attn_implementation = "sdpa"


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("key", ["fastv", "visionzip"])
def test_kernels_that_take_only_2d_masks(key, host, use_kernel):
    """Padded rows, and rows that only the kit makes shorter; alone, in steps and in chunks."""
    a, b, c = Picture(1), Picture(2), Picture(3, 16, 48)
    total = b.tokens(host) + c.tokens(host) + 5
    uneven = [[2, b, 1, c, 2], [3, a, total - a.tokens(host) - 3]]
    for rows in (MANY, uneven):
        inputs, tokens = prompt(host, rows), torch.arange(2, 2 + 4 * len(rows)).view(-1, 4)
        model, results = model_for(host), []
        for kernel in ("sdpa", "flash_like"):
            use_kernel(model, kernel)
            with make(key).on(model):
                results.append(steps_by_hand(model, inputs, tokens, [1, 3])[0])
                if rows == uneven:
                    results.append(steps_by_hand(model, inputs, tokens, [1, 3], False)[0])
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], **CLOSE)
