"""The type checker that reads tensor annotations while tests run."""

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """Check a function that takes or gives tensors; leave others to their own error messages."""
    hints = [str(hint) for hint in getattr(function, "__annotations__", {}).values()]
    tensors = any(kind in hint for hint in hints for kind in ("Float[", "Int[", "Bool["))
    return beartype(function) if tensors else function
