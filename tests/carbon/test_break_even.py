"""Break-even points, amortised costs and marginal points, by hand and against simulation."""

import math

import numpy as np
import pytest

from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.carbon import (
    CarbonError,
    Figure,
    amortised,
    break_even,
    figure_of,
    lost_per_saved,
    marginal,
)


def _first_cheaper(once, each, instead, limit=10_000):
    """The slow way: ask until the sum is no larger."""
    for n in range(limit):
        if once + n * each <= n * instead:
            return n
    return None


@pytest.mark.parametrize(
    ("once", "each", "instead"), [(100, 1, 3), (100, 1, 1.3), (7, 2, 9), (0, 1, 2), (50, 0, 1)]
)
def test_the_first_question_that_pays_is_found(once, each, instead):
    assert break_even(once, each, instead).whole == _first_cheaper(once, each, instead)


@pytest.mark.parametrize("each", [3.0, 4.0])
def test_what_saves_nothing_never_pays(each):
    found = break_even(100, each, 3.0)
    assert found.whole is None
    assert found.questions.value is None
    assert "never comes back" in str(found)


def test_an_alternative_may_have_cost_something_too():
    assert break_even(100, 1, 3, once_instead=40).whole == 30
    assert break_even(40, 1, 3, once_instead=100).whole == 0


def test_the_interval_takes_the_worst_corners():
    found = break_even(Figure(100, 90, 120), Figure(1, 0.5, 1.5), Figure(3, 2.5, 3.5))
    corners = [o / (i - e) for o in (90, 120) for e in (0.5, 1.5) for i in (2.5, 3.5)]
    assert found.questions.low == pytest.approx(min(corners))
    assert found.questions.high == pytest.approx(max(corners))
    assert str(found) == "from question 50 [30, 120] on"


def test_a_saving_that_may_be_nothing_leaves_the_upper_end_open():
    found = break_even(100, Figure(1, 0.5, 2.6), Figure(2, 1.5, 2.5))
    assert found.whole == 100
    assert found.questions.high is None
    assert found.questions.low == pytest.approx(50.0)
    assert "no end" in str(found)
    assert "never comes back" in found.questions.reason


def test_the_interval_of_repeated_measurements_holds_the_truth():
    """200 planted machines: training 500, questions 2 and 3 with noise, seven measurements each."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        each, instead = rng.normal(2, 0.1, 7), rng.normal(3, 0.1, 7)
        found = break_even(500.0, list(each), list(instead)).questions
        inside += found.low <= 500 <= found.high
    assert inside >= 190


def test_amortised_cost_meets_the_alternative_at_the_break_even_point():
    n = break_even(120, 1, 3).questions.value
    assert amortised(120, 1, n).value == pytest.approx(3.0)
    assert amortised(Figure(120, 100, 140), Figure(1, 0.9, 1.1), 20) == Figure(7.0, 5.9, 8.1)
    with pytest.raises(CarbonError, match="above 0"):
        amortised(1, 1, 0)


def test_marginal_cost_of_a_point():
    assert marginal(2.0, 6.0, 8.0).value == pytest.approx(0.5)
    found = marginal(2.0, 6.0, Estimate(8.0, 4.0, 16.0, 100, 50))
    assert (found.low, found.high) == (pytest.approx(0.25), pytest.approx(1.0))
    assert marginal(2.0, 6.0, -1.0).value is None
    assert "no better" in marginal(2.0, 6.0, 0.0).reason
    assert marginal(6.0, 2.0, 8.0).value == pytest.approx(-0.5)  # better, and costs less
    unsure = marginal(2.0, 6.0, Estimate(1.0, -1.0, 3.0, 100, 50))
    assert (unsure.value, unsure.high) == (4.0, None)
    assert unsure.low == pytest.approx(4 / 3)


def test_points_lost_for_what_is_saved():
    assert lost_per_saved(10.0, 3.0, 5.0).value == pytest.approx(5.0)
    assert lost_per_saved(10.0, 5.0, 5.0).value is None
    assert "saves nothing" in lost_per_saved(10.0, 6.0, 5.0).reason.lower()
    gained = lost_per_saved(Figure(-1.0, -3.0, 1.0), 3.0, 5.0)
    assert (gained.value, gained.low, gained.high) == (-0.5, -1.5, 0.5)
    unsure = lost_per_saved(Figure(-1.0, -3.0, 1.0), Figure(3, 2, 6), 5.0)
    assert (unsure.low, unsure.high) == (None, None)
    assert unsure.value == -0.5


@pytest.mark.parametrize(
    ("amount", "wanted"),
    [
        (3, (3.0, 3.0, 3.0)),
        ([4.0], (4.0, 4.0, 4.0)),
        (Estimate(1.0, math.nan, math.nan, 9, 1, "one picture"), (1.0, None, None)),
    ],
)
def test_amounts(amount, wanted):
    found = figure_of(amount)
    assert (found.value, found.low, found.high) == wanted


def test_repeated_measurements_have_a_mean_and_an_interval():
    found = figure_of([1.0, 2.0, 3.0, 6.0])
    assert found.value == 3.0
    assert 1.0 <= found.low < 3.0 < found.high <= 6.0


@pytest.mark.parametrize("wrong", [[], "ten", None, math.inf, [1.0, math.nan]])
def test_no_numbers_are_refused(wrong):
    with pytest.raises(CarbonError, match="Give once as a finite number"):
        break_even(wrong, 1, 2)


def test_negative_costs_are_refused():
    with pytest.raises(CarbonError, match="each is a cost and cannot be negative; got -1"):
        break_even(1, -1, 2)
