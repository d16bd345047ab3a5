"""The native prefill, the yardstick of a method's tax, ends with the pruned run's shapes."""

import pytest
import torch

from frugalvlm import methods
from frugalvlm.pocket.models import build_model
from frugalvlm.study.tax import _in_lengths, _inputs, measure_tax, native_prefill


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("pocket-llava-tiny").eval()


def test_native_prefill_of_all_tokens_is_the_model_itself(model):
    inputs = _inputs(model)
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
    inputs = _inputs(model)
    with torch.inference_mode(), methods.Random(16).on(model):
        pruned = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    layers = model.config.text_config.num_hidden_layers
    native = native_prefill(model, inputs, [16] * layers).past_key_values
    assert native.get_seq_length() == pruned.get_seq_length() == 4 + 16 + 12


def test_every_method_gets_a_ratio_with_its_interval(model):
    rows = measure_tax(model, 16, repeats=2)
    assert {row["method"] for row in rows} == set(methods.METHODS) - {
        "vanilla",
        "sgl",
        "early_exit",
    }
    assert all(
        row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"] for row in rows
    )
