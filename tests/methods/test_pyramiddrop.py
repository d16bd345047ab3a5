"""PyramidDrop against slow loops written from its code, and against plausible mistakes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from reference_schedules import Choose
from schedule_checks import check_logits, logits_by_loops, logits_by_method
from tiny_hosts import model_for
from torch import Tensor

from frugalvlm.methods import PyramidDrop
from frugalvlm.views import BudgetError, Shape, UnsupportedError

SCHEDULE = (16, 9, 5, 3)  # floors of 16 times 0.6, 0.36 and 0.216
METHOD = PyramidDrop(0.6)
RULE = (
    "the last token's attention with the projections behind the cut, floor(N lambda^s) tokens, "
    "positions renumbered"
)


def chooser(
    places: list[int], length: int, schedule: tuple[int, ...] = SCHEDULE, maps: str = "here",
    all_text: bool = False,
) -> Choose:  # fmt: skip
    """What goes at the end of each stage, one token at a time; the arguments are mistakes."""

    def choose(index: int, front: Tensor, here: Tensor, gone: set[int]) -> set[int]:
        left = [p for p in places if p not in gone]
        if schedule[index] >= len(left):
            return set()
        used, rows = here if maps == "here" else front, [length - 1]
        if all_text:
            rows = list(range(places[-1] + 1, length))
        score = {p: sum(float(used[:, row, p].mean()) for row in rows) for p in left}
        return set(sorted(left, key=lambda p: -score[p])[schedule[index] :])

    return choose


def by_loops(host: str, renumber: bool = True, **mistake: Any) -> list[Tensor]:
    return logits_by_loops(host, partial(chooser, **mistake), renumber)


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
def test_logits_are_those_of_the_released_code(host):
    answer, trace = logits_by_method(METHOD, host)
    assert trace.tokens_per_layer == list(SCHEDULE)
    check_logits(answer, by_loops(host), RULE)


MISTAKES: dict[str, dict[str, Any]] = {
    "the attention in front of the cut": {"maps": "front"},
    "all text tokens ask": {"all_text": True},
    "positions kept": {"renumber": False},
    "rounded, not floored": {"schedule": (16, 10, 6, 3)},
    "one layer late": {"schedule": (16, 16, 9, 5)},
    "the share of what is left, floored each time": {"schedule": (16, 9, 5, 2)},
}


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_found(mistake, host):
    with pytest.raises(AssertionError, match="projections behind the cut"):
        check_logits(by_loops(host, **MISTAKES[mistake]), by_loops(host), RULE)


def test_stages_of_the_released_scripts():
    """Layers 8, 16, 24 of 32, and shares 0.5, 0.25, 0.125 of 576 tokens: a mean of 270."""
    method = PyramidDrop()
    assert method.layers(32) == (8, 16, 24)
    assert method.layers(12) == (3, 6, 9)
    counts = method.counts(576, 32)
    assert counts == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8
    assert sum(counts) / 32 / 576 == pytest.approx(0.469, abs=5e-4)  # as G-Search's Table 1 has it
    assert PyramidDrop.for_mean(270, 576, 32).ratio == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("kept", [1, 7, 16, 72, 144])
def test_a_budget_is_what_the_last_stage_has(kept):
    counts = PyramidDrop.for_budget(kept, 144).counts(144, 12)
    assert counts[0] == 144
    assert counts[-1] == kept


@pytest.mark.parametrize("mean", [38, 39, 49, 84, 144])
def test_a_mean_is_met_from_below(mean):
    method = PyramidDrop.for_mean(mean, 144, 12)
    assert mean - 1 < sum(method.counts(144, 12)) / 12 <= mean
    more = PyramidDrop(min(1.0, method.ratio + 1e-6))
    assert mean == 144 or sum(more.counts(144, 12)) > 12 * mean


def test_what_does_not_fit_is_refused():
    with pytest.raises(BudgetError, match=r"first 3 of 12 .*at least 37"):
        PyramidDrop.for_mean(36, 144, 12)
    with pytest.raises(UnsupportedError, match=r"stages in 2\.\.3"):
        PyramidDrop().check(Shape(16, (4, 4), 3, True))
    with (
        pytest.raises(BudgetError, match="from 0 to 1"),
        PyramidDrop(1.5).on(model_for("llava_clip")),
    ):
        pass


def test_nothing_of_the_second_look_is_left_behind():
    """The hooks that note positions go with the block, also when a call inside failed."""
    model = model_for("llava_clip")
    attention = model.model.language_model.layers[0].self_attn
    with PyramidDrop().on(model):
        assert attention._forward_pre_hooks
        with pytest.raises(UnsupportedError, match="placeholders="):
            model(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=torch.zeros(1, 3, 24, 24))
    assert not attention._forward_pre_hooks
