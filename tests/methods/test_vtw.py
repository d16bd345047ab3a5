"""VTW: nothing of the picture behind layer K, against an independent mask over the full run."""

import pytest
import torch
from reference import hidden_keys
from tiny_hosts import IMAGE, LAYERS, PATCHES, model_for, prompt

from frugalvlm.methods import VTW
from frugalvlm.methods.schedules import at_mean
from frugalvlm.views import BudgetError, Shape, UnsupportedError

SHAPE = Shape(PATCHES, (4, 4), LAYERS, True)


def test_k_is_a_share_of_the_depth():
    assert VTW().layers(32) == (16,), "LLaVA-1.5-7B"
    assert VTW(8 / 32).layers(32) == (8,)
    assert VTW(8 / 32).layers(12) == (3,)
    assert VTW(3 / 32).layers(12) == (1,)
    assert VTW(0.1 + 0.2).layers(10) == (3,), "a share that is whole but for its last bit"
    assert VTW(0).layers(12) == (1,), "one layer sees the picture"
    assert VTW(1).layers(12) == ()


def test_a_budget_is_the_mean_over_layers():
    for mean in (16, 48, 72, 144):
        method = VTW.for_budget(mean, 144)
        counts = method.counts(144, 12)
        assert sum(counts) / 12 <= mean
        assert sum(counts) / 12 > mean - 144 / 12
        assert at_mean(VTW, mean, 144, 12) == method
    with pytest.raises(BudgetError, match="at least 12"):
        at_mean(VTW, 11, 144, 12)


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_answer_is_that_of_a_run_whose_deep_layers_are_blind(host, k):
    model, inputs = model_for(host), prompt(host)
    image = (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()

    def blind_from(layer):
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[0, image] = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        with hidden_keys(model, image, layer):
            hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        return model.lm_head(hidden)[0, -1]

    with torch.no_grad():
        with VTW(k / LAYERS).on(model) as trace:
            answer = model(**inputs).logits[0, -1]
        expected, late = blind_from(k), blind_from(k + 1)
    assert trace.tokens_per_layer == [PATCHES] * k + [0] * (LAYERS - k)
    torch.testing.assert_close(answer, expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(answer, late, rtol=1e-6, atol=1e-8), "one layer late is seen"


def test_a_decoder_of_one_layer_is_refused():
    VTW().check(SHAPE)
    with pytest.raises(UnsupportedError, match="has one"):
        VTW().check(Shape(PATCHES, (4, 4), 1, True))
