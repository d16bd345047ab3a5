"""The type checker that reads tensor annotations while tests run."""

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """Check a function's annotations; `Self` can only be checked on whole classes, so skip it."""
    hints = getattr(function, "__annotations__", {})
    return function if any("Self" in str(hint) for hint in hints.values()) else beartype(function)
