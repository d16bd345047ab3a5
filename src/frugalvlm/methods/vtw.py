"""VTW: all visual tokens leave the decoder behind one layer.

What the first layers have read of the picture is enough, so deep layers need none of it. Nothing is
chosen: whatever a choice at the same depth is worth, it must be worth more than this.

Paper: Lin et al., arXiv:2405.05803, "Boosting Multimodal Large Language Models with Visual Tokens
Withdrawal for Rapid Inference" (AAAI 2025).

1. Run the first K decoder layers with all tokens.
2. Drop every visual token. Text keeps its position ids; the KV cache of the first K layers stays
   full, that of later layers holds text only.

Complexity: none of its own.
Deviations: the paper finds K once per model and task, as the first layer behind which the output
hardly changes (16 of 32 for LLaVA-1.5-7B); here it is a share of the depth, so that one number
serves every depth. A budget is the mean over layers, as tables that print a token count take it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from frugalvlm.methods.base import LayerReducer, check_budget
from frugalvlm.methods.fields import Share
from frugalvlm.methods.schedules import check_depth, check_mean
from frugalvlm.views import Kept, LayerView, Shape, UnsupportedError


@dataclass(frozen=True)
class VTW(LayerReducer):
    """Drop all visual tokens behind the first `depth` of the decoder's layers."""

    key: ClassVar[str] = "vtw"
    depth: Annotated[Share, "K = int(depth * layers), at least 1; 0.5 is 16 of 32"] = 0.5

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The budget is the mean over all layers: behind layer K there is none."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens / total_tokens)

    @classmethod
    def for_mean(cls, mean_tokens: int, total_tokens: int, decoder_layers: int) -> Self:
        """The same; K is rounded down.

        Raises:
            BudgetError: when the first layer alone exceeds it.
        """
        check_budget(mean_tokens, total_tokens)
        check_depth(decoder_layers)
        check_mean(cls.key, mean_tokens, total_tokens, decoder_layers, 1)
        return cls.for_budget(mean_tokens, total_tokens)

    def check(self, shape: Shape) -> None:
        """There must be a layer with and one without the picture."""
        if shape.decoder_layers < 2:
            raise UnsupportedError("vtw drops tokens between decoder layers; this model has one.")

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """One cut, before layer K; none where every layer sees the picture."""
        k = max(1, int(self.depth * decoder_layers + 1e-9))  # a whole number but for its last bit
        return (k,) if k < decoder_layers else ()

    def counts(self, patches: int, decoder_layers: int) -> tuple[int, ...]:
        """Visual tokens per crop at every decoder layer, of so many `patches`."""
        cuts = self.layers(decoder_layers)
        return tuple(0 if cuts and i >= cuts[0] else patches for i in range(decoder_layers))

    def keep(self, view: LayerView) -> Kept:
        """Nothing."""
        return Kept(view.visual[:, :0], (0,) * len(view.counts))
