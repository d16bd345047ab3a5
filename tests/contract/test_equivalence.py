"""Contracts 1, 2 and 3: keep-all is the identity; pruned equals masked; counts are exact."""

import pytest
import torch
from reference import expected_logits
from tiny_hosts import (
    ADAPTIVE,
    KEPT,
    LAYERS,
    MANY,
    NO_CLS,
    ONE,
    PAIRS,
    PATCHES,
    TILED,
    Picture,
    cache_lengths,
    layer_tokens,
    make,
    model_for,
    pictures_of,
    prompt,
    several_cuts,
    steps_by_hand,
)

STEPS = 4


@pytest.mark.parametrize(("key", "host"), PAIRS)
@pytest.mark.parametrize("rows", [ONE, MANY], ids=["one", "many"])
def test_keeping_everything_is_the_identity(key, host, rows):
    model, inputs = model_for(host), prompt(host, rows)
    with torch.no_grad():
        before = model(**inputs)
        with make(key, PATCHES).on(model):
            inside = model(**inputs)
    assert torch.equal(inside.logits, before.logits)
    assert cache_lengths(inside.past_key_values) == cache_lengths(before.past_key_values)


@pytest.mark.parametrize(("key", "host"), PAIRS)
@pytest.mark.parametrize("rows", [ONE, MANY], ids=["one", "many"])
def test_pruned_run_equals_the_full_run_with_hidden_keys(key, host, rows):
    model, method, inputs = model_for(host), make(key), prompt(host, rows)
    with method.on(model) as trace:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        kept = trace.kept if key != "vanilla" else []
        answers = out.sequences[:, -STEPS:-1]
        logits, cache = steps_by_hand(model, inputs, answers, [1] * (STEPS - 1))
    torch.testing.assert_close(torch.stack(out.logits, 1), logits.float(), rtol=1e-6, atol=1e-6)
    assert logits.abs().max() > 0.5, "logits too small to tell runs apart"
    seen_lengths = []
    for index, row in enumerate(rows):
        crops = [p.crops(host) for p in pictures_of(row)]
        expected, lengths = expected_logits(
            method, model, host, row, answers[index].tolist(), kept, [KEPT * c for c in crops]
        )
        kept = kept[sum(crops) :]
        torch.testing.assert_close(
            logits[index], expected, rtol=1e-10, atol=1e-10,
            msg=lambda m, i=index: f"row {i} differs from the masked full run: {m}",
        )  # fmt: skip
        seen_lengths.append(lengths)
    assert not kept
    longest = [max(column) for column in zip(*seen_lengths, strict=True)]
    for filled in (cache, out.past_key_values):
        assert cache_lengths(filled) == [n + STEPS - 1 for n in longest], (
            "a layer's KV cache has another length than its real tokens"
        )


@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_the_reference_tells_a_wrong_run_apart(key, host):
    """The masked run above must reject a run that keeps one token less, or none fewer."""
    if key == "vanilla":
        wrong, method = make("random", PATCHES - 1), make("vanilla")
    else:
        wrong, method = make(key, KEPT - 1), make(key)
    model, inputs = model_for(host), prompt(host)
    with method.on(model) as trace, torch.no_grad():
        model(**inputs)
        kept = trace.kept if key != "vanilla" else []
    with wrong.on(model), torch.no_grad():
        logits = model(**inputs).logits[0, -1:]
    count = [KEPT * p.crops(host) for p in pictures_of(ONE[0])]
    expected, _ = expected_logits(method, model, host, ONE[0], [], kept, count)
    assert (logits - expected).abs().max() > 1e-6


@pytest.mark.parametrize(("key", "host"), PAIRS)
@pytest.mark.parametrize("rows", [ONE, MANY], ids=["one", "many"])
def test_the_requested_count_is_the_actual_count(key, host, rows):
    model, inputs = model_for(host), prompt(host, rows)
    pictures = [p for row in rows for p in pictures_of(row)]
    with torch.no_grad():
        full = cache_lengths(model(**inputs).past_key_values)
        with make(key).on(model) as trace:
            short = cache_lengths(model(**inputs).past_key_values)
    if key == "vanilla":
        assert short == full
    crops = [p.crops(host) for p in pictures]
    wanted = list(zip(*(layer_tokens(key, p, host) for p in pictures), strict=True))
    if key not in ADAPTIVE:  # those keep what the picture needs
        assert trace.tokens_per_layer == [sum(layer) / len(pictures) for layer in wanted]
        assert trace.spread == [(min(layer), max(layer)) for layer in wanted]
    assert trace.mean_tokens == sum(trace.tokens_per_layer) / LAYERS
    if several_cuts(key) and key not in ADAPTIVE and host not in TILED and rows == ONE:
        last, mean = trace.tokens_per_layer[-1], trace.mean_tokens
        assert last == KEPT or abs(mean - KEPT) <= 1, (
            "a budget is what the last cut leaves, or the mean over layers to the nearest token"
        )
    if rows == ONE:
        whole = pictures[0].tokens(host)
        assert short == [n - whole + t for n, t in zip(full, trace.tokens_per_layer, strict=True)]
    assert len(trace.kept) == sum(crops)
    for row in trace.kept:
        assert row == sorted(set(row)), "kept patches are not ascending and unique"
        assert all(0 <= patch < PATCHES for patch in row)
    if key in ("random", "fastervlm", "uniform", "divprune") or (
        key in ("fastv", "sgl") and host not in TILED
    ):
        assert [len(row) for row in trace.kept] == [KEPT] * sum(crops)
    if key.startswith("visionzip"):
        has_cls = host not in NO_CLS
        assert [len(row) for row in trace.kept] == [KEPT - 2 - has_cls] * sum(crops)
        for row, groups in zip(trace.kept, trace.merged, strict=True):
            assert sorted([*row, *[p for g in groups.values() for p in g]]) == list(range(PATCHES))
            assert sorted(groups) == [KEPT - 2, KEPT - 1]


@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_text_tokens_before_the_image_are_untouched(key, host):
    """The decoder is causal: logits in front of the image do not change by a bit's worth."""
    model, inputs = model_for(host), prompt(host, [[5, Picture(1), 4]])
    with torch.no_grad():
        before = model(**inputs).logits
        with make(key).on(model):
            inside = model(**inputs).logits
    assert inside.shape == before.shape
    torch.testing.assert_close(inside[:, :6], before[:, :6], rtol=1e-12, atol=1e-12)
