"""PyramidDrop: visual tokens are dropped stage by stage, a fixed share at each.

Shallow layers need nearly all visual tokens, deep ones ever fewer. The decoder is cut into stages
of equal depth, and at the end of each stage the same share of the tokens that are left goes.

Paper: Xing et al., arXiv:2410.17247 (CVPR 2025), section 3. Code read: Cooperx521/PyramidDrop at
6444f30, `modeling_llama_pdrop.py` (`pdrop_forward`, `pdrop_rank_drop`).

1. S = 4 stages: cuts behind layers L/4, L/2 and 3L/4 (8, 16, 24 of 32).
2. a = attention of the last prompt token to the visual tokens, mean over heads, computed with the
   projections of the layer behind the cut on the states in front of it.
3. The floor(N lambda^s) tokens with the largest a stay behind stage s, in order; N counts the
   tokens that entered the decoder, lambda is 0.5.
4. Position ids close the gaps, in every layer behind the cut and for every new token.

Complexity: one query row and the keys of one layer per cut; O(length) memory.
Deviations: at least one token stays; shares are of a crop's tokens, so that budgets per crop are
met (LLaVA-NeXT); in the released training code the queries are others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from frugalvlm.methods.base import LooksBehind, check_budget
from frugalvlm.methods.fields import Limits
from frugalvlm.methods.schedules import check_depth, check_mean, solve
from frugalvlm.views import BudgetError, Kept, LayerView, Shape, UnsupportedError, keep_top


@dataclass(frozen=True)
class PyramidDrop(LooksBehind):
    """Keep the share `ratio` of the tokens that are left, at the end of each stage but the last."""

    key: ClassVar[str] = "pyramiddrop"
    renumbers: ClassVar[bool] = True
    ratio: Annotated[
        float,
        Limits(0, 1, error=BudgetError),
        "lambda, what stays at the end of a stage",
    ] = 0.5
    stages: Annotated[int, Limits(2), "S, of the decoder's layers"] = 4

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The budget is what is left in the last stage."""
        check_budget(kept_tokens, total_tokens)
        return cls((kept_tokens / total_tokens) ** (1 / (cls.stages - 1)))

    @classmethod
    def for_mean(cls, mean_tokens: int, total_tokens: int, decoder_layers: int) -> Self:
        """The budget is the mean over all layers.

        Raises:
            BudgetError: when the first stage alone exceeds it.
        """
        check_budget(mean_tokens, total_tokens)
        check_depth(decoder_layers)
        full = decoder_layers // cls.stages
        least = full * total_tokens + decoder_layers - full
        check_mean(cls.key, mean_tokens, least, decoder_layers, full)
        most = mean_tokens * decoder_layers
        return cls(solve(lambda r: cls(r).counts(total_tokens, decoder_layers), 0.0, 1.0, most))

    def check(self, shape: Shape) -> None:
        """A layer for every stage."""
        if self.stages > shape.decoder_layers:
            raise UnsupportedError(
                f"pyramiddrop cannot cut {shape.decoder_layers} decoder layers into {self.stages} "
                f"stages; choose stages in 2..{shape.decoder_layers}."
            )

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """The first layer of every stage but the first."""
        return tuple(s * decoder_layers // self.stages for s in range(1, self.stages))

    def counts(self, patches: int, decoder_layers: int) -> tuple[int, ...]:
        """Visual tokens per crop at every decoder layer, of so many `patches`."""
        cuts = self.layers(decoder_layers)
        stages = [sum(layer >= cut for cut in cuts) for layer in range(decoder_layers)]
        return tuple(max(1, math.floor(patches * self.ratio**s + 1e-9)) for s in stages)

    def keep(self, view: LayerView) -> Kept:
        """The tokens that the last prompt token attends to most, in order."""
        assert self.behind is not None, "`on` says where to look"
        budget = view.per_crop(self.counts(view.patches, view.decoder_layers)[view.layer])
        return keep_top(self.behind(view).last_token_attention.mean(1), budget)
