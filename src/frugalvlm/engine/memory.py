"""What was cut from a prompt, kept on the cache that the prompt filled.

Such a cache holds fewer tokens than its prompt has. It says so when it is used outside a block of
its method, where the untouched model would count tokens that are not there; and what is remembered
follows when its rows are moved, repeated or picked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache as cached
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from frugalvlm.engine.subset import Subset
from frugalvlm.views import UnsupportedError

_SERVED = threading.local()  # `cache`: the one that a block of the running thread reads right now


@dataclass
class Memory:
    """What was cut out of one prompt; lives as long as its cache.

    Attributes:
        prompt_length: of the caller's input.
        stream: what of the prompt the decoder's first layer read; None: all of it.
        removed: [batch, 1] visual tokens missing in the stream.
        cuts: subsets of the stream, by the first layer that reads them.
        hidden: [batch, stream] tokens that masks hide, by the first layer that does not see them.
    """

    prompt_length: int
    stream: Subset | None = None
    removed: Tensor | None = None
    cuts: dict[int, Subset] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)

    @property
    def stream_length(self) -> int:
        """Tokens that the decoder's first layer read."""
        return self.prompt_length if self.stream is None else self.stream.columns.shape[1]

    def rows(self, index: Tensor) -> Memory:
        """That of other rows of the batch, by number or by mark."""
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        return Memory(
            self.prompt_length,
            None if self.stream is None else self.stream.rows(index),
            None if self.removed is None else _rows(self.removed, index),
            {layer: cut.rows(index) for layer, cut in self.cuts.items()},
            {layer: _rows(gone, index) for layer, gone in self.hidden.items()},
        )


class _Cut:
    """Mixed into the class of a cache that holds less than its prompt."""

    memory: Memory
    layers: list[Any]

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(_SERVED, "cache", None) is not self:
            raise UnsupportedError(
                "This cache was filled inside a with method.on(model) block and lacks visual "
                "tokens of its prompt: go on inside a block of the same method, or read the "
                "prompt again without a cache."
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.memory = self.memory.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.memory = self.memory.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        batch = len(self.layers[0].keys) // repeats
        self.memory = self.memory.rows(torch.arange(batch).repeat_interleave(repeats))

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _again, (type(self).__mro__[2], self.__dict__)


def memory_of(cache: Any) -> Memory | None:
    """What was cut from the prompt that filled a cache."""
    return cache.memory if isinstance(cache, _Cut) else None


def remember(cache: Cache, memory: Memory) -> None:
    """Keep it on the cache; a copy of the cache then knows as much as the original."""
    if not isinstance(cache, _Cut):
        cache.__class__ = _cut_kind(type(cache))  # type: ignore[arg-type]
    cache.memory = memory


def kind_of(cache: Cache) -> type:
    """The class a cache was made of."""
    return type(cache).__mro__[2] if isinstance(cache, _Cut) else type(cache)


def serve(cache: Cache | None) -> None:
    """The running thread's block reads this cache from now on; None: no more."""
    _SERVED.cache = cache


@cached
def _cut_kind(kind: type) -> type:
    """The class of caches that are cut; to others it looks as the one it derives from."""
    return type(kind.__name__, (_Cut, kind), {"__module__": kind.__module__})


def _again(kind: type, state: dict[str, Any]) -> Any:
    """A copy: how `copy` and `pickle` make a cache whose class is made at run time."""
    made: Any = object.__new__(_cut_kind(kind))
    made.__dict__.update(state)
    return made


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.to(values.device))
