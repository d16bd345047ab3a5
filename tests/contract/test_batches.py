"""Contract 4: a padded batch equals its items one by one."""

from dataclasses import dataclass

import pytest
import torch
from tiny_hosts import (
    EVERY,
    HOSTS,
    KEPT,
    MANY,
    OWN_REFERENCE,
    PAIRS,
    TILED,
    UNTRACED,
    Picture,
    make,
    model_for,
    pictures_of,
    prompt,
)

from frugalvlm.methods import METHODS, FastV, LayerReducer, VisionZip
from frugalvlm.views import keep_top

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CLOSE_32 = {"rtol": 1e-6, "atol": 1e-6}  # generate() rounds its logits to float32


@pytest.mark.parametrize(("key", "host"), EVERY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_items(key, host, side):
    model, method, batch = model_for(host), make(key), prompt(host, MANY, side)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with method.on(model) as trace, torch.no_grad():
        together = model(**batch, position_ids=positions).logits
        kept = trace.kept if key not in UNTRACED else []
        for index, row in enumerate(MANY):
            alone = model(**prompt(host, [row])).logits[0]
            real = batch["attention_mask"][index].bool()
            torch.testing.assert_close(together[index][real], alone, **CLOSE)
            crops = sum(p.crops(host) for p in pictures_of(row))
            if crops and kept:
                assert kept[:crops] == trace.kept, "another choice in the batch than alone"
                kept = kept[crops:]


@pytest.mark.parametrize(("key", "host"), EVERY)
def test_generation_in_a_batch_equals_generation_alone(key, host):
    model, method = model_for(host), make(key)
    with method.on(model):
        together = model.generate(**prompt(host, MANY), max_new_tokens=4, do_sample=False)
        alone = [
            model.generate(**prompt(host, [row]), max_new_tokens=4, do_sample=False)[0, -4:]
            for row in MANY
        ]
    assert together[:, -4:].tolist() == torch.stack(alone).tolist()


@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_the_choice_depends_on_the_picture_not_on_its_place(key, host):
    if key in ("vanilla", "uniform", "avgpool", "downsample"):
        pytest.skip(f"{key} does not look at the picture")
    if key == "dyvte":
        pytest.skip("all or nothing is kept: what differs is where it goes, see its own tests")
    model, a, b = model_for(host), Picture(11), Picture(12)
    with make(key).on(model) as trace, torch.no_grad():
        model(**prompt(host, [[4, a, 3], [4, b, 3]]))
        straight = list(zip(trace.kept, trace.merged, strict=True))
        model(**prompt(host, [[4, b, 3], [4, a, 3]]))
        swapped = list(zip(trace.kept, trace.merged, strict=True))
    half = len(straight) // 2
    own = key in OWN_REFERENCE
    # FastV also reads the text, which is equal in neither order; so may any layer reducer.
    if key != "fastv" and (own or not issubclass(METHODS[key], LayerReducer)):
        assert straight == swapped[half:] + swapped[:half]
    if not own and straight[:half] == straight[half:]:
        pytest.skip(f"{key} keeps the same patches of both pictures: a control?")
    assert straight[:half] != straight[half:], "different pictures, yet the same choice"


@pytest.mark.parametrize("host", HOSTS)
def test_budgets_may_differ_between_images(host):
    """Images that keep different numbers of tokens, as adaptive methods give them."""

    @dataclass(frozen=True)
    class Adaptive(FastV):
        def keep(self, view):
            # As many as there are tokens above their own mean: known from the image alone.
            score = view.last_token_attention.mean(1)
            counts = []
            for row, count in zip(score.tolist(), view.counts, strict=True):
                real = row[:count]
                counts.append(sum(s > sum(real) / count for s in real))
            return keep_top(score, tuple(counts))

    model, method, batch = model_for(host), Adaptive(KEPT), prompt(host, MANY)
    with method.on(model) as trace:
        together = model.generate(**batch, max_new_tokens=3, do_sample=False, output_logits=True,
                                  return_dict_in_generate=True)  # fmt: skip
        assert trace.spread[-1][0] < trace.spread[-1][1], "the budgets do not differ"
        for index, row in enumerate(MANY):
            alone = model.generate(**prompt(host, [row]), max_new_tokens=3, do_sample=False,
                                   output_logits=True, return_dict_in_generate=True)  # fmt: skip
            torch.testing.assert_close(
                torch.stack(together.logits, 1)[index], torch.stack(alone.logits, 1)[0], **CLOSE_32
            )


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa", "llava_next"])
def test_several_cuts_compose(host):
    """Two cuts in one method, and a cut on top of an encoder reducer, each with uneven rows."""

    @dataclass(frozen=True)
    class Twice(FastV):
        def layers(self, decoder_layers):
            return (1, 3)

        def keep(self, view):
            kept = 9 if view.layer == 1 else 4
            return keep_top(view.last_token_attention.mean(1), view.per_crop(kept))

    model, batch = model_for(host), prompt(host, MANY)

    def run(inputs):
        return model.generate(**inputs, max_new_tokens=3, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)  # fmt: skip

    shown = [p for row in MANY for p in pictures_of(row)]
    crops, pictures = sum(p.crops(host) for p in shown), len(shown)
    with Twice(4).on(model) as trace:
        together = run(batch)
        assert trace.tokens_per_layer[1:] == [n * crops / pictures for n in (9, 9, 4)]
        for index, row in enumerate(MANY):
            alone = run(prompt(host, [row]))
            torch.testing.assert_close(
                torch.stack(together.logits, 1)[index], torch.stack(alone.logits, 1)[0], **CLOSE_32
            )
    with VisionZip(6, 2).on(model) as outer, FastV(3).on(model) as inner:
        together = run(batch)
        assert outer.tokens_per_layer == inner.tokens_per_layer
        assert outer.tokens_per_layer == [n * crops / pictures for n in (8, 8, 3, 3)]
        for index, row in enumerate(MANY):
            alone = run(prompt(host, [row]))
            torch.testing.assert_close(
                torch.stack(together.logits, 1)[index], torch.stack(alone.logits, 1)[0], **CLOSE_32
            )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_rows_with_few_words_that_end_up_the_longest(key, host, turned):
    """Padded on the left before a cut, the longest behind it, and with fewer words than others:
    what fills up their list of words is gone by then."""
    before = 100 if host in TILED else 20
    thin, a, b = Picture(1, 16, 48), Picture(2), Picture(3)
    rows = [[before, thin, 2], [1, a, 1, b, 9]]
    rows = rows[::-1] if turned else rows
    model, method = model_for(host), make(key)
    with method.on(model), torch.no_grad():
        together = model.generate(**prompt(host, rows), max_new_tokens=3, do_sample=False)
        alone = [
            model.generate(**prompt(host, [row]), max_new_tokens=3, do_sample=False)[0, -3:]
            for row in rows
        ]
    assert together[:, -3:].tolist() == torch.stack(alone).tolist()
