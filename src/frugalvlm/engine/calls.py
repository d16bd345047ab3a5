"""What releases of Transformers call things, in one place; and the releases that were tried."""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import Cache

TESTED = ("5.17", "5.24")  # of Transformers: the oldest and the newest release that was tried
_CACHE_NAMES = ("cache", "past_key_values")  # since 5.24, and before


def arguments_of(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """A call's arguments by name."""
    if not args:
        return kwargs
    signature = inspect.signature(module.forward)
    bound = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The KV cache among a call's arguments, whatever this release calls it."""
    for name in _CACHE_NAMES:
        if isinstance(found := kwargs.get(name), Cache):
            return found
    return None


def cache_left_by(output: Any) -> Any:
    """The KV cache in what a decoder returns."""
    return cache_of(dict(output))


@cache
def check_release(release: str = transformers.__version__) -> None:
    """Warn, once, of a release that is newer than those that were tried."""
    if _numbers(release) > _numbers(TESTED[1]):
        warnings.warn(
            f"Transformers {release} is newer than {TESTED[1]}, the newest release these methods "
            f"were tried with: check that an answer with a cache equals one with use_cache=False, "
            f"or install transformers=={TESTED[1]}.*.",
            stacklevel=2,
        )


def _numbers(release: str) -> tuple[int, ...]:
    """Its first two numbers."""
    return tuple(map(int, release.split(".")[:2]))
