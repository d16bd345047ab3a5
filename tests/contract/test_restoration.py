"""Contract 5: after the block the model is what it was, whatever happened inside."""

from contextlib import ExitStack

import pytest
import torch
from tiny_hosts import (
    EVERY,
    HOSTS,
    KEPT,
    UNTRACED,
    Picture,
    fingerprint_of,
    make,
    model_for,
    prompt,
)

from frugalvlm.engine import exits, session
from frugalvlm.methods import FasterVLM, FastV, Vanilla, VisionZip


class Deliberate(RuntimeError):
    """Raised by the tests."""


@pytest.fixture
def untouched():
    """A function that gives a model, and checks it bit for bit when the test is over."""
    seen = []

    def take(host):
        model, inputs = model_for(host), prompt(host)
        with torch.no_grad():
            logits = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=1)  # the library installs hooks of its own, once
        seen.append((model, inputs, fingerprint_of(model), logits))
        return model, inputs

    yield take
    assert not session._SESSIONS
    assert not exits._BUSY
    for model, inputs, before, logits in seen:
        after = fingerprint_of(model)
        assert after.keys() == before.keys()
        for name in before:
            assert after[name] == before[name], f"module '{name}' is not as before"
        assert "generate" not in model.__dict__
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits)


def fail(module, args):
    raise Deliberate


def choices(method, model, inputs):
    with method.on(model) as trace, torch.no_grad():
        logits = model(**inputs).logits
    return logits, trace.tokens_per_layer


@pytest.mark.parametrize(("key", "host"), EVERY)
def test_after_a_forward_pass_and_a_generation(key, host, untouched):
    model, inputs = untouched(host)
    with make(key).on(model), torch.no_grad():
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize(("key", "host"), EVERY)
def test_after_an_exception_in_the_block(key, host, untouched):
    model, inputs = untouched(host)

    def work():
        with make(key).on(model):
            model(**inputs)
            raise Deliberate

    with pytest.raises(Deliberate):
        work()


@pytest.mark.parametrize(("key", "host"), EVERY)
def test_after_an_exception_inside_generate(key, host, untouched):
    """In the middle of a decoding step, from within a layer; the block goes on as if new."""
    model, inputs = untouched(host)
    steps = []

    def stop(module, args):
        steps.append(1)
        if len(steps) == 3:
            raise Deliberate

    with make(key).on(model) as trace:
        clean = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        handle = model.model.language_model.layers[-1].register_forward_pre_hook(stop)
        with pytest.raises(Deliberate):
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
        handle.remove()
        assert "_supports_mm_encoder_outputs" not in model.__dict__
        again = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(again, clean)
        assert key in UNTRACED or trace.calls == 3


@pytest.mark.parametrize(("key", "host"), EVERY)
def test_re_entry_gives_the_same(key, host, untouched):
    model, inputs = untouched(host)
    method = make(key)
    first, second = choices(method, model, inputs), choices(method, model, inputs)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


@pytest.mark.parametrize("host", HOSTS)
def test_nested_blocks(host, untouched):
    """Leaving the inner block restores the outer one; leaving that restores the model."""
    model, inputs = untouched(host)
    outer, inner = VisionZip(6, 2), FastV(3)
    alone = choices(outer, model, inputs)[0]
    cut = choices(inner, model, inputs)[0]
    with Vanilla().on(model), torch.no_grad():
        with outer.on(model) as trace:
            assert torch.equal(model(**inputs).logits, alone)
            with inner.on(model), Vanilla().on(model):
                both = model(**inputs).logits
                assert trace.tokens_per_layer[-1] < trace.tokens_per_layer[0]
            assert not torch.equal(both, alone)
            assert torch.equal(model(**inputs).logits, alone)
            with pytest.raises(Deliberate), inner.on(model):
                raise Deliberate
            assert torch.equal(model(**inputs).logits, alone)
        with inner.on(model):
            assert torch.equal(model(**inputs).logits, cut)
            with outer.on(model):  # the other way round: the same
                assert torch.equal(model(**inputs).logits, both)


def test_blocks_left_out_of_order(untouched):
    model, inputs = untouched("llava_clip")
    cut = choices(FastV(3), model, inputs)[0]
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(VisionZip(6, 2).on(model))
    inner.enter_context(FastV(3).on(model))
    outer.close()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, cut)
    inner.close()


def test_two_models_at_once(untouched):
    model, inputs = untouched("llava_clip")
    other, others = untouched("llava_gqa")
    alone = choices(FasterVLM(KEPT), model, inputs)[0], choices(FastV(KEPT), other, others)[0]
    with FasterVLM(KEPT).on(model), FastV(KEPT).on(other), torch.no_grad():
        assert torch.equal(model(**inputs).logits, alone[0])
        assert torch.equal(other(**others).logits, alone[1])


def test_a_refused_method_leaves_nothing_behind(untouched):
    model, _ = untouched("llava_clip")
    with pytest.raises(ValueError), FasterVLM(KEPT).on(model), VisionZip(6, 2).on(model):
        pass
    with pytest.raises(ValueError), FastV(KEPT).on(model), FastV(3).on(model):
        pass


def test_a_generate_of_the_users_own_survives(untouched):
    model, inputs = untouched("llava_clip")
    calls = []

    def own(*args, **kwargs):
        calls.append(1)
        return type(model).generate(model, *args, **kwargs)

    model.generate = own
    try:
        with FastV(KEPT).on(model):
            model.generate(**inputs, max_new_tokens=1)
        assert model.generate is own
        assert calls == [1]
    finally:
        del model.generate


def test_an_exception_in_the_middle_of_a_cached_step(untouched):
    """The same cache goes on after a step that broke: no stale masks."""
    model, _ = untouched("llava_clip")
    rows = prompt("llava_clip", [[2, Picture(1), 3], [6, Picture(1), 3]])
    token = torch.tensor([[5], [6]])
    with FastV(KEPT).on(model), torch.no_grad():
        expected = []
        for broken in (False, True):
            mask = rows["attention_mask"]
            cache = model(**rows).past_key_values
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            if broken:
                handle = model.model.language_model.norm.register_forward_pre_hook(fail)
                with pytest.raises(Deliberate):
                    model(input_ids=token, attention_mask=mask, past_key_values=cache)
                handle.remove()
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                step = model(input_ids=token, attention_mask=mask, past_key_values=cache)
            else:
                model(input_ids=token, attention_mask=mask, past_key_values=cache)
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                step = model(input_ids=token, attention_mask=mask, past_key_values=cache)
            expected.append(step.logits)
    assert torch.equal(*expected)
