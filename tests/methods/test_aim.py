"""AIM against slow loops written from the released code, and against plausible mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import embeddings
from reference_inside import aim_tokens, inside_logits, page_rank
from tiny_hosts import (
    KEPT,
    LAYERS,
    MANY,
    ONE,
    PATCHES,
    Picture,
    build,
    cache_lengths,
    make,
    model_for,
    pictures_of,
    prompt,
)  # fmt: skip
from torch import Tensor

from frugalvlm.methods import AIM, AIMMask, aim
from frugalvlm.views import MERGED_SOURCE, EncoderView, LayerView, Shape, UnsupportedError

WIDTH = 5


# -- merging -------------------------------------------------------------------------------------


def encoder_view(seed: int, patches: int = PATCHES) -> tuple[EncoderView, Tensor]:
    """A view with random features, and the keys [crops, patches, 6] of the layer behind them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features, own, behind = noise(2, 1 + patches, WIDTH), noise(2, 2, 1 + patches, 3), None
    behind = noise(2, 2, 1 + patches, 3) * noise(2, 1, 1 + patches, 1).exp()

    def view(keys: Tensor, **more: Any) -> EncoderView:
        return EncoderView(features[:, 1:], features[:, :1], (4, patches // 4), features,
                           lambda rows: keys, keys, 1.0, None, **more)  # fmt: skip

    keys = behind[:, :, 1:].transpose(1, 2).flatten(2)
    return view(own, following=lambda: view(behind)), keys


def twin(features: Tensor, keys: Tensor, kept: int, mistake: str = "") -> Tensor:
    """One crop by loops, with one mistake on demand."""
    if mistake == "features as metric":
        keys = features
    tokens = [(x, k, 1) for x, k in zip(features, keys, strict=True)]
    while len(tokens) > kept:
        r = min(len(tokens) - kept, len(tokens) // 2)
        a, b = tokens[0::2], tokens[1::2]
        if mistake == "odd tokens are the sources":
            a, b = b, a
        pairs = []
        for i, (_, k, _) in enumerate(a):
            dot = [float(k @ t[1]) for t in b]
            if mistake != "dot product":
                dot = [d / float(t[1].norm()) for d, t in zip(dot, b, strict=True)]
            best = max(range(len(b)), key=lambda j: dot[j])
            pairs.append(
                (dot[best] / (1 if mistake == "dot product" else float(k.norm())), i, best)
            )
        pairs.sort(key=lambda pair: -pair[0])
        left = [i for _, i, _ in pairs[r:]]
        tokens = [a[i] for i in (sorted(left) if mistake == "order restored" else left)]
        for j, target in enumerate(b):
            group = [a[i] for _, i, best in pairs[:r] if best == j]
            if mistake != "destination left out" or not group:
                group = [target, *group]
            weight = [size for *_, size in group]
            if mistake != "weighted by size":
                weight = [1] * len(group)
            x, k = (
                sum(w * t[n] for w, t in zip(weight, group, strict=True)) / sum(weight)
                for n in (0, 1)
            )
            if mistake == "metric not merged":
                k = target[1]
            tokens.append((x, k, sum(t[2] for t in group)))
    return torch.stack([x for x, *_ in tokens])


def check_merged(answer: list[Tensor], view: EncoderView, keys: Tensor, kept: int) -> None:
    for tokens, features, metric in zip(answer, view.patches, keys, strict=True):
        truth = torch.stack([x for *_, x in aim_tokens(features, metric, kept)])
        torch.testing.assert_close(
            tokens, truth, rtol=1e-12, atol=1e-12,
            msg=lambda m: "rounds of even to odd matching by cosine of the next layer's keys, "
            f"plain means, unmerged tokens first by falling similarity: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("kept", [1, 2, 4, 6, 7, 11, 15])
@pytest.mark.parametrize("patches", [16, 20])
@pytest.mark.parametrize("seed", range(3))
def test_merged_tokens_are_those_of_the_loop(kept, patches, seed):
    view, keys = encoder_view(seed, patches)
    reduced = AIM(kept).reduce(view)
    check_merged(list(reduced.tokens), view, keys, kept)
    for crop, (features, metric) in enumerate(zip(view.patches, keys, strict=True)):
        names = aim_tokens(features, metric, kept)
        assert reduced.source[crop].tolist() == [
            number if kind == "patch" else MERGED_SOURCE for kind, number, _ in names
        ]
        alone = {number for kind, number, _ in names if kind == "patch"}
        for patch, slot in enumerate(reduced.merged_into[crop].tolist()):
            assert (slot == -1) == (patch in alone)
            assert slot == -1 or names[slot][0] == "merged"


MERGE_MISTAKES = (
    "features as metric", "odd tokens are the sources", "dot product", "order restored",
    "destination left out", "weighted by size", "metric not merged",
)  # fmt: skip


@pytest.mark.parametrize("mistake", ["", *MERGE_MISTAKES])
def test_every_mistake_in_merging_is_found(mistake):
    view, keys = encoder_view(1)
    wrong = [twin(x, k, KEPT, mistake) for x, k in zip(view.patches, keys, strict=True)]
    if not mistake:
        check_merged(wrong, view, keys, KEPT)
        return
    with pytest.raises(AssertionError, match="even to odd"):
        check_merged(wrong, view, keys, KEPT)


def test_features_are_the_metric_where_no_layer_follows():
    model = build("llava_siglip").double()
    model.config.vision_feature_layer = -1
    inputs = prompt("llava_siglip")
    answers: list[Any] = []
    with AIM(KEPT, prune=False).on(model), torch.no_grad():
        hook = model.model.multi_modal_projector.register_forward_pre_hook(
            lambda module, args: answers.append(args[0])
        )
        model(**inputs)
        hook.remove()
        (features,) = model.model.vision_tower(
            inputs["pixel_values"], output_hidden_states=True
        ).hidden_states[-1]
    truth = torch.stack([x for *_, x in aim_tokens(features, features, KEPT)])
    torch.testing.assert_close(answers[0][0], truth, rtol=1e-10, atol=1e-10)


# -- pruning -------------------------------------------------------------------------------------


def layer_view(seed: int, counts: tuple[int, ...] = (6, 6)) -> tuple[LayerView, Tensor]:
    """Two prompts of nine tokens with the image at 2..7, and their logits [2, 3, 9, 9]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 9, 9, generator=generator, dtype=torch.float64) / 3
    causal = torch.ones(9, 9, dtype=torch.bool).tril()

    def attention_of(queries: Tensor, temperature: float = 1.0) -> Tensor:
        maps = (logits / temperature).masked_fill(~causal, float("-inf")).softmax(-1)
        return maps.gather(2, queries[:, None, :, None].expand(-1, 3, -1, 9))

    visual = torch.arange(2, 8).expand(2, -1)
    view = LayerView(
        3, torch.zeros(2, 9, 1, dtype=torch.float64), visual, counts, (1, 1), 6,
        torch.tensor([0, 1]), torch.tensor([8, 8]), attention_of, 8,
    )  # fmt: skip
    return view, logits


def ranking(view: LayerView, logits: Tensor, kept: int, mistake: str = "") -> list[list[int]]:
    causal, answer = torch.ones(9, 9, dtype=torch.bool).tril(), []
    for maps in logits:
        score = page_rank(
            maps.transpose(-1, -2) if mistake == "mass flows to the query" else maps, causal,
            1.0 if mistake == "no temperature" else 0.1, 1 if mistake == "one step" else 5,
        )  # fmt: skip
        if mistake == "mean over heads":
            heads = [page_rank(head[None], causal, 0.1) for head in maps]
            score = [sum(each) for each in zip(*heads, strict=True)]
        if mistake == "last token's attention":
            score = maps[:, 8].softmax(-1).mean(0).tolist()
        own = score[2:8]
        answer.append(sorted(sorted(range(6), key=lambda i: -own[i])[:kept]))
    return answer


@pytest.mark.parametrize("chunk", [256, 4, 1])
def test_ranking_is_that_of_the_loop(chunk, monkeypatch):
    monkeypatch.setattr(aim, "CHUNK", chunk)
    for seed in range(5):
        view, logits = layer_view(seed)
        kept = AIM(6, l1=1, l2=5).keep(view)  # layer 3 is half way
        assert kept.counts == (3, 3)
        assert kept.index.tolist() == ranking(view, logits, 3)


@pytest.mark.parametrize(
    "mistake",
    ["mass flows to the query", "no temperature", "one step", "mean over heads",
     "last token's attention"],
)  # fmt: skip
def test_every_mistake_in_ranking_is_found(mistake):
    differs = 0
    for seed in range(30):
        view, logits = layer_view(seed)
        differs += AIM(6, l1=1, l2=5).keep(view).index.tolist() != ranking(view, logits, 3, mistake)
    assert differs, f"the ranking does not show the mistake: {mistake}"


def test_the_schedule_is_that_of_the_released_code():
    """Image model: 32 layers, the mask made at layer i serves layer i + 1."""
    method = AIM.for_budget(72)
    assert method.layers(32) == tuple(range(14, 22))
    for layer in method.layers(32):
        rate = max(0, 1.0 - (layer - 1 - 13 + 1) * 0.125)
        view, _ = layer_view(0)
        view.layer, view.decoder_layers, view.entered = layer, 32, (6, 6)
        assert method.keep(view).counts == (int(6 * rate + 3) - 3,) * 2
    assert AIM(1568, l1=14, l2=22).layers(28) == tuple(range(15, 23))
    assert AIM(72).layers(40) == tuple(range(17, 27))
    assert AIM(72, prune=False).layers(32) == ()


def test_ratios_refer_to_what_entered_the_decoder():
    view, _ = layer_view(0)
    view.entered, view.counts = (12, 6), (6, 6)
    assert AIM(12, l1=1, l2=5).keep(view).counts == (6, 3)


@pytest.mark.parametrize("kind", [AIM, AIMMask])
@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa", "llava_next"])
def test_the_last_layers_see_no_visual_token(kind, host):
    """Logits with an empty image in the last layer, alone and in a padded batch, and decoding."""
    model, method = model_for(host), kind(KEPT, l1=1, l2=3)
    batch = prompt(host, MANY)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with method.on(model) as trace, torch.no_grad():
        out = model(**batch, position_ids=positions)
        assert trace.visible_per_layer[-1] == 0
        assert trace.kept == [[] for _ in range(sum(trace._crops))]
        for index, row in enumerate(MANY):
            crops = [p.crops(host) for p in pictures_of(row)]
            embeds, places = embeddings(method, model, host, row, [])
            expected, _ = inside_logits(method, model, embeds, places, crops, embeds.shape[1])
            torch.testing.assert_close(out.logits[index, -1], expected[0], rtol=1e-9, atol=1e-9)
        together = model.generate(**prompt(host, MANY), max_new_tokens=3, do_sample=False)
        for index, row in enumerate(MANY):
            alone = model.generate(**prompt(host, [row]), max_new_tokens=3, do_sample=False)
            assert together[index, -3:].tolist() == alone[0, -3:].tolist()


def test_masks_save_nothing_and_say_so():
    model, inputs = model_for("llava_clip"), prompt("llava_clip", ONE)
    merged = inputs["input_ids"].shape[1] - PATCHES + KEPT
    with make("aim_mask").on(model) as trace, torch.no_grad():
        cache = model(**inputs).past_key_values
    assert cache_lengths(cache) == [merged] * LAYERS
    assert trace.tokens_per_layer == [KEPT] * LAYERS
    assert trace.visible_per_layer == [KEPT, KEPT, 4, 2]
    with make("aim").on(model) as short, torch.no_grad():
        cache = model(**inputs).past_key_values
    assert cache_lengths(cache) == [merged, merged, merged - 2, merged - 4]
    assert short.tokens_per_layer == short.visible_per_layer == [KEPT, KEPT, 4, 2]


def test_hiding_is_not_removing():
    """Hidden tokens still hold and send mass, so later layers may choose otherwise."""
    model, differs = model_for("llava_clip"), 0
    for seed in range(20):
        inputs, visible = prompt("llava_clip", [[3, Picture(seed), 4]]), []
        for kind in (AIM, AIMMask):
            with kind(PATCHES, l1=0, l2=4).on(model) as trace, torch.no_grad():
                model(**inputs)
                visible.append([trace.kept_at(layer) for layer in range(LAYERS)])
        assert visible[0][1] == visible[1][1], "the first choice is the same"
        differs += visible[0] != visible[1]
    assert differs


def test_flash_attention_cannot_hide_tokens(monkeypatch):
    model = model_for("llava_clip")
    monkeypatch.setattr(model.model.language_model.config, "_attn_implementation", "flash_like")
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS.register("flash_like", lambda *args, **kwargs: sdpa(*args, **kwargs))
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_like", flash_attention_mask)
    with make("aim_mask").on(model), pytest.raises(UnsupportedError, match="'sdpa'"):
        model(**prompt("llava_clip"))


@pytest.mark.parametrize(("l1", "l2"), [(3, 3), (4, 2), (3, 5), (-1, 2)])
def test_impossible_schedules_are_refused(l1, l2):
    shape, remedy = Shape(PATCHES, (4, 4), LAYERS, True), r"l1 < l2 .* prune=False|from 0"
    with pytest.raises(UnsupportedError, match=remedy):
        AIM(KEPT, l1=l1, l2=l2).check(shape)
    if l1 >= 0:
        AIM(KEPT, l1=l1, l2=l2, prune=False).check(shape)


def test_budgets_are_what_enters_the_language_model():
    assert AIM.for_budget(252) == AIM(252)
    assert AIM.for_budget(576) == AIM(576, prune=False)
    assert AIMMask.for_budget(16, 144) == AIMMask(16)
