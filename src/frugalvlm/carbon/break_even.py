"""When a cost that is paid once has paid for itself, and what the last points cost.

A fine-tuned small model or a method that must be trained starts with a debt and saves a little with
every question; an untouched model, or a training-free method, owes nothing. All functions take
costs in one currency, whichever it is: grams, joules, seconds or FLOPs. Where energy is only
modelled, take seconds or FLOPs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from frugalvlm.carbon.figure import (
    Amount,
    CarbonError,
    Figure,
    difference,
    figure_of,
    product_of,
    ratio,
    total,
)

__all__ = ["BreakEven", "amortised", "break_even", "lost_per_saved", "marginal"]

NEVER = "A question costs no less than with the alternative, so the cost never comes back."
NO_POINTS = "The dearer model scores no better."
SAVES_NOTHING = "It saves nothing."


@dataclass(frozen=True)
class BreakEven:
    """After how many questions a cost that was paid once has come back.

    Attributes:
        questions: their number; undefined where a question saves nothing. No upper end where the
            interval of the saving reaches zero.
        saved: per question.
        once: what was paid once more than for the alternative.
    """

    questions: Figure
    saved: Figure
    once: Figure

    @property
    def whole(self) -> int | None:
        """The first whole number of questions at which it is no dearer."""
        return None if self.questions.value is None else math.ceil(self.questions.value)

    @property
    def numbers(self) -> str:
        """That number and its interval; "never" where it does not come."""
        if self.whole is None:
            return "never"
        return f"{self.whole:,} [{_count(self.questions.low)}, {_count(self.questions.high)}]"

    def __str__(self) -> str:
        if self.whole is None:
            return self.questions.reason
        return f"from question {self.numbers} on"


def break_even(
    once: Amount, each: Amount, instead: Amount, *, once_instead: Amount = 0.0
) -> BreakEven:
    """From how many questions on something that cost `once` is no dearer than its alternative.

        N = (once - once_instead) / (instead - each)

    The interval takes the worst corners of all intervals, so it is never too narrow.

    Args:
        once: what was paid once, for example for training.
        each: what a question costs with it.
        instead: what a question costs with the alternative: the untouched large model, or a method
            that is free of training.
        once_instead: what the alternative has cost once.

    Returns:
        The number with its interval; 0 where nothing more was paid once.

    Raises:
        CarbonError: no finite numbers, or negative ones.
    """
    paid, own, other, owed = (
        _cost(amount, name)
        for name, amount in (("once", once), ("each", each), ("instead", instead),
                             ("once_instead", once_instead))
    )  # fmt: skip
    debt, saved = difference(paid, owed), difference(other, own)
    found = ratio(debt, saved, NEVER)
    if found.value is not None:  # nobody waits a negative number of questions
        value, low, high = (
            None if v is None else max(0.0, v) for v in (found.value, found.low, found.high)
        )
        found = Figure(value, low, high, found.reason)
    return BreakEven(found, saved, debt)


def amortised(once: Amount, each: Amount, questions: float) -> Figure:
    """What a question costs when the cost paid once is spread over so many.

    Raises:
        CarbonError: no finite numbers, negative ones, or no question.
    """
    if not questions > 0:
        raise CarbonError(f"questions is a number above 0; got {questions!r}.")
    return total(product_of(_cost(once, "once"), 1 / questions), _cost(each, "each"))


def marginal(cost: Amount, more: Amount, points: Amount) -> Figure:
    """What each further point costs between a model and the next larger one.

        (more - cost) / points

    Args:
        cost: of the smaller model, for a question or for its training and a number of questions.
        more: of the larger one, for the same.
        points: by how much the larger one scores higher; best a paired estimate
            (`benchmarks.stats`).

    Returns:
        Cost per point; undefined where the larger model scores no better. At or below zero the
        larger model costs no more, which is worth having at any price.

    Raises:
        CarbonError: no finite numbers, or negative costs.
    """
    extra = difference(_cost(more, "more"), _cost(cost, "cost"))
    return ratio(extra, figure_of(points, "points"), NO_POINTS)


def lost_per_saved(lost: Amount, cost: Amount, untouched: Amount) -> Figure:
    """Quality points that a training-free method loses for each unit of cost that it saves.

        lost / (untouched - cost)

    Args:
        lost: points of the score; negative where the method scores higher.
        cost: of a question (or of a thousand) with the method.
        untouched: the same without it.

    Returns:
        Undefined where nothing is saved. At or below zero nothing is lost.

    Raises:
        CarbonError: no finite numbers, or negative costs.
    """
    saved = difference(_cost(untouched, "untouched"), _cost(cost, "cost"))
    return ratio(figure_of(lost, "lost"), saved, SAVES_NOTHING)


def _cost(amount: Amount, name: str) -> Figure:
    found = figure_of(amount, name)
    if found.value is not None and found.value < 0:
        raise CarbonError(f"{name} is a cost and cannot be negative; got {found.value:g}.")
    return found


def _count(questions: float | None) -> str:
    return "no end" if questions is None else f"{math.ceil(questions):,}"
