"""The tax is a ratio to a native prefill that does exactly the work of that many tokens."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from frugalvlm import measure, methods
from frugalvlm.bench import tax
from frugalvlm.bench.tax import _in_lengths, measure_tax, native_prefill, prompt
from frugalvlm.engine.guidance import Guide
from frugalvlm.methods.base import LayerReducer
from frugalvlm.pocket.models import build_model
from frugalvlm.views import Kept


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("pocket-llava-tiny").eval()


@dataclass(frozen=True)
class First(LayerReducer):
    """Keeps the first tokens, as the native prefill does."""

    key: ClassVar[str] = "first"
    kept_tokens: int

    @classmethod
    def for_budget(cls, kept_tokens, total_tokens=576):
        return cls(kept_tokens)

    def layers(self, decoder_layers):
        return (1,)

    def keep(self, view):
        return Kept(torch.arange(self.kept_tokens)[None], (self.kept_tokens,))


def test_native_prefill_of_all_tokens_is_the_model_itself(model):
    inputs = prompt(model)
    with torch.inference_mode():
        expected = model(**inputs, logits_to_keep=1).logits
    layers = model.config.text_config.num_hidden_layers
    native = native_prefill(model, inputs, [144] * layers)
    torch.testing.assert_close(native.logits, expected)
    decoder = model.model.language_model
    with torch.inference_mode():
        image = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        text = decoder.embed_tokens(inputs["input_ids"])
        sequence = torch.cat([text[:, :4], image.reshape(1, 144, -1), text[:, -12:]], 1)
        layered = model.lm_head(_in_lengths(decoder, sequence, [144] * layers)[:, -1:])
    torch.testing.assert_close(layered, expected)


def test_native_prefill_has_as_many_tokens_as_the_method(model):
    inputs = prompt(model)
    with torch.inference_mode(), methods.Random(16).on(model):
        pruned = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    layers = model.config.text_config.num_hidden_layers
    native = native_prefill(model, inputs, [16] * layers).past_key_values
    assert native.get_seq_length() == pruned.get_seq_length() == 4 + 16 + 12


def test_native_prefill_with_a_cut_is_a_method_that_keeps_the_first_tokens(model):
    inputs = prompt(model)
    with torch.inference_mode(), First(16).on(model) as trace:
        expected = model(**inputs, use_cache=True, logits_to_keep=1).logits
    counts = [round(n) for n in trace.tokens_per_layer]
    assert counts[:2] == [144, 16]
    torch.testing.assert_close(native_prefill(model, inputs, counts), expected)


def test_the_native_tower_sees_the_small_picture_of_downsample(model):
    inputs, method = prompt(model), methods.Downsample(16)
    with torch.inference_mode(), method.on(model):
        expected = model(**inputs, use_cache=True, logits_to_keep=1).logits
    small = {**inputs, "pixel_values": method.shrink(inputs["pixel_values"], (12, 12))}
    layers = model.config.text_config.num_hidden_layers
    native = native_prefill(model, small, [16] * layers)
    torch.testing.assert_close(native.logits, expected)


def test_every_method_gets_a_ratio_with_its_interval(model):
    rows = measure_tax(model, copy.deepcopy(model), 16, repeats=2, warmup=0)
    assert [row["method"] for row in rows] == list(tax.MEASURED)
    for row in rows:
        ratio = row["ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert ratio["n"] == 2
        assert (row["guide_ms"] is None) == (row["method"] != "sgl")
        everything = row["method"] in ("vanilla", "early_exit")
        assert row["tokens_mean"] == 144 if everything else row["tokens_mean"] < 144
        assert row["hyper_parameters"]["method"] == row["method"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_ratios_are_right_on_a_fake_clock(model, monkeypatch):
    """Rounds get slower; the ratio within each is 104 to 100, the guide's 30 ms left out."""
    now, rounds, native, prefill, ask = [0.0], [0], tax.native_prefill, tax._prefill, Guide.forward

    def slow(real, seconds, first):
        def run(*args):
            result = real(*args)
            rounds[0] += first
            now[0] += seconds * (1 + rounds[0])
            return result

        return run

    def guide(self, *args):
        now[0] += 0.03
        return ask(self, *args)

    monkeypatch.setattr(measure.latency.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tax, "native_prefill", slow(native, 0.100, 1))
    monkeypatch.setattr(tax, "_prefill", slow(prefill, 0.104, 0))
    monkeypatch.setattr(Guide, "forward", guide)
    # The order within a round is reversed in every second one; one round has one order.
    monkeypatch.setattr(measure.latency, "turns", lambda names, repeats, warmup: (
        (name, i >= 0) for i in range(-warmup, repeats) for name in names
    ))  # fmt: skip
    for method in (methods.Uniform(16), methods.FastV(16),
                   methods.SGL(16, 0.1, guide=Guide(copy.deepcopy(model)))):  # fmt: skip
        rounds[0] = 0
        row = tax._tax(method, model, copy.deepcopy(model), repeats=3, warmup=1)
        assert row["native_ms"] == pytest.approx(400)  # rounds of 300, 400 and 500 ms
        assert row["method_ms"] == pytest.approx(416)
        guided = method.key == "sgl"
        assert row["guide_ms"] == (pytest.approx(30) if guided else None)
        ratio = row["ratio"]
        assert (ratio["low"], ratio["median"], ratio["high"]) == pytest.approx((1.04, 1.04, 1.04))
