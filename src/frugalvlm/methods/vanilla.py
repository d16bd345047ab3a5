"""The untouched model, as a method: the reference of every comparison.

Source: none; a control that every efficient method is compared with.
Complexity: none. Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from frugalvlm.methods.base import Method, check_keeps_all


@dataclass(frozen=True)
class Vanilla(Method):
    """Changes nothing. One hook tells the trace of each prompt."""

    key: ClassVar[str] = "vanilla"

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The untouched model keeps everything: the only budget is `total_tokens`."""
        check_keeps_all(cls.key, kept_tokens, total_tokens)
        return cls()
