"""FastV: drop visual tokens inside the decoder by the last prompt token's attention.

After K layers most visual tokens receive almost no attention. FastV ranks them once, by the
attention that the last token of the prompt pays to them in layer K, and drops the rest from there
on.

Paper: Chen et al., arXiv:2403.06764 (ECCV 2024). Code read: pkunlp-icler/FastV at d165972,
`modeling_llama.py` (the branch that really shortens the sequence).

1. Run the first K decoder layers with all tokens.
2. a = attention of the last prompt token in layer K (index K-1), mean over heads, visual part.
3. Keep the R visual tokens with the largest a. Kept tokens stay in order and keep their position
   ids; the KV cache of the first K layers stays full, that of later layers is short.

Complexity: one query row; O(length) memory.
Deviations: none. Budgets: `kept_tokens` counts what is left after layer K (FasterVLM's tables
count so; VisionZip's count the average over layers, which a shallow decoder cannot reach).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from frugalvlm.methods.base import LayerReducer, check_budget
from frugalvlm.methods.fields import Limits, Tokens
from frugalvlm.methods.schedules import check_depth, check_mean
from frugalvlm.views import Kept, LayerView, Shape, UnsupportedError, keep_top


@dataclass(frozen=True)
class FastV(LayerReducer):
    """Keep `kept_tokens` visual tokens of each image from layer `k` on."""

    key: ClassVar[str] = "fastv"
    kept_tokens: Annotated[Tokens, "R, per crop, as a count"]
    k: Annotated[int, Limits(1), "K, decoder layers that keep all; 2 in the main setting"] = 2

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The budget is what is left after layer K = 2."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens)

    @classmethod
    def for_mean(cls, mean_tokens: int, total_tokens: int, decoder_layers: int) -> Self:
        """The budget is the mean over all layers, to the nearest whole number of kept tokens.

        Raises:
            BudgetError: when the first K layers alone exceed it.
        """
        check_budget(mean_tokens, total_tokens)
        check_depth(decoder_layers)
        behind = decoder_layers - cls.k
        check_mean(cls.key, mean_tokens, cls.k * total_tokens + behind, decoder_layers, cls.k)
        return cls(round((mean_tokens * decoder_layers - cls.k * total_tokens) / behind))

    def check(self, shape: Shape) -> None:
        """Layer K must exist; the budget must be in 1..patches."""
        if not self.k < shape.decoder_layers:
            raise UnsupportedError(
                f"fastv drops tokens before decoder layer k={self.k}, but this decoder has "
                f"{shape.decoder_layers} layers; choose k in 1..{shape.decoder_layers - 1}."
            )
        check_budget(self.kept_tokens, shape.most, self)

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """One cut, before layer K."""
        return (self.k,)

    def keep(self, view: LayerView) -> Kept:
        """The most attended tokens, in order."""
        return keep_top(view.last_token_attention.mean(1), view.per_crop(self.kept_tokens))
