"""Contract 9: a cache that lacks tokens says so outside its block, and keeps up with its rows."""

import copy
import pickle

import pytest
import torch
from tiny_hosts import HOSTS, KEPT, MANY, Picture, cache_lengths, make, model_for, prompt
from transformers import DynamicCache

from frugalvlm.methods import FastV, Vanilla, VisionZip
from frugalvlm.views import UnsupportedError

CUTTING = ("visionzip", "fastv", "pyramiddrop", "sparsevlm", "aim", "aim_mask", "sgl")
TOKEN = torch.tensor([[5]])
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
# Prompts of unlike length, with one picture each, so that their rows keep unlike numbers.
UNLIKE = [[2, Picture(2, 32, 48), 9], [7, Picture(3), 1, Picture(4, 16, 48), 3], [3, Picture(5), 2]]


@pytest.mark.parametrize("rows", [MANY[:1], MANY], ids=["one", "many"])
@pytest.mark.parametrize("key", CUTTING)
def test_a_cache_that_goes_on_outside_says_so(key, rows):
    model, inputs = model_for("llava_clip"), prompt("llava_clip", rows)
    more = {
        "input_ids": TOKEN.expand(len(rows), -1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    with make(key).on(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        model(**more, past_key_values=copy.deepcopy(cache))
    with torch.no_grad():
        for spare in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            with pytest.raises(UnsupportedError, match="inside a block of the same method"):
                model(**more, past_key_values=spare)
        with Vanilla().on(model), pytest.raises(UnsupportedError, match="same method"):
            model(**more, past_key_values=copy.deepcopy(cache))
        with make("early_exit").on(model), pytest.raises(UnsupportedError, match="same method"):
            model(**more, past_key_values=copy.deepcopy(cache))
    with pytest.raises(UnsupportedError, match="same method"):
        model.generate(
            torch.cat([inputs["input_ids"], more["input_ids"]], 1),
            attention_mask=more["attention_mask"], past_key_values=cache, max_new_tokens=2,
        )  # fmt: skip


@pytest.mark.parametrize("key", ["vanilla", "early_exit"])
def test_a_whole_cache_goes_on_outside(key):
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    with torch.no_grad():
        with make(key).on(model):
            cache = model(**inputs).past_key_values
        outside = model(input_ids=TOKEN, past_key_values=cache).logits
        cache = model(**inputs).past_key_values
        assert torch.equal(model(input_ids=TOKEN, past_key_values=cache).logits, outside)


def test_after_a_pass_that_broke_the_cache_still_says_so():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")

    def stop(module, args):
        raise KeyError

    with FastV(KEPT).on(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        handle = model.model.language_model.norm.register_forward_pre_hook(stop)
        with pytest.raises(KeyError):
            model(input_ids=TOKEN, past_key_values=cache)
        handle.remove()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="same method"):
        model(input_ids=TOKEN, past_key_values=cache)


def test_a_cut_cache_is_what_it_was_to_others():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    with FastV(KEPT).on(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        assert isinstance(cache, DynamicCache)
        assert type(cache).__name__ == "DynamicCache"
        spare = pickle.loads(pickle.dumps(cache))
        assert cache_lengths(spare) == cache_lengths(cache)
        expected = model(input_ids=TOKEN, past_key_values=cache).logits
        assert torch.equal(model(input_ids=TOKEN, past_key_values=spare).logits, expected)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("key", CUTTING)
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices", "repeat"])
def test_what_is_remembered_follows_the_rows(key, host, how):
    model = model_for(host)
    new = [2, 0, 1] if how == "reorder_cache" else [2, 0] if how != "repeat" else [0, 0, 1, 1, 2, 2]
    tokens = torch.arange(5, 8)[:, None]

    def go_on(rows, change):
        inputs = prompt(host, rows)
        with make(key).on(model), torch.no_grad():
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            cache = model(**inputs, position_ids=positions).past_key_values
            change(cache)
            picked = torch.tensor(new)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            whole = mask if len(rows) == len(new) and change is as_it_is else mask[picked]
            positions = whole.sum(1, keepdim=True) - 1
            return model(
                input_ids=tokens[picked], attention_mask=whole, position_ids=positions,
                past_key_values=cache,
            ).logits  # fmt: skip

    def as_it_is(cache):
        pass

    def moved(cache):
        if how == "repeat":
            cache.batch_repeat_interleave(2)
        else:
            getattr(cache, how)(torch.tensor(new))

    expected = go_on([UNLIKE[i] for i in new], as_it_is)
    # The longest row decides how far others are padded, which no answer may show.
    torch.testing.assert_close(go_on(UNLIKE, moved), expected, **CLOSE)


def test_a_cache_cut_by_one_method_needs_that_method():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    with FastV(KEPT).on(model), torch.no_grad():
        cache = model(**inputs).past_key_values
    with VisionZip(4, 2).on(model), pytest.raises(UnsupportedError, match="another method"):
        model(input_ids=TOKEN, past_key_values=cache)
