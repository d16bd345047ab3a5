"""LLaVA-OneVision: videos, several pictures in a prompt, large pictures that the model shrinks."""

import pytest
import torch
from reference_inside import aim_tokens
from tiny_hosts import (
    BOS,
    CROP,
    IMAGE,
    KEPT,
    LAYERS,
    PATCHES,
    SIDE,
    VIDEO,
    K,
    Picture,
    build,
    cache_lengths,
    model_for,
    prompt,
)

from frugalvlm.hosts import host_for
from frugalvlm.hosts.base import ImageLayout
from frugalvlm.methods import AIM, AIMMask, FastV, Random, Vanilla
from frugalvlm.views import UnsupportedError

FRAMES = 8
POOLED = FRAMES * (SIDE // 2) ** 2 + 1  # pooled patches of all frames, and a newline


def video(clips=1, frames=FRAMES):
    generator = torch.Generator().manual_seed(3)
    tokens = frames * (SIDE // 2) ** 2 + 1
    pixels = torch.randn(clips, frames, 3, CROP, CROP, generator=generator).double()
    ids = torch.tensor([[BOS, 7, *[VIDEO] * tokens, 9, 11, 13]] * clips)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels}


@torch.no_grad()
def test_an_untouched_video_goes_through_unchanged():
    model = model_for("llava_onevision")
    expected = model(**video(2)).logits
    for method in (Vanilla(), FastV(PATCHES), AIM.for_budget(PATCHES, PATCHES)):
        with method.on(model):
            assert torch.equal(model(**video(2)).logits, expected)


@torch.no_grad()
def test_a_video_keeps_the_same_share_as_a_picture():
    # 33 pooled tokens are worth two crops of 16, so 6 of 16 are 12 of 33.
    model = model_for("llava_onevision")
    with FastV(KEPT).on(model) as trace:
        out = model(**video(2), use_cache=True)
    short = 2 * KEPT - POOLED
    whole = video()["input_ids"].shape[1]
    assert cache_lengths(out.past_key_values) == [whole] * K + [whole + short] * (LAYERS - K)
    assert trace.spread[-1] == (2 * KEPT, 2 * KEPT)


@torch.no_grad()
def test_the_video_tokens_that_stay_are_the_most_attended():
    model = model_for("llava_onevision")
    inputs = video()
    with FastV(KEPT).on(model):
        got = model(**inputs).logits[0, -1]
    eager = build("llava_onevision", "eager").double()
    eager.load_state_dict(model.state_dict())
    whole = eager(**inputs, output_attentions=True)
    visual = (inputs["input_ids"][0] == VIDEO).nonzero()[:, 0]
    score = whole.attentions[K - 1][0].mean(0)[-1, visual]
    kept = visual[score.topk(2 * KEPT).indices].sort().values
    stays = torch.cat(
        [torch.arange(2), kept, torch.arange(visual[-1] + 1, len(inputs["input_ids"][0]))]
    )

    # By hand: the first K layers on everything, the others on what stays.
    decoder = eager.model.language_model
    captured = {}
    handle = decoder.layers[K].register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs, hidden=args[0]), with_kwargs=True
    )
    eager(**inputs)
    handle.remove()
    hidden = captured["hidden"][:, stays]
    cos, sin = (t[:, stays] for t in captured["position_embeddings"])
    n = len(stays)
    mask = torch.full((n, n), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[None, None]
    for layer in decoder.layers[K:]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin))
    by_hand = eager.lm_head(decoder.norm(hidden))[0, -1]
    torch.testing.assert_close(got, by_hand, rtol=1e-4, atol=1e-6)  # rotary tables are float32


def test_methods_inside_the_tower_refuse_videos():
    model = model_for("llava_onevision")
    with Random(KEPT).on(model), pytest.raises(UnsupportedError, match="pooled behind the projec"):
        model(**video())


def merged_by_hand(model, inputs, kept, across=False):
    """Embeddings of one video's prompt, each frame (or all of them as one) merged by loops."""
    features = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output[0]
    frames = features[:-1].unflatten(0, (1 if across else FRAMES, -1))
    merged = [x for frame in frames for *_, x in aim_tokens(frame, frame, kept)]
    words = model.get_input_embeddings()(inputs["input_ids"][0])
    visual = inputs["input_ids"][0] == VIDEO
    first, behind = int(visual.nonzero()[0]), int(visual.nonzero()[-1]) + 1
    return torch.cat([words[:first], *(x[None] for x in merged), features[-1:], words[behind:]])


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_frames_are_merged_behind_the_pooling_and_never_across(kept):
    model, inputs = model_for("llava_onevision"), video()
    with AIM(kept * PATCHES // 4, prune=False).on(model) as trace:
        got = model(**inputs, use_cache=True)
    assert trace.tokens_per_layer == [FRAMES * kept + 1] * LAYERS
    embeds = merged_by_hand(model, inputs, kept)
    assert cache_lengths(got.past_key_values) == [len(embeds)] * LAYERS
    truth = model(inputs_embeds=embeds[None]).logits[0, -1]
    torch.testing.assert_close(got.logits[0, -1], truth, rtol=1e-4, atol=1e-6)
    across = merged_by_hand(model, inputs, kept * FRAMES, across=True)
    assert len(across) == len(embeds)
    wrong = model(inputs_embeds=across[None]).logits[0, -1]
    assert not torch.allclose(got.logits[0, -1], wrong, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", [AIM, AIMMask])
def test_merged_frames_are_pruned_inside_the_decoder(kind):
    model, inputs = model_for("llava_onevision"), video(2)
    whole, merged = inputs["input_ids"].shape[1], 2 * FRAMES + 1  # 2 of a frame's 4, and a newline
    with kind(PATCHES // 2, l1=1, l2=3).on(model) as trace:
        cache = model(**inputs, use_cache=True).past_key_values
    left = [merged, merged, merged // 2, 0]
    assert trace.visible_per_layer == left
    text = whole - POOLED
    really = [merged] * LAYERS if kind is AIMMask else left
    assert cache_lengths(cache) == [text + n for n in really]


def test_generate_with_merged_frames_is_the_same_alone_together_and_without_a_cache():
    model, inputs = model_for("llava_onevision"), video(2)
    with AIM(PATCHES // 2, l1=1, l2=4).on(model):
        together = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        slow = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
        alone = [
            model.generate(
                **{name: value[i : i + 1] for name, value in inputs.items()},
                max_new_tokens=4, do_sample=False,
            )[0]
            for i in range(2)
        ]  # fmt: skip
    assert torch.equal(together, slow)
    assert torch.equal(together, torch.stack(alone))


def test_pictures_and_videos_in_one_batch_are_refused():
    model = model_for("llava_onevision")
    inputs = {**prompt("llava_onevision"), **video()}
    with FastV(KEPT).on(model), pytest.raises(UnsupportedError, match="separate batches"):
        model(**inputs)


def test_generate_reads_a_video_once_and_continues_short():
    model = model_for("llava_onevision")
    inputs = video(2)
    with FastV(KEPT).on(model) as trace:
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert trace.spread[-1] == (2 * KEPT, 2 * KEPT)
    with FastV(PATCHES).on(model):
        same = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(same, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert ids.shape == same.shape


@torch.no_grad()
def test_several_pictures_of_a_prompt_have_a_base_crop_each():
    # The model's own rule: with `batch_num_images` above 1 there are no tiles, and one newline.
    model = model_for("llava_onevision")
    each = PATCHES + 1
    ids = torch.tensor([[BOS, *[IMAGE] * each, 5, *[IMAGE] * each, 6, 7]])
    pixels = torch.stack([Picture(seed).pixels("llava_onevision") for seed in (1, 2)])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
        "image_sizes": torch.tensor([[48, 48]] * 2), "batch_num_images": torch.tensor([2]),
    }  # fmt: skip
    expected = model(**inputs).logits
    with FastV(PATCHES).on(model):
        assert torch.equal(model(**inputs).logits, expected)
    with Random(KEPT).on(model) as trace:
        model(**inputs)
    assert trace.spread[0] == (KEPT, KEPT)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 48), (30, 48)])
def test_a_large_picture_is_counted_as_the_model_shrinks_it(height, width):
    model = build("llava_onevision").double()
    model.config.vision_aspect_ratio = "anyres_max_1"
    picture = Picture(1, height, width)
    size = torch.tensor([[height, width]])
    packed = model.get_image_features(
        picture.pixels("llava_onevision")[None], image_sizes=size
    ).pooler_output[0]
    host = host_for(model)
    ((length, crops, *rest),) = host._sizes(0, {"image_sizes": size})
    assert length == len(packed)
    layout = ImageLayout(0, torch.arange(length), range(crops), *rest)
    origin = host.origin(layout)
    assert len(origin) == length
    assert origin[:PATCHES] == list(range(PATCHES))
    assert set(origin[PATCHES:]) == {-1}


def test_a_video_token_stands_for_no_single_patch():
    host = host_for(model_for("llava_onevision"))
    pixels = torch.empty(1, FRAMES, 3, CROP, CROP)
    ((length, crops, size, tiles),) = host._sizes(0, {"pixel_values_videos": pixels})
    assert (length, crops, tiles) == (POOLED, 2, (FRAMES, 0))
    assert (
        host.origin(ImageLayout(0, torch.arange(length), range(crops), size, tiles))
        == [-1] * length
    )
