"""VisionZip without contextual tokens: the whole budget goes to dominant ones.

An ablation: against VisionZip at the same budget it says what the merged tokens are worth.
FasterVLM does not, for it keeps patches only and no [CLS] token.

Source: none; an ablation of `visionzip`, whose paper and code are named there.

1. As `visionzip` with D = T and C = 0.

Complexity: as `visionzip`, without the merging.
Deviations: those of `visionzip`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from frugalvlm.methods.base import check_budget
from frugalvlm.methods.fields import Limits
from frugalvlm.methods.visionzip import VisionZip
from frugalvlm.views import BudgetError


@dataclass(frozen=True)
class VisionZipDominant(VisionZip):
    """Keep `dominant` tokens ([CLS] counts as one) per crop, and merge nothing."""

    key: ClassVar[str] = "visionzip_dominant"
    contextual: Annotated[
        int, Limits(0, 0, unit="visual tokens", error=BudgetError), "C, per crop: none"
    ] = 0

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """All of the budget is dominant."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens)
