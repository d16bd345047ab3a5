"""The untouched model, as a method: the reference of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from frugalvlm.methods.base import Method, check_budget


@dataclass(frozen=True)
class Vanilla(Method):
    """Changes nothing. One hook tells the trace of each prompt."""

    key: ClassVar[str] = "vanilla"

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The untouched model keeps everything: the only budget is `total_tokens`."""
        check_budget(kept_tokens, total_tokens)
        if kept_tokens != total_tokens:
            check_budget(total_tokens + 1, total_tokens)
        return cls()
