from contextlib import contextmanager

import pytest
import torch

from frugalvlm.measure import Arm, prefill_decode_ms


class Spy:
    """Wraps a model and keeps what each forward was given."""

    def __init__(self, model):
        self.model, self.calls, self.tokens = model, [], []

    def __call__(self, **inputs):
        cached = inputs["past_key_values"].get_seq_length() if "past_key_values" in inputs else 0
        output = self.model(**inputs)
        mask = inputs.get("attention_mask")
        self.calls.append(
            {
                "tokens": inputs["input_ids"].shape[1],
                "cached": cached,
                "mask": None if mask is None else mask.shape[1],
                "logits": output.logits.shape[1],
                "names": set(inputs),
            }
        )
        self.tokens.append(output.logits[:, -1].argmax(-1).tolist())
        return output


def _inputs():
    ids = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    return {"input_ids": ids, "attention_mask": mask}


def test_prefill_then_single_tokens_with_the_cache(tiny_llama):
    spy = Spy(tiny_llama())
    times = prefill_decode_ms({"a": Arm(spy, _inputs())}, decode_steps=3, repeats=2, warmup=1)
    assert len(spy.calls) == 3 * (1 + 3)
    for i in (0, 4, 8):  # each round starts from an empty cache
        prefill, *steps = spy.calls[i : i + 4]
        assert prefill["tokens"] == prefill["mask"] == 5
        assert (prefill["cached"], prefill["logits"]) == (0, 1)
        assert [(s["tokens"], s["cached"], s["mask"]) for s in steps] == [
            (1, 5, 6),
            (1, 6, 7),
            (1, 7, 8),
        ]
    assert (times["a"].prefill.n, times["a"].decode.n) == (2, 2)


def test_the_tokens_are_those_of_generate(tiny_llama):
    model = tiny_llama()
    spy = Spy(model)
    prefill_decode_ms({"a": Arm(spy, _inputs())}, decode_steps=3, repeats=1, warmup=0)
    generated = model.generate(**_inputs(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.tensor(spy.tokens).T.tolist() == generated[:, 5:].tolist()


def test_other_inputs_go_to_prefill_only_and_a_mask_is_optional(tiny_llama):
    model = tiny_llama()

    def vlm(pixel_values=None, **inputs):
        assert (pixel_values is None) == ("past_key_values" in inputs)
        return model(**inputs)

    inputs = {"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.ones(1)}
    times = prefill_decode_ms({"a": Arm(vlm, inputs)}, decode_steps=2, repeats=1, warmup=0)
    assert times["a"].decode.n == 1


def test_methods_are_entered_per_turn_and_left(tiny_llama):
    events = []

    @contextmanager
    def method(name):
        events.append(f"enter {name}")
        yield
        events.append(f"leave {name}")

    model = tiny_llama()
    arms = {name: Arm(model, _inputs(), lambda name=name: method(name)) for name in "ab"}
    prefill_decode_ms(arms, decode_steps=1, repeats=2, warmup=0)
    assert [e.split()[1] for e in events] == list("aabbbbaa")
    assert events[0::2] == [e.replace("leave", "enter") for e in events[1::2]]


def test_decode_is_per_step(tiny_llama, monkeypatch):
    monkeypatch.setattr("frugalvlm.measure.prefill_decode.time_ms", lambda fn, _: fn() or 12.0)
    arm = Arm(tiny_llama(), _inputs())
    times = prefill_decode_ms({"a": arm}, decode_steps=4, repeats=1, warmup=0)["a"]
    assert (times.prefill.p50_ms, times.decode.p50_ms) == (12.0, 3.0)


def test_no_decode_step_raises(tiny_llama):
    with pytest.raises(ValueError, match="decode_steps"):
        prefill_decode_ms({"a": Arm(tiny_llama(), _inputs())}, decode_steps=0)
