"""SparseVLM against slow loops written from the released code, and against plausible mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_inside import sparse_clusters, sparse_raters, sparse_step
from tiny_hosts import LAYERS, PATCHES, Picture, cache_lengths, model_for, prompt
from torch import Tensor

from frugalvlm.methods import SparseVLM, SparseVLMRank, sparsevlm
from frugalvlm.views import MERGED_SOURCE, LayerView, Shape, Text, UnsupportedError

WIDTH, BEFORE, AFTER = 4, 3, 6
RULE = "raters above the mean rate, the best stay, density peaks of the best 30 % of the rest"


def view_of(seed: int, counts: tuple[int, ...] = (60, 60), layer: int = 3) -> LayerView:
    """Prompts of three words, an image and six words, with random states and attention."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    images, most = len(counts), max(counts)
    length = BEFORE + most + AFTER
    maps = noise(images, 2, length, length).mul(2).softmax(-1)
    visual = torch.full((images, most), length)
    words = torch.zeros(images, AFTER, dtype=torch.long)
    for i, n in enumerate(counts):
        visual[i, :n] = torch.arange(BEFORE, BEFORE + n)
        words[i] = torch.arange(BEFORE + n, BEFORE + n + AFTER)
    embedded, text = noise(images, most, WIDTH), noise(images, AFTER, WIDTH)
    behind = torch.ones(images, AFTER, dtype=torch.bool)
    return LayerView(
        layer, noise(images, length, WIDTH), visual, counts, (1,) * images, 64,
        torch.arange(images), torch.full((images,), length - 1),
        lambda q: maps.gather(2, q[:, None, :, None].expand(-1, 2, -1, length)), 32, counts,
        None, lambda: Text(words, behind, text, embedded),
    )  # fmt: skip


def by_loops(view: LayerView, kept: Any, mistake: str = "") -> list[list[Tensor]]:
    """The image's tokens behind the cut; `kept` is K or a function of an attention map."""
    text, answer = view.text, []
    for i, n in enumerate(view.counts):
        asked = sparse_raters(text.visual[i, :n], text.embeddings[i])
        if mistake == "all words":
            asked = list(range(AFTER))
        if mistake == "the other words":
            asked = [t for t in range(AFTER) if t not in asked]
        if mistake == "last word":
            asked = [AFTER - 1]
        rows = view._attention_of(text.index)[i][:, asked]
        rows = rows[:, :, view.visual[i, :n]]
        rows = rows.amax(0) if mistake == "largest head" else rows.mean(0)
        tokens = [view.tokens[i, j] for j in range(n)]
        scores = rows.mean(0).tolist()
        stays, merged = sparse_step(tokens, scores, kept(rows) if callable(kept) else kept)
        worst = sorted(range(n), key=lambda j: scores[j])
        if mistake == "the worst are recycled":
            merged = sparse_clusters(
                [tokens[j] for j in worst[: len(worst) * 3 // 10]], len(merged)
            )
        if mistake == "nothing is recycled":
            merged = []
        if mistake == "clusters are summed":
            merged = [2 * token for token in merged]
        if mistake == "recycled first":
            answer.append([*merged, *(tokens[j] for j in stays)])
        else:
            answer.append([*(tokens[j] for j in stays), *merged])
    return answer


def check(answer: list[Tensor], truth: list[list[Tensor]]) -> None:
    for mine, paper in zip(answer, truth, strict=True):
        assert len(mine) == len(paper), RULE
        torch.testing.assert_close(
            mine, torch.stack(paper), rtol=1e-9, atol=1e-9, msg=lambda m: f"{RULE}: {m}"
        )


def tokens_of(view: LayerView, method: SparseVLM) -> list[Tensor]:
    kept = method.keep(view)
    if kept.values is None:
        return [view.tokens[i, kept.index[i, :n]] for i, n in enumerate(kept.counts)]
    return [kept.values[i, :n] for i, n in enumerate(kept.counts)]


@pytest.mark.parametrize("kept", [1, 5, 20, 57, 59])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("counts", [(60, 60), (60, 41)])
def test_tokens_are_those_of_the_loop(kept, seed, counts):
    view = view_of(seed, counts)
    check(tokens_of(view, SparseVLM((kept,) * 3)), by_loops(view, kept))


MISTAKES = (
    "all words", "the other words", "last word", "largest head", "the worst are recycled",
    "nothing is recycled", "clusters are summed", "recycled first",
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_found(mistake):
    view = view_of(1)
    truth = by_loops(view, 20)
    wrong = [torch.stack(tokens) for tokens in by_loops(view, 20, mistake)]
    with pytest.raises(AssertionError, match="raters above the mean"):
        check(wrong, truth)
    with pytest.raises(AssertionError, match="raters above the mean"):
        check(tokens_of(view, SparseVLM((20,) * 3)), by_loops(view, 20, mistake))


def test_by_hand():
    """Two words; the first is the image's. Four tokens, one stays, of three one is recycled."""
    embedded = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]])
    words = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    hidden = torch.arange(14.0).view(1, 7, 2)
    maps = torch.zeros(1, 1, 7, 7)
    maps[0, 0, 5] = torch.tensor([0.1, 0.2, 0.4, 0.1, 0.15, 0.05, 0.0])  # the first word
    maps[0, 0, 6] = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.90, 0.0, 0.0])
    text = Text(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool), words, embedded)
    view = LayerView(
        3, hidden, torch.tensor([[1, 2, 3, 4]]), (4,), (1,), 16, torch.tensor([0]),
        torch.tensor([6]), lambda q: maps.gather(2, q[:, None, :, None].expand(-1, 1, -1, 7)), 32,
        (4,), None, lambda: text,
    )  # fmt: skip
    kept = SparseVLM((1, 1, 1)).keep(view)
    assert kept.counts == (2,)
    assert kept.holds.tolist() == [[1, MERGED_SOURCE]]
    assert kept.values.tolist() == [[[4.0, 5.0], [2.0, 3.0]]]  # the second best is its own cluster


def test_clusters_by_hand():
    """Two tight groups, two clusters: the second centre is not the first one's neighbour."""
    places = (0.0, 5.0, 0.125, 5.125, 0.25, 5.25)
    tokens = torch.tensor([[[x, 0.0] for x in places]], dtype=torch.float64)
    for means in (sparse_clusters(list(tokens[0]), 2), sparsevlm._clustered(tokens, 2)[0]):
        assert [float(t[0]) for t in means] == pytest.approx([0.125, 5.125])


def test_a_word_alone_rates():
    view = view_of(0)
    text = view.text
    one = torch.zeros_like(text.behind)
    one[:, 2] = True
    view.text = Text(text.index, one, text.embeddings, text.visual)
    attention = view.attention_from(text.index).mean(1)[:, 2]
    expected = attention.topk(7, dim=-1).indices.sort(-1).values
    assert torch.equal(SparseVLM((7, 7, 7)).keep(view).holds[:, :7], expected)


def test_released_budgets_and_layers():
    assert SparseVLM.for_budget(192).kept == (300, 200, 110)
    assert SparseVLM.for_budget(128).kept == (303, 110, 36)
    assert SparseVLM.for_budget(64).kept == (66, 30, 17)
    assert SparseVLM.for_budget(48, 144).kept == (75, 50, 28)
    assert SparseVLM.for_budget(576).kept == (576, 576, 576)
    assert SparseVLM.for_budget(1).kept == (1, 1, 1)
    method = SparseVLM.for_budget(64)
    # The released code prunes behind layers 2, 6 and 15 of 32.
    assert method.layers(32) == (3, 7, 16)
    assert method.layers(12) == (1, 3, 6)
    assert method.layers(4) == (1, 2, 3)
    assert method.layers(2) == (1,)
    assert SparseVLMRank.for_budget(192).layers(32) == (3, 7, 16, 20)
    assert SparseVLMRank.for_budget(192) == SparseVLMRank(scale=13.5)
    assert SparseVLMRank.for_budget(128) == SparseVLMRank(scale=9.0, bias=6.0)
    assert SparseVLMRank.for_budget(48, 144) == SparseVLMRank(scale=3.375)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("scale", "bias"), [(2.0, 1.0), (13.5, 0.0), (0.3, 0.0)])
def test_the_rank_version_keeps_what_the_rank_says(seed, scale, bias):
    view = view_of(seed)
    for i, word in enumerate((1, 3)):  # two words that look alike lower the rank
        maps = view._attention_of(view.text.index)
        maps[i, :, word] = maps[i, :, 0]
    view._attention_of = lambda q, maps=maps: maps
    ranks = []

    def kept(rows: Tensor) -> int:
        ranks.append(int(torch.linalg.matrix_rank(rows.float())))
        return min(int(ranks[-1] * scale + bias), 60)

    check(tokens_of(view, SparseVLMRank(scale=scale, bias=bias)), by_loops(view, kept))
    assert all(0 < rank < AFTER for rank in ranks)


def test_rank_is_not_the_number_of_raters():
    """The twin that counts raters instead must be rejected."""
    view = view_of(0)
    same = view._attention_of(view.text.index)[:, :, :1].expand(-1, -1, AFTER, -1)
    view._attention_of = lambda q: same  # every word asks alike: rank 1
    assert SparseVLMRank(scale=3.0).keep(view).holds.ge(0).sum(1).tolist() == [3, 3]


def test_positions_close_the_gaps():
    """Recycling only: with ids as they were, the logits would differ."""
    model, method = model_for("llava_clip"), SparseVLM((9, 6, 3))

    class Numbered(SparseVLM):
        renumbers = False

    inputs = prompt("llava_clip", [[3, Picture(1), 5]])
    logits = []
    for each in (method, Numbered(method.kept)):
        with each.on(model) as trace, torch.no_grad():
            out = model(**inputs)
            logits.append(out.logits[0, -1])
            length = inputs["input_ids"].shape[1]
            expected = [length - PATCHES + t for t in trace.tokens_per_layer]
            assert cache_lengths(out.past_key_values) == expected
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_a_picture_behind_all_words_is_rated_by_the_last_token():
    model = model_for("llava_clip")
    with SparseVLM((9, 6, 3)).on(model) as trace, torch.no_grad():
        logits = model(**prompt("llava_clip", [[4, Picture(1)]])).logits
    assert torch.isfinite(logits).all()
    assert trace.tokens_per_layer[-1] == 4


@pytest.mark.parametrize("kept", [(5, 5), (0, 5, 5), (17, 5, 5), (5, 5, 5, 5)])
def test_impossible_schedules_are_refused(kept):
    with pytest.raises(ValueError):
        SparseVLM(kept).check(Shape(PATCHES, (4, 4), LAYERS, True))


def test_what_cannot_be_is_refused():
    with pytest.raises(UnsupportedError, match="before it, such as visionzip"):
        SparseVLM((5, 5, 5)).check(Shape(PATCHES, (4, 4), 1, True))
    with pytest.raises(UnsupportedError, match="keeps nothing"):
        SparseVLMRank(scale=0.0)
