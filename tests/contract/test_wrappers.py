"""Contract 10: wrappers, compiled models, blocks entered twice, unknown releases and decoders."""

import warnings

import pytest
import torch
from tiny_hosts import (
    EVERY,
    KEPT,
    LAYERS,
    VOCAB,
    K,
    build,
    enliven,
    fingerprint_of,
    guide_for,
    make,
    model_for,
    prompt,
)
from torch import nn
from transformers import (
    GPTNeoXConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PixtralVisionConfig,
    SmolLM3Config,
    StableLmConfig,
)

from frugalvlm.engine import calls
from frugalvlm.hosts import host_for
from frugalvlm.methods import METHODS, SGL, FastV, LayerReducer, Vanilla, VisionZip
from frugalvlm.methods.base import DepthPolicy
from frugalvlm.views import UnsupportedError

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCAB, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
FOREIGN = {
    "phi3": Phi3Config(**SIZES),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key_value" not in k}),
    "stablelm": StableLmConfig(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
    "smollm3": SmolLM3Config(**SIZES),
}


def llava_with(text, vision=None):
    config = LlavaConfig(
        vision_config=vision or model_for("llava_clip").config.vision_config, text_config=text,
        image_token_id=60, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    enliven(model, 3)
    return model


class Adapted(nn.Module):
    """As `peft.PeftModel` wraps a model: the adapters are in the model's own modules."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def forward(self, **inputs):
        return self.base_model(**inputs)

    def generate(self, **inputs):
        return self.base_model.generate(**inputs)


@pytest.mark.parametrize("key", ["visionzip", "fastv", "sgl", "early_exit", "vanilla"])
def test_a_model_with_adapters_is_unwrapped(key):
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    settings = {"max_new_tokens": 4, "do_sample": False}
    with make(key).on(model):
        expected = model.generate(**inputs, **settings)
    before = fingerprint_of(model)
    adapted = Adapted(model)
    method = make(key) if key != "sgl" else SGL(KEPT, K / LAYERS, guide=guide_for(model))
    with method.on(adapted) as trace:
        assert torch.equal(adapted.generate(**inputs, **settings), expected)
        assert key == "early_exit" or trace.calls == 1
    assert fingerprint_of(model) == before


def whole_model(model):
    return torch.compile(model, backend="eager")


def layers_in_place(model):
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")
    return model


def wrapped_layers(model):
    layers = model.model.language_model.layers
    for place, layer in enumerate(layers):
        layers[place] = torch.compile(layer, backend="eager")
    return model


@pytest.mark.parametrize(
    ("compiled", "key"),
    [
        (whole_model, "visionzip"), (whole_model, "fastv"), (whole_model, "early_exit"),
        (layers_in_place, "fastv"), (wrapped_layers, "early_exit"),
    ],
)  # fmt: skip
def test_compiled_models_work_and_stay_compiled(compiled, key):
    """Also where the code was made before the block, or is made by its first pass."""
    model, inputs = build("llava_clip"), prompt("llava_clip", dtype=torch.float32)
    enliven(model, 5)
    settings = {"max_new_tokens": 3, "do_sample": False}
    with make(key).on(model), torch.no_grad():
        logits, said = model(**inputs).logits, model.generate(**inputs, **settings)
    plain = model(**inputs).logits
    ready = compiled(model)
    with make(key).on(ready), torch.no_grad():
        assert torch.equal(ready(**inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, **settings), said)
    with torch.no_grad():
        torch.testing.assert_close(ready(**inputs).logits, plain)
    with make(key).on(model), torch.no_grad():
        assert torch.equal(ready(**inputs).logits, logits)
    assert "generate" not in model.__dict__
    torch._dynamo.reset()


WRAPPERS = {
    "the inner model": (lambda model: model.model, "without an output layer"),
    "DataParallel": (nn.DataParallel, r"put the method on its \.module"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("key", ["visionzip", "fastv", "vanilla", "early_exit"])
def test_other_wrappers_are_refused_and_break_nothing(wrapper, key):
    model, inputs = build("llava_clip"), prompt("llava_clip", dtype=torch.float32)
    said = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    wrap, reason = WRAPPERS[wrapper]
    if key == "early_exit" and wrapper == "the inner model":
        reason = "language model whose decoder"
    with pytest.raises(UnsupportedError, match=reason), make(key).on(wrap(model)):
        pass
    assert torch.equal(model.generate(**inputs, max_new_tokens=2, do_sample=False), said)


@pytest.mark.parametrize(("key", "host"), [pair for pair in EVERY if pair[1] == "llava_clip"])
def test_a_block_entered_twice_is_told_so(key, host):
    model, inputs = model_for(host), prompt(host)
    block = make(key).on(model)
    with torch.no_grad():
        with block:
            first = model(**inputs).logits
            with pytest.raises(UnsupportedError, match="open already"), block:
                pass
            assert torch.equal(model(**inputs).logits, first)
        with block:  # once it is left it may be entered again
            assert torch.equal(model(**inputs).logits, first)


@pytest.mark.parametrize("family", FOREIGN)
def test_unknown_decoders_are_refused_by_name(family):
    model = llava_with(FOREIGN[family])
    inside = [key for key, kind in METHODS.items() if issubclass(kind, LayerReducer | DepthPolicy)]
    assert len(inside) > 5
    for key in inside:
        with pytest.raises(UnsupportedError, match=f"'{family}'"), make(key).on(model):
            pass


@pytest.mark.parametrize("family", FOREIGN)
def test_methods_before_the_decoder_need_no_known_one(family):
    """Short and full prompts alike: with a cache as without."""
    model, inputs = llava_with(FOREIGN[family]), prompt("llava_clip", dtype=torch.float32)
    settings = {"max_new_tokens": 4, "do_sample": False}
    for method in (VisionZip(4, 2), Vanilla()):
        with method.on(model) as trace:
            cached = model.generate(**inputs, **settings)
            assert torch.equal(cached, model.generate(**inputs, use_cache=False, **settings))
        assert trace.tokens_per_layer[0] == (16 if isinstance(method, Vanilla) else KEPT)


def test_sliding_windows_are_refused():
    model = llava_with(MistralConfig(**SIZES, sliding_window=8))
    with pytest.raises(UnsupportedError, match="sliding_window=None"), FastV(KEPT).on(model):
        pass
    model = llava_with(MistralConfig(**SIZES, sliding_window=None))
    inputs = prompt("llava_clip", dtype=torch.float32)
    with FastV(KEPT).on(model):
        model.generate(**inputs, max_new_tokens=3)


def test_flex_attention_is_refused_inside_the_decoder():
    model = build("llava_clip")
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedError, match="attn_implementation='sdpa'"), FastV(KEPT).on(model):
        pass


def test_unknown_towers_are_refused_by_name():
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        image_size=24, patch_size=6,
    )  # fmt: skip
    model = llava_with(model_for("llava_clip").config.text_config, vision)
    with pytest.raises(UnsupportedError, match="'pixtral'"), VisionZip(4, 2).on(model):
        pass


def test_hosts_tell_what_they_read_before_anything_is_hooked():
    model = llava_with(FOREIGN["phi3"])
    before = fingerprint_of(model)
    host_for(model)
    with pytest.raises(UnsupportedError), FastV(KEPT).on(model):
        pass
    assert fingerprint_of(model) == before


def test_a_newer_release_than_any_that_was_tried_is_named():
    calls.check_release.cache_clear()
    try:
        newest = calls.TESTED[1]
        with pytest.warns(UserWarning, match=f"newer than {newest}"):
            calls.check_release("6.1.0.dev0")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            calls.check_release(f"{newest}.9")
            calls.check_release("5.17.0")
    finally:
        calls.check_release.cache_clear()


def test_the_package_asks_for_releases_that_were_tried():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f"transformers>={calls.TESTED[0]}" in text


def test_the_cache_is_found_under_both_names():
    from transformers import DynamicCache

    cache = DynamicCache()
    assert calls.cache_of({"cache": cache}) is cache
    assert calls.cache_of({"past_key_values": cache}) is cache
    assert calls.cache_of({"cache": None, "past_key_values": None}) is None
