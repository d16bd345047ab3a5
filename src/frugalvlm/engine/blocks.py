"""The `with` blocks that put methods on models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, ParamSpec, TypeVar

from frugalvlm.views import UnsupportedError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Block(AbstractContextManager[_T], Generic[_T]):
    """A block that may be entered again once it is left, but not inside itself."""

    def __init__(self, make: Callable[[], AbstractContextManager[_T]]) -> None:
        self._make = make
        self._open: AbstractContextManager[_T] | None = None

    def __enter__(self) -> _T:
        if self._open is not None:
            raise UnsupportedError(
                "This block is open already: call method.on(model) once more for another one."
            )
        self._open = self._make()
        try:
            return self._open.__enter__()
        except BaseException:
            self._open = None
            raise

    def __exit__(self, *problem: Any) -> bool | None:
        assert self._open is not None
        opened, self._open = self._open, None
        return opened.__exit__(*problem)


def block(function: Callable[_P, Iterator[_T]]) -> Callable[_P, Block[_T]]:
    """As `contextlib.contextmanager`, for functions that put a method on a model."""
    manager = contextmanager(function)

    @functools.wraps(function)
    def make(*args: _P.args, **kwargs: _P.kwargs) -> Block[_T]:
        return Block(lambda: manager(*args, **kwargs))

    return make
