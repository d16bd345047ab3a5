"""Schedules of several cuts: solving them for a budget, and one budget for all: the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from frugalvlm.methods.base import Method
from frugalvlm.methods.fields import shown, whole
from frugalvlm.views import BudgetError, UnsupportedError


def solve(counts_at: Callable[[float], Sequence[int]], low: float, high: float, most: int) -> float:
    """The largest parameter whose token counts add up to at most `most`.

    Counts are whole numbers, so the sum rises in steps, and the bisection ends below one of them.

    Args:
        counts_at: tokens at each layer; their sum does not fall as the parameter grows.
        low: a parameter that fits; returned where nothing larger does.
        high: the largest parameter.
        most: sum of the counts.
    """
    if sum(counts_at(high)) <= most:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts_at(middle)) <= most else (low, middle)
    return low


def check_depth(decoder_layers: int) -> None:
    """Refuse what is no number of decoder layers.

    Raises:
        UnsupportedError: with what is one.
    """
    if not whole(decoder_layers) or decoder_layers < 1:
        raise UnsupportedError(
            f"decoder_layers is a whole number from 1, got {shown(decoder_layers)}."
        )


def check_mean(key: str, mean_tokens: int, least: int, layers: int, full_layers: int) -> None:
    """Refuse a mean over decoder layers that lies below what a method cannot help keeping.

    Args:
        key: the method.
        mean_tokens: visual tokens per crop, averaged over all layers.
        least: tokens that it keeps at least, summed over all layers.
        layers: decoder layers.
        full_layers: those before the first cut.

    Raises:
        BudgetError: with the smallest mean that works.
    """
    if layers <= full_layers:
        raise BudgetError(
            f"{key} keeps every visual token in its first {full_layers} decoder layers, and here "
            f"are {layers}; take a deeper model, or a method that acts before it."
        )
    if mean_tokens * layers < least:
        raise BudgetError(
            f"{key} keeps every visual token in the first {full_layers} of {layers} decoder "
            f"layers, so {mean_tokens} tokens on average are impossible; choose at least "
            f"{-(-least // layers)}."
        )


def at_mean(method: type[Method], mean_tokens: int, total: int, decoder_layers: int) -> Method:
    """A method at a mean number of visual tokens per crop over all decoder layers.

    Methods without a rule of their own keep as many in every layer.

    Args:
        method: its class.
        mean_tokens: of `total`.
        total: visual tokens of an untouched crop.
        decoder_layers: of the model.

    Raises:
        BudgetError: when the method cannot keep so few.
    """
    make = getattr(method, "for_mean", None)
    if make is None:
        return method.for_budget(mean_tokens, total)
    return make(mean_tokens, total, decoder_layers)
