"""Who puts a kind of method on a model: the engine's modules register here, methods ask here.

Methods know no model and no engine. Which package holds the operators is told by the package's own
front (`frugalvlm/__init__.py`), which knows all floors; it is imported when the first method is put
on a model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

__all__ = ["fill_from", "operates", "operator_of"]

Operator = Callable[..., AbstractContextManager[Any]]
_F = TypeVar("_F", bound=Operator)
_OPERATORS: dict[type, Operator] = {}
_SOURCES: list[Callable[[], object]] = []


def operates(kind: type) -> Callable[[_F], _F]:
    """Register the decorated function for a kind of methods: (method, model, placeholders)."""

    def register(function: _F) -> _F:
        _OPERATORS[kind] = function
        return function

    return register


def fill_from(source: Callable[[], object]) -> None:
    """Say what to call, once, before the first operator is looked up."""
    _SOURCES.append(source)


def operator_of(kind: type) -> Operator:
    """The operator of the nearest registered base class.

    Raises:
        TypeError: for something that is no kind of method.
    """
    while _SOURCES:
        _SOURCES.pop()()
    for base in kind.__mro__:
        if base in _OPERATORS:
            return _OPERATORS[base]
    raise TypeError(f"Nothing knows how to put a {kind.__name__} on a model.")
