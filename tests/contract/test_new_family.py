"""A family added by the guide passes every contract for families behind the projector."""

import pytest
import test_units
import tiny_units
import torch
from toy_family import ToyConfig, ToyForConditionalGeneration, ToyHost
from transformers import CLIPVisionConfig, LlamaConfig

from frugalvlm.hosts import HOSTS
from frugalvlm.methods import METHODS, FastV
from frugalvlm.report.support import refusals
from frugalvlm.views import UnsupportedError

KEYS = ("fastervlm", "visionzip", "tome", "fastv", "sparsevlm", "aim")


@pytest.fixture
def toy(monkeypatch):
    """The family, known to the engine and to the contract tests."""
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=tiny_units.VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        image_size=24, patch_size=4,
    )  # fmt: skip
    config = ToyConfig(
        text_config=text, vision_config=tower, image_token_id=tiny_units.IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    model = ToyForConditionalGeneration(config)
    tiny_units.enliven(model, 7)
    model = model.double().eval()
    monkeypatch.setattr(test_units, "model_for", lambda host: model)
    monkeypatch.setitem(HOSTS, "toy", ToyHost)
    return model


@pytest.mark.parametrize("key", KEYS)
def test_it_passes_the_contracts(key, toy):
    test_units.test_keeping_everything_is_the_identity_and_nothing_stays_behind(key, "toy")
    for rows in (tiny_units.ONE, tiny_units.MANY[1:2]):
        test_units.test_pruned_run_equals_the_full_run_with_hidden_keys(key, "toy", rows)
    test_units.test_a_padded_batch_equals_its_items(key, "toy")
    test_units.test_steps_by_hand(key, "toy")


def test_what_it_cannot_serve_it_refuses(toy):
    assert set(refusals(toy)) == {"prumerge_plus", "downsample"}


def test_without_its_line_it_is_unknown(toy, monkeypatch):
    monkeypatch.delitem(HOSTS, "toy")
    with pytest.raises(UnsupportedError, match="No host knows the model family 'toy'"):
        FastV(2).on(toy).__enter__()


@pytest.mark.parametrize("host", tiny_units.UNITS)
def test_the_support_table_is_what_the_contracts_know(host):
    """What the README's table is made of, on the models of the contract tests."""
    expected = {key for key, family in tiny_units.REFUSED if family == host}
    refused = refusals(tiny_units.model_for(host))
    assert refused.keys() == expected
    assert expected < METHODS.keys()
