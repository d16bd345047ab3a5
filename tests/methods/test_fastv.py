"""FastV against slow loops written from the paper, and against plausible mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import decoder_attention, embeddings, expected_logits, fastv_dropped, top
from tiny_hosts import KEPT, PATCHES, Picture, make, model_for, prompt
from torch import Tensor

from frugalvlm.methods import FastV
from frugalvlm.views import LayerView, keep_top

ROWS = [[[3, Picture(seed), 4]] for seed in range(30, 36)]


@torch.no_grad()
def shortened(
    model: Any, host: str, row: list, k: int, kept: int, score_layer: int, cut_layer: int,
    renumber: bool = False, mean_query: bool = False, text_too: bool = False,
) -> Tensor:  # fmt: skip
    """Last-token logits by running the untouched layers one by one on a sequence cut by hand."""
    embeds, places = embeddings(make("fastv"), model, host, row, [])
    maps = decoder_attention(model, embeds, score_layer)
    score = (maps[:, places[0][-1] + 1 :].mean(1) if mean_query else maps[:, -1]).mean(0).tolist()
    candidates = list(range(embeds.shape[1] - 1)) if text_too else places[0]
    stays = {candidates[i] for i in top([score[p] for p in candidates], kept)}
    keep = [p for p in range(embeds.shape[1]) if p in stays or p not in candidates]
    decoder, hidden = model.model.language_model, embeds
    positions = torch.arange(embeds.shape[1])[None]
    for index, layer in enumerate(decoder.layers):
        if index == cut_layer:
            hidden = hidden[:, keep]
            positions = torch.arange(len(keep))[None] if renumber else positions[:, keep]
        mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None, None]
        rotary = decoder.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return model.lm_head(decoder.norm(hidden))[0, -1]


def check(answer: list[Tensor], host: str, k: int) -> None:
    """Compare last-token logits of six prompts with the masked full run."""
    for logits, rows in zip(answer, ROWS, strict=True):
        expected, _ = expected_logits(
            FastV(KEPT, k), model_for(host), host, rows[0], [], [], [KEPT]
        )
        torch.testing.assert_close(
            logits, expected[0], rtol=1e-9, atol=1e-9,
            msg=lambda m: "last prompt token's attention in layer index K - 1, cut before layer "
            f"index K, positions kept: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_logits_are_those_of_the_paper(host, k):
    model, answer = model_for(host), []
    with FastV(KEPT, k).on(model), torch.no_grad():
        answer = [model(**prompt(host, rows)).logits[0, -1] for rows in ROWS]
    check(answer, host, k)


MISTAKES: dict[str, dict[str, Any]] = {
    "layer K instead of K - 1": {"score_layer": 2},
    "layer K - 2": {"score_layer": 0},
    "cut one layer late": {"cut_layer": 3},
    "cut one layer early": {"cut_layer": 1},
    "renumbered positions": {"renumber": True},
    "all text queries instead of the last": {"mean_query": True},
    "text dropped too": {"text_too": True, "kept": KEPT + 3},
    "one token more": {"kept": KEPT + 1},
}


def twin(host: str, **mistake: Any) -> list[Tensor]:
    right: dict[str, Any] = {"k": 2, "kept": KEPT, "score_layer": 1, "cut_layer": 2}
    return [shortened(model_for(host), host, rows[0], **{**right, **mistake}) for rows in ROWS]


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
def test_the_twin_is_right_without_a_mistake(host):
    check(twin(host), host, 2)


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_found(mistake, host):
    with pytest.raises(AssertionError, match="layer index K - 1"):
        check(twin(host, **MISTAKES[mistake]), host, 2)


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
def test_kept_patches_are_those_of_the_loop(host):
    model = model_for(host)
    for rows in ROWS:
        embeds, places = embeddings(make("fastv"), model, host, rows[0], [])
        dropped = fastv_dropped(model, embeds, places, 2, [KEPT])
        with FastV(KEPT).on(model) as trace, torch.no_grad():
            model(**prompt(host, rows))
        assert trace.kept == [[p - places[0][0] for p in places[0] if p not in dropped]]


def test_by_hand():
    """Two prompts of 6 and 5 tokens; the first image has 4 visual tokens, the second 3.

    Head means of the first: .2 .3 .1 .15, so 2 of 4 are 0 and 1; of the second: .1 .2 .3.
    """
    attention = torch.tensor([
        [[[0.1, 0.3, 0.2, 0.1, 0.2, 0.1]], [[0.1, 0.1, 0.4, 0.1, 0.1, 0.2]]],
        [[[0.2, 0.1, 0.2, 0.4, 0.1, 0.0]], [[0.2, 0.1, 0.2, 0.2, 0.3, 0.0]]],
    ])  # fmt: skip
    asked = []

    def attention_of(queries):
        asked.append(queries.tolist())
        return attention

    view = LayerView(
        2, torch.zeros(2, 6, 1), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 6]]), (4, 3), (1, 1), 16,
        torch.tensor([0, 1]), torch.tensor([5, 4]), attention_of,
    )  # fmt: skip
    kept = FastV(2).keep(view)
    assert asked == [[[5], [4]]], "the last token of each prompt asks"
    assert kept.counts == (2, 2)
    assert kept.index.tolist() == [[0, 1], [1, 2]]
    assert FastV(3).keep(view).index.tolist() == [[0, 1, 3], [0, 1, 2]]
    everything = FastV(16).keep(view)
    assert everything.counts == (4, 3)
    assert everything.index[0].tolist() == [0, 1, 2, 3]
    assert everything.index[1, :3].tolist() == [0, 1, 2]


def test_uneven_counts():
    score = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.4, 0.3, 0.2, -1.0]])
    kept = keep_top(score, (3, 1))
    assert kept.index[0].tolist() == [1, 2, 3]
    assert kept.index[1, :1].tolist() == [0]
    assert kept.counts == (3, 1)


def test_budgets_count_what_is_left_after_layer_k():
    assert FastV.for_budget(144) == FastV(144, 2)
    assert FastV.for_budget(PATCHES, PATCHES) == FastV(PATCHES, 2)
    model = model_for("llava_clip")
    with FastV(KEPT).on(model) as trace, torch.no_grad():
        model(**prompt("llava_clip"))
    assert trace.tokens_per_layer == [16, 16, 6, 6]
    assert trace.mean_tokens == 11
