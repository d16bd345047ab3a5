"""The untouched model is traced as others are, and stays untouched."""

import pytest
import torch
from tiny_hosts import HOSTS, LAYERS, MANY, PATCHES, TILED, Picture, model_for, pictures_of, prompt

from frugalvlm.methods import Vanilla

ONE_EACH = [[3, Picture(1), 5], [1, Picture(2, 32, 48), 2], [6]]


def tokens_of(host, rows):
    return [p.tokens(host) for row in rows for p in pictures_of(row)]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("how", ["forward", "generate", "no cache", "beams"])
def test_the_trace_of_the_untouched_model(host, how):
    rows = ONE_EACH if how == "beams" else MANY
    model, inputs = model_for(host), prompt(host, rows)
    settings = {"max_new_tokens": 3, "do_sample": False, "use_cache": how != "no cache"}
    settings |= {"num_beams": 2} if how == "beams" else {}

    def run():
        with torch.no_grad():
            return model(**inputs).logits if how == "forward" else model.generate(
                **inputs, **settings
            )  # fmt: skip

    plain = run()
    with Vanilla().on(model) as trace:
        assert torch.equal(run(), plain)
    counts = tokens_of(host, rows)
    assert trace.calls == (3 if how == "no cache" else 1)
    assert trace.tokens_per_layer == [sum(counts) / len(counts)] * LAYERS
    assert trace.spread == [(min(counts), max(counts))] * LAYERS
    crops = [p.crops(host) for row in rows for p in pictures_of(row)]
    assert len(trace.kept) == sum(crops)
    if host in TILED:  # the base crop is whole; tiles lose their padding
        assert trace.kept[0] == list(range(PATCHES))
    else:
        assert trace.kept == [list(range(PATCHES))] * len(crops)
    assert trace.merged == [{}] * sum(crops)


def test_only_watching_asks_for_nothing():
    """Features computed before, without the pictures' sizes: it takes what the model takes."""
    model, inputs = model_for("llava_next"), prompt("llava_next")
    features = {"image": model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])}
    bare = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        plain = model(**bare, mm_encoder_outputs=features).logits
        with Vanilla().on(model) as trace:
            assert torch.equal(model(**bare, mm_encoder_outputs=features).logits, plain)
        assert trace.calls == 1


def test_the_block_places_one_hook():
    model = model_for("llava_clip")

    def hooks():
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    before = hooks()
    with Vanilla().on(model):
        assert hooks() == before + 1
    assert hooks() == before
