"""Contract 7: determinism, and clear errors that name the remedy."""

import pytest
import torch
from tiny_hosts import (
    EVERY,
    HOSTS,
    KEPT,
    MANY,
    PAIRS,
    PATCHES,
    TILED,
    UNSUPPORTED,
    UNTRACED,
    K,
    Picture,
    build,
    make,
    model_for,
    prompt,
)
from transformers import LlamaConfig, LlamaForCausalLM

from frugalvlm.hosts import host_for
from frugalvlm.methods import (
    AIM,
    METHODS,
    AIMMask,
    AvgPool,
    DivPrune,
    Downsample,
    EncoderReducer,
    FasterVLM,
    FastV,
    PruMergePlus,
    Random,
    ToMe,
    Uniform,
    Vanilla,
    VisionZip,
    VisionZipMean,
    method_class,
)
from frugalvlm.methods.base import GuidedReducer
from frugalvlm.views import BudgetError, UnsupportedError


@pytest.mark.parametrize(("key", "host"), EVERY)
def test_two_calls_give_the_same(key, host):
    model, inputs = model_for(host), prompt(host, MANY)
    with make(key).on(model) as trace, torch.no_grad():
        first = model(**inputs).logits
        kept = trace.kept if key not in UNTRACED else []
        second = model(**inputs).logits
        assert kept == (trace.kept if key not in UNTRACED else [])
    assert torch.equal(first, second)


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("budget", [0, -1, PATCHES + 1, True, 3.5, None, "6"])
def test_impossible_budgets(key, budget):
    with pytest.raises(BudgetError, match=r"budget|Budget"):
        METHODS[key].for_budget(budget, PATCHES)


@pytest.mark.parametrize("budget", [0, -1, PATCHES + 1, True, 3.5])
@pytest.mark.parametrize(
    "kind",
    [
        Random, Uniform, AvgPool, Downsample, ToMe, DivPrune, PruMergePlus, FastV, FasterVLM,
        VisionZip, VisionZipMean, AIM,
    ],
)  # fmt: skip
def test_impossible_budgets_of_a_method_made_by_hand(kind, budget):
    model = model_for("llava_clip")
    with pytest.raises(BudgetError):  # when it is made, or when it meets the model
        kind(*[budget, 0][: 1 + issubclass(kind, VisionZip)]).on(model).__enter__()


def test_the_budget_error_names_the_range():
    with pytest.raises(BudgetError, match="choose 1 to 16"):
        FastV.for_budget(17, 16)
    with pytest.raises(BudgetError, match="choose 1 to 16"), Random(17).on(model_for("llava_clip")):
        pass


@pytest.mark.parametrize(("key", "host"), sorted(UNSUPPORTED))
def test_a_missing_ability_is_refused_with_a_remedy(key, host):
    with (
        pytest.raises(UnsupportedError, match=r"no \[CLS\] token; use "),
        make(key).on(model_for(host)),
    ):
        pass


def test_exactly_the_methods_that_need_cls_are_refused():
    assert {"fastervlm", "prumerge_plus"} <= {key for key, _ in UNSUPPORTED}
    for host in HOSTS:
        shape = host_for(model_for(host)).shape
        refused = {key for key, method in METHODS.items() if method.needs_cls and not shape.has_cls}
        assert refused == {key for key, other in UNSUPPORTED if other == host}


def test_visionzip_refuses_cls_scores_where_there_are_none():
    with (
        pytest.raises(UnsupportedError, match="score='received'"),
        VisionZip(4, 2, score="cls").on(model_for("llava_siglip")),
    ):
        pass


def test_an_unknown_family_is_named():
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    for model in (LlamaForCausalLM(config), torch.nn.Linear(2, 2)):
        with (
            pytest.raises(UnsupportedError, match=r"Known families: llava, llava_next"),
            FastV(4).on(model),
        ):
            pass


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="Known methods: vanilla"):
        method_class("visionzap")


@pytest.mark.parametrize("k", [0, 4, 9, -1])
def test_fastv_needs_a_layer_to_cut_at(k):
    with (
        pytest.raises(UnsupportedError, match=r"choose k in 1\.\.3|k is a whole number from 1"),
        FastV(KEPT, k=k).on(model_for("llava_clip")),
    ):
        pass


@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_text_only_prompts_pass_through(key, host):
    model, text = model_for(host), prompt(host, [[6], [9]])
    with torch.no_grad():
        before = model(**text).logits
        said = model.generate(**text, max_new_tokens=3, do_sample=False)
        with make(key).on(model) as trace:
            with pytest.raises(ValueError, match="Nothing was traced"):
                trace.kept  # noqa: B018
            assert torch.equal(model(**text).logits, before)
            assert torch.equal(model.generate(**text, max_new_tokens=3, do_sample=False), said)
            assert trace.tokens_per_layer == []
            model(**prompt(host))
            assert trace.tokens_per_layer
            assert trace.calls == 3
            model(**text)
            assert trace.tokens_per_layer == []
            for name in ("kept", "merged", "mean_tokens"):
                with pytest.raises(ValueError, match="no image"):
                    getattr(trace, name)


@pytest.mark.parametrize(("key", "host"), EVERY)
def test_static_caches_are_refused(key, host):
    if key == "vanilla":
        pytest.skip("vanilla changes nothing")
    model, inputs = model_for(host), prompt(host)
    with make(key).on(model), pytest.raises(UnsupportedError, match="use the default dynamic"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("setting", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 4}])
def test_generation_that_takes_the_cache_apart_is_refused(setting):
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    with VisionZip(4, 2).on(model), pytest.raises(UnsupportedError, match="leave it out"):
        model.generate(**inputs, max_new_tokens=2, **setting)


@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_features_computed_before(key, host):
    """Layer reducers take them; encoder reducers and guides cannot, and say so."""
    model, inputs = model_for(host), prompt(host)
    if not hasattr(model, "_supports_mm_encoder_outputs"):
        pytest.skip("this version of Transformers takes no features computed before")
    with make(key).on(model), torch.no_grad():
        expected = model(**inputs).logits
    pixels = inputs.pop("pixel_values")
    sizes = {"image_sizes": inputs["image_sizes"]} if host in TILED else {}
    features = {"image": model.get_image_features(pixels, **sizes)}
    with make(key).on(model), torch.no_grad():
        if not issubclass(METHODS[key], EncoderReducer | GuidedReducer):
            logits = model(**inputs, mm_encoder_outputs=features).logits
            assert torch.equal(logits, expected)
        else:
            with pytest.raises(UnsupportedError, match="pass pixel_values"):
                model(**inputs, mm_encoder_outputs=features)


def test_where_the_picture_stands_must_be_known():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with FastV(KEPT).on(model), pytest.raises(UnsupportedError, match="placeholders="):
        model(**inputs)


@pytest.mark.parametrize("wrong", [5, torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 9)])
def test_placeholders_that_are_not_of_this_prompt(wrong):
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    for method in (FastV(KEPT), VisionZip(4, 2)):
        with method.on(model, wrong), pytest.raises(UnsupportedError, match="as long as the prom"):
            model(**inputs)


@pytest.mark.parametrize("host", ["llava_clip", "llava_next"])
def test_prompts_that_do_not_fit_their_pictures(host):
    model, inputs = model_for(host), prompt(host)
    inputs["input_ids"][0, -6] = 5  # one placeholder is missing
    with FastV(KEPT).on(model), pytest.raises(UnsupportedError, match="own processor"):
        model(**inputs)


def test_llava_next_needs_image_sizes():
    inputs = prompt("llava_next")
    del inputs["image_sizes"]
    with FastV(KEPT).on(model_for("llava_next")), pytest.raises(UnsupportedError, match="image_si"):
        model_for("llava_next")(**inputs)


def test_a_thin_picture_cannot_keep_more_than_it_has():
    """LLaVA-NeXT cuts the padding of thin pictures away; encoder reducers do not."""
    inputs = prompt("llava_next", [[2, Picture(1, 12, 96), 2]])
    model = model_for("llava_next")
    with Random(15).on(model), pytest.raises(UnsupportedError, match="lower the budget"):
        model(**inputs)


def test_a_picture_behind_an_existing_cache_is_refused():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    with FastV(KEPT).on(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        with pytest.raises(UnsupportedError, match="whole conversation"):
            model(**inputs, past_key_values=cache)


@pytest.mark.parametrize("setting", [{"num_beams": 2}, {"num_return_sequences": 2}])
def test_crops_in_one_row_each_do_not_go_with_several_sequences(setting):
    """Released code's layout, [all crops, 3, height, width]: copies would mix pictures up."""
    model, inputs = model_for("llava_next"), prompt("llava_next", [[2, Picture(1), 3]])
    inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
    inputs |= {"max_new_tokens": 2, "do_sample": "num_beams" not in setting}
    with VisionZip(4, 2).on(model):
        model.generate(**inputs)
        with pytest.raises(UnsupportedError, match="one row per picture"):
            model.generate(**inputs, **setting)


def test_reasons_are_the_true_ones():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    captured = model.generate
    with VisionZip(4, 2).on(model):
        with pytest.raises(UnsupportedError, match="looked up before the block"):
            captured(**inputs, max_new_tokens=1)
        assert captured.__self__ is model
    with FastV(KEPT).on(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        with pytest.raises(UnsupportedError, match="leave pixel_values out"):
            model(**inputs, past_key_values=cache)


def test_several_pictures_with_beams_are_refused():
    model, inputs = model_for("llava_clip"), prompt("llava_clip", MANY)
    with FastV(KEPT).on(model), pytest.raises(UnsupportedError, match="repeat the prompt"):
        model.generate(**inputs, max_new_tokens=2, num_beams=2)


def test_a_cropped_or_foreign_cache_is_refused():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    token = torch.tensor([[5]])
    with FastV(KEPT).on(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        cache.crop(-2)
        with pytest.raises(UnsupportedError, match="cropped"):
            model(input_ids=token, past_key_values=cache)
        cache = model(**inputs).past_key_values
        with pytest.raises(UnsupportedError, match="batch size"):
            model(input_ids=token.expand(2, -1), past_key_values=cache)
    with FastV(KEPT, k=3).on(model), pytest.raises(UnsupportedError, match="another method"):
        model(input_ids=token, past_key_values=cache)


def test_a_mask_that_forgets_the_removed_tokens_is_refused():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    with VisionZip(4, 2).on(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        short = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
        with pytest.raises(UnsupportedError, match="as it was given"):
            model(input_ids=torch.tensor([[5]]), attention_mask=short, past_key_values=cache)


def test_two_methods_at_one_place_are_refused():
    model = model_for("llava_clip")
    with VisionZip(4, 2).on(model), pytest.raises(UnsupportedError, match="right behind"):
        Random(4).on(model).__enter__()
    with FastV(KEPT).on(model), pytest.raises(UnsupportedError, match=f"before layer {K}"):
        FastV(3).on(model).__enter__()
    masked = AIMMask(4, l1=1, l2=3)
    with FastV(KEPT, k=1).on(model), pytest.raises(UnsupportedError, match="do not go together"):
        masked.on(model).__enter__()
    with masked.on(model), pytest.raises(UnsupportedError, match="do not go together"):
        FastV(KEPT, k=1).on(model).__enter__()


@pytest.mark.parametrize("host", ["llava_clip", "llava_siglip"])
def test_a_wrong_feature_selection_is_refused(host):
    """[CLS] among the patches, or a patch taken for [CLS]: every position would be off by one."""
    model = build(host)
    wrong = {"default": "full", "full": "default"}
    strategy = wrong[model.config.vision_feature_select_strategy]
    model.config.vision_feature_select_strategy = strategy
    with pytest.raises(UnsupportedError, match="vision_feature_select_strategy"):
        VisionZip(4, 2).on(model).__enter__()


def test_a_feature_layer_set_in_the_call_is_refused():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    with VisionZip(4, 2).on(model), pytest.raises(UnsupportedError, match="model's config"):
        model(**inputs, vision_feature_layer=-1)


def test_several_feature_layers_are_refused():
    model = build("llava_clip")
    model.config.vision_feature_layer = [-2, -3]
    with pytest.raises(UnsupportedError, match="several vision layers"):
        VisionZip(4, 2).on(model).__enter__()


def test_vanilla_refuses_a_smaller_budget():
    with pytest.raises(BudgetError):
        Vanilla.for_budget(PATCHES - 1, PATCHES)
    assert Vanilla.for_budget(PATCHES, PATCHES) == Vanilla()
