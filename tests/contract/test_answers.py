"""What methods answer is well formed, and the contracts tell a wrong method that they do not know.

Contracts of a method without a reference of its own hold it against its own answers. Here right and
wrong methods of every kind are registered for the time of a test and put through them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch
from reference_answers import check_kept, check_reduced, listening
from tiny_hosts import MANY, ONE, OWN_REFERENCE, PAIRS, make, model_for, prompt

from frugalvlm.methods import METHODS, LayerReducer
from frugalvlm.methods.base import SizedReducer, check_budget
from frugalvlm.views import MERGED_SOURCE, Kept, LayerView, Reduced, keep_top

sys.path.insert(0, str(Path(__file__).parent))
import test_batches as batches
import test_equivalence as equivalence


@pytest.mark.parametrize(("key", "host"), PAIRS)
def test_answers_are_well_formed(key, host):
    method, model = make(key), model_for(host)
    with listening(method) as answers, method.on(model), torch.no_grad():
        model(**prompt(host, MANY))
    assert answers.reduced or answers.kept or key == "vanilla"
    for view, reduced in answers.reduced:
        check_reduced(key, view, reduced)
    for layer_view, kept in answers.kept:
        check_kept(layer_view, kept, least=key != "dyvte")  # it may leave nothing


def contracts(key: str, host: str = "llava_clip") -> None:
    """A selection: identity, masked run, exact counts, well-formed answers, batches."""
    test_answers_are_well_formed(key, host)
    equivalence.test_the_requested_count_is_the_actual_count(key, host, ONE)
    equivalence.test_the_requested_count_is_the_actual_count(key, host, MANY)
    equivalence.test_keeping_everything_is_the_identity(key, host, MANY)
    equivalence.test_pruned_run_equals_the_full_run_with_hidden_keys(key, host, MANY)
    equivalence.test_the_reference_tells_a_wrong_run_apart(key, host)
    equivalence.test_text_tokens_before_the_image_are_untouched(key, host)
    batches.test_a_padded_batch_equals_its_items(key, host, "left")


@dataclass(frozen=True)
class Longest(SizedReducer):
    """Right: the longest features, in raster order; the mean of all others as one token more."""

    key: ClassVar[str] = "longest"
    kept_tokens: int

    def reduce(self, view):
        if self.kept_tokens == view.patch_count:
            every = torch.arange(view.patch_count)
            return Reduced(view.patches, every.expand(view.crops, -1))
        order = view.patches.norm(dim=-1).argsort(-1, descending=True)
        return self.answer(view, order[:, : self.kept_tokens - 1].sort(-1).values)

    def answer(self, view, index):
        picked = view.patches.gather(1, index[..., None].expand(-1, -1, view.patches.shape[-1]))
        rest = (view.patches.sum(1) - picked.sum(1)) / max(1, view.patch_count - index.shape[1])
        slot = torch.full_like(index[:, :1], MERGED_SOURCE)
        return Reduced(torch.cat([picked, rest[:, None]], 1), torch.cat([index, slot], 1))


class OneTooMany(Longest):
    """Wrong: a token above the budget."""

    def answer(self, view, index):
        full = super().answer(view, index)
        tokens, source = full.tokens[:, :1] * 0.5, torch.full_like(index[:, :1], MERGED_SOURCE)
        return Reduced(torch.cat([full.tokens, tokens], 1), torch.cat([full.source, source], 1))


class Unsorted(Longest):
    """Wrong: by score, not in raster order."""

    def answer(self, view, index):
        return super().answer(view, index.flip(-1))


class Twice(Longest):
    """Wrong: one patch in two places."""

    def answer(self, view, index):
        return super().answer(view, torch.cat([index[:, :1], index[:, :-1]], 1))


class ByTheBatch(Longest):
    """Wrong: what it keeps of a picture depends on the pictures beside it."""

    def reduce(self, view):
        if self.kept_tokens == view.patch_count:
            return super().reduce(view)
        order = view.patches.norm(dim=-1).sum(0).argsort(descending=True)
        kept = order[: self.kept_tokens - 1].sort().values
        return self.answer(view, kept.expand(view.crops, -1))


@dataclass(frozen=True)
class TwoCuts(LayerReducer):
    """Right: half between budget and all before layer 1, the budget before layer 2; positions move.

    The last token of each image takes on the mean of what was dropped.
    """

    key: ClassVar[str] = "two_cuts"
    renumbers: ClassVar[bool] = True
    kept_tokens: int

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens)

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        return (1, 2)

    def keep(self, view: LayerView) -> Kept:
        goal = self.kept_tokens if view.layer == 2 else (self.kept_tokens + view.patches) // 2
        kept = keep_top(view.last_token_attention.mean(1), view.per_crop(goal))
        if kept.counts == view.counts:
            return kept
        return self.recycled(view, kept)

    def recycled(self, view: LayerView, kept: Kept) -> Kept:
        width = view.tokens.shape[-1]
        values = view.tokens.gather(1, kept.index[..., None].expand(-1, -1, width)).clone()
        holds = kept.index.clone()
        for image, (count, there) in enumerate(zip(kept.counts, view.counts, strict=True)):
            own = set(kept.index[image, :count].tolist())
            if len(own) < there:
                rest = [i for i in range(there) if i not in own]
                values[image, count - 1] = view.tokens[image, rest].mean(0)
                holds[image, count - 1] = MERGED_SOURCE
        return Kept(kept.index, kept.counts, values, holds)


class CutOneTooMany(TwoCuts):
    """Wrong: a token above the budget."""

    def keep(self, view):
        more = self.kept_tokens + (self.kept_tokens < view.patches)
        return TwoCuts.keep(replace(self, kept_tokens=more), view)


class CutUnsorted(TwoCuts):
    """Wrong: by score."""

    def recycled(self, view, kept):
        return super().recycled(view, Kept(kept.index.flip(-1), kept.counts))


class CutTwice(TwoCuts):
    """Wrong: one token in two places."""

    def recycled(self, view, kept):
        index = torch.cat([kept.index[:, :1], kept.index[:, :-1]], 1)
        return Kept(index, kept.counts)


class CutByRow(TwoCuts):
    """Wrong: the second image of a batch is scored by the attention that the first one gets."""

    def keep(self, view):
        goal = self.kept_tokens if view.layer == 2 else (self.kept_tokens + view.patches) // 2
        score = view.last_token_attention.mean(1)
        return keep_top(score.mean(0, keepdim=True).expand_as(score), view.per_crop(goal))


RIGHT = (Longest, TwoCuts)
WRONG = {
    OneTooMany: None,  # where counts are compared
    Unsorted: "raster order",
    Twice: "twice",
    ByTheBatch: None,
    CutOneTooMany: "a budget is what the last cut leaves",
    CutUnsorted: "not in order",
    CutTwice: "kept twice",
    CutByRow: None,
}


@pytest.mark.parametrize("host", ["llava_clip", "llava_next"])
@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_method_that_the_contracts_do_not_know_passes(kind, host, monkeypatch):
    monkeypatch.setitem(METHODS, kind.key, kind)
    assert kind.key not in OWN_REFERENCE
    contracts(kind.key, host)


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_method_that_the_contracts_do_not_know_is_rejected(kind, monkeypatch):
    monkeypatch.setitem(METHODS, kind.key, kind)
    with pytest.raises(AssertionError, match=WRONG[kind]):
        contracts(kind.key)
