"""VisionZip against a slow loop written from the paper, and against plausible mistakes."""

from __future__ import annotations

import pytest
import torch
from reference import visionzip_tokens
from tiny_hosts import PATCHES
from torch import Tensor

from frugalvlm.methods import VisionZip, VisionZipMean
from frugalvlm.views import CLS_SOURCE, MERGED_SOURCE, EncoderView

WIDTH, HEADS = 3, 2


def view_of(seed: int, patches: int = PATCHES, has_cls: bool = True) -> EncoderView:
    """A view with random features, attention and keys; no model behind it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first = int(has_cls)
    features, keys = noise(2, first + patches, WIDTH), noise(2, HEADS, first + patches, 2)
    keys = keys * noise(2, 1, first + patches, 1).exp()  # lengths differ, so cosine matters
    queries = noise(2, HEADS, first + patches, 2)
    return EncoderView(
        features[:, first:], features[:, :1] if has_cls else None, (4, patches // 4), features,
        lambda rows: queries[:, :, : rows.shape[1]], keys, 1.5, None,
    )  # fmt: skip


def maps_of(view: EncoderView) -> Tensor:
    """The whole attention map, from the same queries and keys."""
    queries = view._queries_of(view._hidden)
    return torch.softmax(queries @ view._raw_keys.mT * view._scale, -1)


def features_of(view: EncoderView) -> Tensor:
    return torch.cat([view.cls, view.patches], 1) if view.has_cls else view.patches


def check(answer: list[Tensor], view: EncoderView, dominant: int, contextual: int, mean: bool):
    """Compare tokens [kept, width] of each crop with the loop; one message per mistake."""
    first = int(view.has_cls)
    expected = visionzip_tokens(
        features_of(view), maps_of(view), view._raw_keys, view.has_cls, dominant, contextual, mean
    )
    for tokens, truth in zip(answer, expected, strict=True):
        rows = torch.stack([vector for _, _, vector in truth])
        assert len(tokens) == dominant + contextual, "count: D includes [CLS]"
        assert not first or torch.equal(tokens[0], rows[0]), "[CLS] comes first"
        mine, paper = tokens[first:dominant], rows[first:dominant]

        def lines(t):
            return sorted(map(tuple, t.tolist()))

        assert lines(mine) == lines(paper), "dominant: the top of the [CLS] attention"
        assert torch.equal(mine, paper), "dominant: raster order, not score order"
        torch.testing.assert_close(
            tokens[dominant:], rows[dominant:], rtol=1e-12, atol=1e-12,
            msg=lambda m: f"contextual: target plus mean of those that joined it: {m}",
        )  # fmt: skip


CASES = [(4, 2), (6, 3), (9, 1), (2, 5), (5, 0), (1, 3), (1, 0), (8, 7)]


@pytest.mark.parametrize(("dominant", "contextual"), CASES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [VisionZip, VisionZipMean])
def test_tokens_are_those_of_the_paper(kind, dominant, contextual, seed):
    view = view_of(seed)
    reduced = kind(dominant, contextual).reduce(view)
    check(list(reduced.tokens), view, dominant, contextual, kind is VisionZipMean)


@pytest.mark.parametrize(("dominant", "contextual"), CASES)
@pytest.mark.parametrize("seed", range(2))
def test_tokens_without_cls(dominant, contextual, seed):
    """SigLIP: score by received attention; D patches, no [CLS] among them."""
    view = view_of(seed, has_cls=False)
    reduced = VisionZip(dominant, contextual).reduce(view)
    check(list(reduced.tokens), view, dominant, contextual, False)


def twin(view: EncoderView, dominant: int, contextual: int, mistake: str | None) -> list[Tensor]:
    """VisionZip once more, in another way, with one mistake."""
    answer = []
    for crop in range(view.crops):
        patches, features = view.patch_count, view.patches[crop]
        score = view.cls_attention[crop].sum(0)
        if mistake == "received attention":
            score = view.received_attention[crop]
        if mistake == "one head only":
            score = view.cls_attention[crop, 0]
        count = dominant - 1 + (mistake == "[CLS] on top of D")
        chosen = score.topk(count).indices
        if mistake != "score order":
            chosen = chosen.sort().values
        rest = torch.tensor([j for j in range(patches) if j not in chosen.tolist()])
        pool = torch.arange(patches) if mistake == "targets from all patches" else rest
        target = pool[:: max(1, len(pool) // contextual)][:contextual]
        if mistake == "targets at the end of each step":
            target = pool[len(pool) // contextual - 1 :: len(pool) // contextual][:contextual]
        if mistake == "most attended targets":
            target = pool[score[pool].topk(contextual).indices.sort().values]
        keys = view.keys[crop].mean(0)
        if mistake == "heads side by side":
            keys = view.keys[crop].transpose(0, 1).flatten(1)
        if mistake == "features instead of keys":
            keys = features
        if mistake != "dot product":
            keys = keys / keys.norm(dim=-1, keepdim=True)
        merged = []
        closest = (keys @ keys[target].T).argmax(-1)
        for slot, t in enumerate(target.tolist()):
            group = [j for j in rest.tolist() if j not in target.tolist() and closest[j] == slot]
            if mistake in ("target in its own mean", "mean of the group"):
                group = [t, *group]
            mean = features[group].mean(0) if group else torch.zeros(WIDTH, dtype=torch.float64)
            merged.append(mean if mistake == "mean of the group" else features[t] + mean)
        parts = [view.cls[crop], features[chosen], torch.stack(merged)]
        if mistake == "[CLS] last":
            parts = [*parts[1:2], view.cls[crop], parts[2]]
        if mistake == "contextual first":
            parts = [parts[0], parts[2], parts[1]]
        answer.append(torch.cat(parts))
    return answer


MISTAKES = {
    "[CLS] on top of D": "count",
    "[CLS] last": r"\[CLS\] comes first",
    "received attention": "top of the",
    "one head only": "top of the",
    "contextual first": "top of the",
    "score order": "raster order",
    "targets from all patches": "target plus mean",
    "targets at the end of each step": "target plus mean",
    "most attended targets": "target plus mean",
    "heads side by side": "target plus mean",
    "features instead of keys": "target plus mean",
    "dot product": "target plus mean",
    "target in its own mean": "target plus mean",
    "mean of the group": "target plus mean",
}


def test_the_twin_is_right_without_a_mistake():
    check(twin(view_of(0), 4, 2, None), view_of(0), 4, 2, False)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("seed", [0, 3])
def test_every_mistake_is_found(mistake, seed):
    view = view_of(seed)
    with pytest.raises(AssertionError, match=MISTAKES[mistake]):
        check(twin(view, 4, 2, mistake), view, 4, 2, False)


def test_the_true_mean_is_another_method():
    view = view_of(0)
    with pytest.raises(AssertionError, match="target plus mean"):
        check(list(VisionZip(4, 2).reduce(view).tokens), view, 4, 2, True)
    assert (VisionZip.key, VisionZipMean.key) == ("visionzip", "visionzip_mean")


def test_by_hand():
    """Six patches, one head: D = 2 keeps [CLS] and patch 3; rest 0 1 2 4 5; step 2; targets 0, 2.

    Keys point along x for 0 and 4, along y for 2, 1 and 5: 4 joins 0; 1 and 5 join 2.
    """
    features = torch.tensor([[[100.0], [1.0], [2.0], [4.0], [8.0], [16.0], [32.0]]])
    directions = [[1, 1], [9, 0], [0, 1], [0.1, 5], [7, 7], [1, 0], [0, 3]]
    keys = torch.tensor([[directions]], dtype=torch.float64)
    view = EncoderView(
        features[:, 1:],
        features[:, :1],
        (2, 3),
        features,
        lambda r: keys[:, :, :1],
        keys,
        1.0,
        None,
    )
    view.__dict__["cls_attention"] = torch.tensor([[[0.1, 0.2, 0.1, 0.5, 0.05, 0.05]]])
    view.__dict__["_raw_keys"] = keys
    reduced = VisionZip(2, 2).reduce(view)
    assert reduced.tokens.flatten().tolist() == [100.0, 8.0, 1.0 + 16.0, 4.0 + (2.0 + 32.0) / 2]
    assert reduced.source.tolist() == [[CLS_SOURCE, 3, MERGED_SOURCE, MERGED_SOURCE]]
    assert reduced.merged_into is not None
    assert reduced.merged_into.tolist() == [[2, 3, 3, -1, 2, 3]]
    mean = VisionZipMean(2, 2).reduce(view)
    assert mean.tokens.flatten().tolist() == pytest.approx([100.0, 8.0, 17 / 2, (4 + 2 + 32) / 3])


@pytest.mark.parametrize(
    ("dominant", "contextual", "rest", "step", "last"),
    [(54, 10, 523, 52, 468), (108, 20, 469, 23, 437), (162, 30, 415, 13, 377),
     (27, 5, 550, 110, 440)],
)  # fmt: skip
def test_target_positions_of_the_papers_budgets(dominant, contextual, rest, step, last):
    """With equal keys everything joins the first target; each other target is alone."""
    features, keys = torch.zeros(1, 577, 1), torch.ones(1, 1, 577, 2)
    view = EncoderView(
        features[:, 1:],
        features[:, :1],
        (24, 24),
        features,
        lambda r: keys[:, :, :1],
        keys,
        1.0,
        None,
    )
    view.__dict__["cls_attention"] = torch.arange(576, 0, -1.0)[None, None]
    reduced = VisionZip(dominant, contextual).reduce(view)
    assert reduced.merged_into is not None
    groups = reduced.merged_into[0]
    others = (groups >= 0).nonzero()[:, 0] - (dominant - 1)  # places in the remaining list
    assert len(others) == rest
    alone = [
        int((groups == dominant + slot).nonzero()[0]) - (dominant - 1) for slot in range(contextual)
    ]
    assert alone == [slot * step for slot in range(contextual)]
    assert alone[-1] == last
    assert reduced.tokens.shape[1] == dominant + contextual


def test_budgets_of_the_paper():
    pairs = {192: (162, 30), 128: (108, 20), 64: (54, 10), 32: (27, 5)}
    for budget, pair in pairs.items():
        assert VisionZip.for_budget(budget) == VisionZip(*pair)
        assert VisionZipMean.for_budget(budget) == VisionZipMean(*pair)
    # LLaVA-NeXT's 640, 320 and 160 are 5 crops of these.
    assert [5 * n for n in (128, 64, 32)] == [640, 320, 160]
    assert VisionZip.for_budget(16, 144) == VisionZip(14, 2)
    assert VisionZip.for_budget(1, 144) == VisionZip(1, 0)
    for budget in range(1, 145):
        method = VisionZip.for_budget(budget, 144)
        assert method.dominant + method.contextual == budget


def test_keeping_everything_merges_nothing():
    view = view_of(0)
    reduced = VisionZip(PATCHES, 0).reduce(view)
    assert torch.equal(reduced.tokens, view.patches)
    assert reduced.source.tolist() == [list(range(PATCHES))] * 2


def test_merging_has_gradients():
    view = view_of(1)
    view.patches.requires_grad_()
    VisionZip(4, 2).reduce(view).tokens.sum().backward()
    assert (view.patches.grad != 0).all(), "a merged or dominant patch gets no gradient"
