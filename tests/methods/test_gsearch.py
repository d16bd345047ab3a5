"""G-Search against slow loops written from the paper, and against plausible mistakes."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from reference_schedules import Choose
from schedule_checks import check_logits, logits_by_loops, logits_by_method
from tiny_hosts import PATCHES, model_for
from torch import Tensor

from frugalvlm.methods import FastV, GSearch
from frugalvlm.methods.gsearch import K_32, LLAVA_15_7B, p_sigmoid, printed_k
from frugalvlm.papers import load_paper
from frugalvlm.views import BudgetError, LayerView, Shape, Text, UnsupportedError

SCHEDULE = (16, 16, 10, 4)
RATES = (1.0, 1.0, 0.66, 0.3)  # 0.66 of 16 is 10.56, 0.3 is 4.8: both are rounded down
SHAPE = Shape(576, (24, 24), 32, True)
RULE = (
    "the text's mean attention in the layer before, among tokens still there, floor(r_i N) of "
    "them, positions kept"
)


def chooser(
    places: list[int], length: int, schedule: tuple[int, ...] = SCHEDULE, maps: str = "front",
    rows: str = "text", of_first_ranking: bool = False,
) -> Choose:  # fmt: skip
    """What goes before each layer, one token at a time; the arguments are mistakes to make."""
    first: dict[int, float] = {}

    def choose(index: int, front: Tensor, here: Tensor, gone: set[int]) -> set[int]:
        left = [p for p in places if p not in gone]
        if schedule[index] >= len(left):
            return set()
        asks = {
            "text": range(places[-1] + 1, length),
            "last": [length - 1],
            "all": range(length),
        }[rows]
        used = front if maps == "front" else here
        score = {p: sum(float(used[:, row, p].mean()) for row in asks) for p in left}
        if of_first_ranking:
            first.update({} if first else score)
            score = first
        return set(sorted(left, key=lambda p: -score[p])[schedule[index] :])

    return choose


def by_loops(host: str, renumber: bool = False, **mistake: Any) -> list[Tensor]:
    return logits_by_loops(host, partial(chooser, **mistake), renumber)


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
def test_logits_are_those_of_the_paper(host):
    answer, trace = logits_by_method(GSearch(rates=RATES), host)
    assert trace.tokens_per_layer == list(SCHEDULE)
    check_logits(answer, by_loops(host), RULE)


MISTAKES: dict[str, dict[str, Any]] = {
    "the layer's own attention": {"maps": "here"},
    "the last token alone": {"rows": "last"},
    "visual tokens ask too": {"rows": "all"},
    "one ranking for all layers": {"of_first_ranking": True},
    "rates relative to the layer before": {"schedule": (16, 16, 10, 3)},
    "rounded, not floored": {"schedule": (16, 16, 11, 5)},
    "one layer late": {"schedule": (16, 16, 16, 10)},
    "one layer early": {"schedule": (16, 10, 4, 4)},
    "renumbered positions": {"renumber": True},
}


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_found(mistake, host):
    with pytest.raises(AssertionError, match="the text's mean attention"):
        check_logits(by_loops(host, **MISTAKES[mistake]), by_loops(host), RULE)


def test_the_last_token_alone_is_an_option():
    answer, _ = logits_by_method(GSearch(rates=RATES, queries="last"), "llava_clip")
    check_logits(answer, by_loops("llava_clip", rows="last"), "the last token's attention")


def test_by_hand():
    """Two prompts; the first image is followed by two text tokens, the second by one.

    Visual tokens 1, 2, 3. First: head means of its rows (.1 .4 .3) and (.5 .1 .3), so .3 .25 .3 of
    which, at two tokens, 0 and 2 stay; the last row alone would keep 0 and 2 as well, the first
    alone 1 and 2. Second: only its last row counts, (.2 .3 .1), so 0 and 1 stay.
    """
    heads = torch.zeros(2, 2, 2, 6)
    heads[0, :, 0, 1:4] = torch.tensor([[0.2, 0.5, 0.3], [0.0, 0.3, 0.3]])
    heads[0, :, 1, 1:4] = torch.tensor([[0.4, 0.0, 0.4], [0.6, 0.2, 0.2]])
    heads[1, :, 0, 1:4] = torch.tensor([[0.0, 0.0, 0.9], [0.0, 0.0, 0.9]])
    heads[1, :, 1, 1:4] = torch.tensor([[0.3, 0.2, 0.1], [0.1, 0.4, 0.1]])
    asked = []

    def attention_of(queries: Tensor) -> Tensor:
        asked.append(queries.tolist())
        return heads

    def view(layer: int) -> LayerView:
        text = Text(
            torch.tensor([[4, 5], [4, 5]]), torch.tensor([[True, True], [False, True]]),
            torch.zeros(2, 2, 1), torch.zeros(2, 3, 1),
        )  # fmt: skip
        return LayerView(
            layer, torch.zeros(2, 6, 1), torch.tensor([[1, 2, 3], [1, 2, 3]]), (3, 3), (1, 1), 3,
            torch.tensor([0, 1]), torch.tensor([5, 5]), attention_of, 4, text_of=lambda: text,
        )  # fmt: skip

    method = GSearch(rates=(1.0, 0.67, 0.67, 0.5))
    kept = method.keep(view(1))
    assert asked == [[[4, 5], [4, 5]]]
    assert kept.counts == (2, 2)
    assert kept.index.tolist() == [[0, 2], [0, 1]]
    assert method.keep(view(3)).counts == (1, 1)
    whole = method.keep(view(0))
    assert whole.counts == (3, 3)
    assert whole.index.tolist() == [[0, 1, 2]] * 2
    assert len(asked) == 2, "nothing is ranked where nothing goes"


@pytest.mark.parametrize("layers", [4, 12, 32, 40])
@pytest.mark.parametrize("kept", [1, 6, 72, 200, 575, 576])
@pytest.mark.parametrize("k", [None, 0.05, 2.0])
def test_a_sigmoid_meets_its_mean_and_no_larger_one_would(layers, kept, k):
    counts = GSearch(kept, k).counts(576, layers)
    behind, most = range(2, layers), kept * (layers - 2)
    assert counts[:2] == (576, 576)
    assert all(a >= b for a, b in pairwise(counts))
    assert min(counts) >= 1
    assert sum(counts[2:]) <= most
    # The slow way: midpoints in small steps, the last one that fits.
    steep = printed_k(kept / 576, layers) if k is None else k
    best = -1
    for step in range(-40_000, 80_000, 20):
        alpha = step / 1000 if steep > 0.1 else step / 40
        tokens = [max(1, math.floor(576 / (1 + math.exp(min(700.0, steep * (i - alpha)))) + 1e-9))
                  for i in behind]  # fmt: skip
        if sum(tokens) <= most:
            best = max(best, sum(tokens))
    assert sum(counts[2:]) >= best
    assert sum(counts[2:]) >= most - 2 * len(behind)


def test_the_papers_k_is_that_of_the_nearest_budget():
    """Figure 5: the larger the budget, the steeper, by and large."""
    figures = load_paper("gsearch").figures
    printed = figures[figures["table"] == "Figure 5"]["value"]
    assert list(K_32.values()) == list(printed)
    assert printed_k(0.125, 32) == printed_k(0.1, 32) == 0.4808
    assert printed_k(18 / 144, 12) == pytest.approx(0.4808 * 32 / 12)
    assert printed_k(0.01, 32) == 0.3558
    assert printed_k(0.2, 32) == 0.4568
    assert printed_k(1.0, 32) == 0.933
    for kept, k in ((18, 0.4808), (72, 0.933)):
        counts = GSearch(kept).counts(144, 12)
        assert counts == GSearch(kept, k * 32 / 12).counts(144, 12)
        assert counts != GSearch(kept, (1.4138 - k) * 32 / 12).counts(144, 12), "the other budget's"


def test_the_sigmoid_falls_around_its_midpoint():
    assert p_sigmoid(0.5, 3, range(3, 4)) == (0.5,)
    assert p_sigmoid(0.5, 3, range(5, 6))[0] == pytest.approx(1 / (1 + math.exp(1)))
    assert p_sigmoid(100, 3, range(1000, 1001)) == (0.0,)


def test_the_papers_rates_are_those_of_its_figure_and_meet_its_mean():
    paper = load_paper("gsearch")
    drawn = [
        paper.reported(table="Figure 1c", setting=f"axis layer {i}", metric="keep rate")
        for i in range(3, 32)
    ]
    assert list(LLAVA_15_7B) == [1.0, 1.0, 1.0, *drawn]
    method = GSearch.for_mean(196, 576, 32)
    assert method.rates == LLAVA_15_7B
    assert method.layers(32) == tuple(range(3, 32))
    mean = sum(method.counts(576, 32)) / 32 / 576
    assert mean == pytest.approx(0.340, abs=0.005)


def test_budgets():
    """Behind two full layers as FastV's; over all layers as asked for."""
    assert GSearch.for_budget(72) == GSearch(72)
    assert GSearch.for_mean(39, 144, 12) == GSearch(18)
    assert FastV.for_mean(39, 144, 12) == FastV(18)
    counts = GSearch(18).counts(144, 12)
    assert 39 - 1 < sum(counts) / 12 <= 39
    with pytest.raises(BudgetError, match=r"first 2 of 12 .*at least 25"):
        GSearch.for_mean(24, 144, 12)
    assert GSearch.for_mean(25, 144, 12) == GSearch(1)
    with pytest.raises(BudgetError, match="at least 25"):
        FastV.for_mean(24, 144, 12)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rates": (1.0, 1.0, 0.5)}, "needs rates for the 4 layers"),
        ({"rates": (1.0, 0.5, 0.6, 0.1)}, "never above the one before"),
        ({"rates": (0.9, 0.5, 0.4, 0.1)}, "rates is 1 at first"),
        ({"rates": (1.0, 0.5, 0.4, 0.0)}, "always above 0"),
        ({"rates": (1.0, 0.5, 0.4, 0.1), "kept_tokens": 4}, "None beside rates"),
        ({"kept_tokens": 4, "k": 0.0}, "k is a finite number from 1e-06"),
        ({"kept_tokens": 4, "queries": "first"}, "one of 'text', 'last'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, reason):
    with pytest.raises(UnsupportedError, match=reason):
        GSearch(**fields).on(model_for("llava_clip")).__enter__()


def test_without_a_budget_or_depth():
    with pytest.raises(BudgetError, match="whole number"):
        GSearch().check(SHAPE)
    with pytest.raises(UnsupportedError, match="deeper model"):
        GSearch(4).check(Shape(PATCHES, (4, 4), 2, True))


def test_records_hold_plain_lists():
    assert GSearch(rates=(1.0, 0.5)).describe() == {
        "method": "gsearch", "kept_tokens": None, "k": None, "rates": [1.0, 0.5], "queries": "text",
    }  # fmt: skip
