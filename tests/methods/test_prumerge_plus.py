"""PruMerge+ against the released code's loops, fixed and adaptive, and against mistakes."""

from __future__ import annotations

import pytest
import torch
from random_views import random_view
from reference_baselines import prumerge_plus
from tiny_hosts import MANY, PATCHES, Picture, build, model_for, pictures_of, prompt
from torch import Tensor
from torch.nn.functional import normalize

from frugalvlm.hosts import host_for
from frugalvlm.methods import PruMergePlus
from frugalvlm.views import MERGED_SOURCE, EncoderView, UnsupportedError

GRID, NEAR = (5, 6), 4


def query_and_keys(view: EncoderView, crop: int) -> tuple[Tensor, Tensor]:
    """Of the next tower layer, heads side by side."""
    reads = view.following
    query = reads._queries_of(reads._hidden)[crop, :, 0].flatten()
    return query, reads._raw_keys[crop].transpose(0, 1).flatten(1)


def check(rows: list[Tensor], view: EncoderView, kept: int | None) -> None:
    """Tokens of each crop; one message per mistake."""
    for crop, own in enumerate(rows):
        query, keys = query_and_keys(view, crop)
        chosen, tokens = prumerge_plus(view.patches[crop], query, keys, kept, NEAR)
        assert len(own) == len(chosen) + 1, "outliers, supplement and one extra token"
        expected = torch.stack(tokens)
        close = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(own[-1], expected[-1], **close,
                                   msg=lambda m: f"extra: all that was not kept: {m}")  # fmt: skip
        mine, truth = (t[:-1][t[:-1, 0].argsort()] for t in (own, expected))
        torch.testing.assert_close(mine, truth, **close,
                                   msg=lambda m: f"kept plus its nearest: {m}")  # fmt: skip
        torch.testing.assert_close(own, expected, **close, msg=lambda m: f"order: {m}")


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 7, 12, 29])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_at_a_budget(kept, seed):
    view = random_view(seed, GRID)
    reduced = PruMergePlus(kept, NEAR).reduce(view)
    assert reduced.tokens.shape[1] == kept
    check(list(reduced.tokens), view, kept)
    for crop in range(2):
        chosen, _ = prumerge_plus(view.patches[crop], *query_and_keys(view, crop), kept, NEAR)
        assert reduced.source[crop].tolist() == [*chosen, MERGED_SOURCE]
        assert reduced.merged_into is not None
        gone = (reduced.merged_into[crop] == kept - 1).nonzero()[:, 0].tolist()
        assert gone == [j for j in range(30) if j not in chosen]


def adaptive(view: EncoderView) -> list[Tensor]:
    reduced = PruMergePlus(None, NEAR).reduce(view)
    assert reduced.counts is not None
    rows = zip(reduced.tokens, reduced.counts, strict=True)
    assert all((row[count:] == 0).all() for row, count in rows)
    return [row[:count] for row, count in zip(reduced.tokens, reduced.counts, strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_by_outliers(seed):
    check(adaptive(random_view(seed, GRID, crops=3)), random_view(seed, GRID, crops=3), None)


def test_outliers_by_hand():
    """2 of 36 stand out: step 18, so every 6th patch but the last place joins them."""
    logits = torch.zeros(1, 1, 37).double()
    logits[0, 0, [9, 13]] = torch.tensor([5.0, 6.0]).double()  # patches 8 and 12
    view = random_view(0, (6, 6), crops=1, heads=1)
    view.following.__dict__["cls_logits"] = logits
    reduced = PruMergePlus(None, NEAR).reduce(view)
    assert reduced.source[0].tolist() == [12, 8, 0, 6, 18, 24, 30, MERGED_SOURCE]
    assert reduced.counts == (8,)
    view.following.__dict__["cls_logits"] = torch.zeros(1, 1, 37).double()  # nothing stands out
    assert PruMergePlus(None, NEAR).reduce(view).source[0].tolist() == [0, 12, 24, MERGED_SOURCE]


def twin(view: EncoderView, kept: int, mistake: str | None) -> list[Tensor]:
    """PruMerge+ once more, with one mistake."""
    answer = []
    for crop in range(view.crops):
        reads = view if mistake == "layer of the features" else view.following
        heads = reads.cls_logits[crop]
        a = (heads.sum(0) * 4**-0.5).softmax(-1)[1:]
        if mistake == "heads apart":
            a = (heads * 2**-0.5).softmax(-1).mean(0)[1:]
        if mistake == "[CLS] left out":
            a = (heads.sum(0) * 4**-0.5)[1:].softmax(-1)
        keys = normalize(reads.keys[crop].transpose(0, 1).flatten(1), dim=-1)
        if mistake == "features instead of keys":
            keys = normalize(view.patches[crop], dim=-1)
        top = a.argsort(descending=True)[: kept // 2].tolist()
        rest = [j for j in range(30) if j not in top]
        more = (kept - 1) // 2
        extra = [rest[(2 * i + 1) * len(rest) // (2 * more)] for i in range(more)]
        if mistake == "supplement by attention":
            extra = a.argsort(descending=True)[kept // 2 : kept - 1].tolist()
        chosen = top + extra
        if mistake == "raster order":
            chosen = sorted(chosen)
        others = [j for j in range(30) if j not in chosen]
        similarity = keys @ keys.T - 9 * torch.eye(30)
        if mistake == "kept ones do not count":
            similarity[:, chosen] = -9
        tokens = []
        for i in chosen:
            near = similarity[i].topk(NEAR).indices
            weights = a[near] / a[near].sum() if mistake == "weights add up to one" else a[near]
            own = view.patches[crop, i] * (mistake != "neighbours alone")
            tokens.append(own + weights @ view.patches[crop, near])
        left = a[others] @ view.patches[crop, others]
        if mistake == "extra is a mean":
            left = left / a[others].sum()
        if mistake != "no extra":
            tokens.append(left)
        answer.append(torch.stack(tokens))
    return answer


MISTAKES = {
    "layer of the features": "extra",
    "heads apart": "extra",
    "[CLS] left out": "extra",
    "features instead of keys": "nearest",
    "supplement by attention": "extra",
    "raster order": "order",
    "kept ones do not count": "nearest",
    "weights add up to one": "nearest",
    "neighbours alone": "nearest",
    "extra is a mean": "extra",
    "no extra": "one extra token",
}


def test_the_twin_is_right_without_a_mistake():
    check(twin(random_view(0, GRID), 9, None), random_view(0, GRID), 9)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_mistake_is_found(mistake, seed):
    view = random_view(seed, GRID)
    with pytest.raises(AssertionError, match=MISTAKES[mistake]):
        check(twin(view, 9, mistake), view, 9)


@pytest.mark.parametrize("host", ["llava_clip", "llava_next"])
def test_adaptive_counts_on_a_model(host):
    """Pictures keep different numbers; the trace says so, and a batch equals its items."""
    model, batch, method = model_for(host), prompt(host, MANY), PruMergePlus(None, 2)
    settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True,
                "return_dict_in_generate": True}  # fmt: skip
    with method.on(model) as trace:
        together = torch.stack(model.generate(**batch, **settings).logits, 1)
        low, high = trace.spread[0]
        assert low < high
        assert low < trace.mean_tokens < high
        kept = trace.kept
        for index, row in enumerate(MANY):
            alone = torch.stack(model.generate(**prompt(host, [row]), **settings).logits, 1)
            torch.testing.assert_close(together[index], alone[0], rtol=1e-6, atol=1e-6)
            crops = sum(p.crops(host) for p in pictures_of(row))
            if crops:
                assert kept[:crops] == trace.kept
                kept = kept[crops:]


def test_adaptive_counts_without_values_are_refused():
    with torch.device("meta"):
        model = build("llava_clip")
    inputs = prompt("llava_clip", [[2, Picture(1), 3]], dtype=torch.float32)
    mask = inputs["input_ids"] == 60
    meta = {"input_ids": inputs["input_ids"].to("meta"),
            "pixel_values": inputs["pixel_values"].to("meta")}  # fmt: skip
    with (
        PruMergePlus(None, 2).on(model, placeholders=mask),
        pytest.raises(UnsupportedError, match="set kept_tokens"),
    ):
        model(**meta)


def test_features_of_the_last_layer_have_no_next_layer():
    model = build("llava_clip")
    model.config.vision_feature_layer = -1
    with (
        pytest.raises(UnsupportedError, match="earlier vision_feature_layer"),
        PruMergePlus(6, 2).on(model),
    ):
        pass


def test_budgets():
    """k keeps its share of the patches; half of the released 144 come from the supplement."""
    assert PruMergePlus.for_budget(145) == PruMergePlus(145, 32)
    assert PruMergePlus.for_budget(16, 144) == PruMergePlus(16, 8)
    assert PruMergePlus.for_budget(PATCHES, PATCHES).neighbours == 1


def test_a_thin_picture_in_tiles_loses_its_margins_first():
    """It would keep more than the model itself leaves of it; others of the batch are untouched."""
    model, method = model_for("llava_next"), PruMergePlus(neighbours=3)
    thin, square = Picture(0, 96, 12), Picture(1)
    host = host_for(model)
    rows = [[3, thin, 4], [2, square, 5]]
    with method.on(model) as trace, torch.no_grad():
        alone = []
        for row in rows:
            logits = model(**prompt("llava_next", [row])).logits[0, -1]
            alone.append((logits, trace.kept, trace.tokens_per_layer[0]))
        batch = model(**prompt("llava_next", rows)).logits[:, -1]
        assert trace.kept == alone[0][1] + alone[1][1]
        inputs = prompt("llava_next", rows[:1])
        image = host.images(inputs["input_ids"] == 60, inputs)[0]
        inside = set(host.origin(image))
        kept = alone[0][1]
        assert all(n * PATCHES + k in inside for n, crop in enumerate(kept) for k in crop)
        assert alone[0][2] == sum(map(len, kept)) + len(kept), "one merged token of every crop"
        assert alone[0][2] < thin.tokens("llava_next")
    torch.testing.assert_close(batch, torch.stack([a[0] for a in alone]), rtol=1e-4, atol=1e-4)
