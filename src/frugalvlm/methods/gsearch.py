"""G-Search: a searched keep rate for every decoder layer; tokens are ranked by the layer before.

Visual tokens come out in nearly one order in every layer but the first, so what a deep layer needs
is among what a shallower one needs, and keep rates need not grow with depth. One list of rates,
found once per model, serves every input; which tokens stay depends on the prompt.

Paper: Zhao et al., arXiv:2412.00556v2 (CVPR 2025), Figure 2 (the cut), Figures 1c, 3 and 5 (rates).
No code is released, and the text of the paper was not at hand: what is marked (kit) is ours.

1. r_1 = r_2 = 1 >= r_3 >= ... >= r_L: share of the N visual tokens that entered the decoder.
2. Before layer i >= 3: S_j = attention that visual token j gets in layer i - 1 from the text behind
   the image, mean over heads and over these text tokens (kit; "last": the last one alone).
3. The floor(r_i N) >= 1 tokens with the largest S stay (kit: floor). They stay in order and keep
   their position ids (kit). Text is never removed.
4. P-Sigmoid, for a given budget: r_i = 1 / (1 + exp(k (i - alpha))). k is searched; alpha follows
   from the mean of the token counts behind the full layers (kit: A = 1, solved by bisection).

Complexity: one query row per text token behind the image and layer with a cut; O(length) memory.
Deviations: none that is known. The searches are in `frugalvlm.studies.gsearch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from frugalvlm.methods.base import LayerReducer, check_budget
from frugalvlm.methods.fields import Limits, Tokens, refuse
from frugalvlm.methods.schedules import check_depth, check_mean, solve
from frugalvlm.views import BudgetError, Kept, LayerView, Shape, UnsupportedError, keep_top

Queries = Literal["text", "last"]
FULL = 2  # layers that keep every token (Figure 2)
# k found for 32 layers, by the share of the tokens left behind the full ones (Figure 5; the shares
# are inferred from its FLOPs).
K_32 = {0.0625: 0.3558, 0.125: 0.4808, 0.25: 0.4568, 0.375: 0.7478, 0.5: 0.933}

# LLaVA-1.5-7B, read off Figure 1c (+-0.003). Layers 0 to 2 are full: only so are Table 1's mean of
# 0.34 and its FLOPs met.
LLAVA_15_7B = (
    1.0, 1.0, 1.0, 0.648, 0.640, 0.619, 0.619, 0.619, 0.500, 0.498, 0.498, 0.498, 0.487, 0.236,
    0.236, 0.236, 0.236, 0.183, 0.183, 0.181, 0.078, 0.075, 0.073, 0.070, 0.070, 0.070, 0.062,
    0.041, 0.041, 0.038, 0.033, 0.033,
)  # fmt: skip


@dataclass(frozen=True)
class GSearch(LayerReducer):
    """Keep rates by layer: a P-Sigmoid of mean `kept_tokens`, or the list `rates` itself."""

    key: ClassVar[str] = "gsearch"
    kept_tokens: Annotated[
        Tokens | None, "b N, per crop, mean over the layers behind the full ones"
    ] = None
    k: Annotated[float | None, Limits(1e-6), "fall per layer; None: the paper's, see 4"] = None
    rates: Annotated[
        tuple[float, ...], Limits(0, 1), "r_1 to r_L, instead of kept_tokens and k"
    ] = ()
    queries: Annotated[Queries, "whose attention ranks, see 2"] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        falling = all(a >= b for a, b in pairwise((1.0, *self.rates)))
        if self.rates and not (falling and self.rates[0] == 1 and self.rates[-1] > 0):
            raise refuse(
                self, "rates", "1 at first, then never above the one before, and always above 0"
            )
        if self.rates and self.kept_tokens is not None:
            raise refuse(self, "kept_tokens", "None beside rates")

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The budget is the mean behind the full layers: FastV's (K = 2), spread over depth."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens)

    @classmethod
    def for_mean(cls, mean_tokens: int, total_tokens: int, decoder_layers: int) -> Self:
        """The budget is the mean over all layers.

        The paper's own rates where it printed them for that mean: 196 of 576 in 32 layers.

        Raises:
            BudgetError: when the full layers alone exceed it.
        """
        check_budget(mean_tokens, total_tokens)
        check_depth(decoder_layers)
        printed = (196, 576, len(LLAVA_15_7B))
        if cls is GSearch and (mean_tokens, total_tokens, decoder_layers) == printed:
            return cls(rates=LLAVA_15_7B)
        behind = decoder_layers - FULL
        check_mean(cls.key, mean_tokens, FULL * total_tokens + behind, decoder_layers, FULL)
        return cls(round((mean_tokens * decoder_layers - FULL * total_tokens) / behind))

    def check(self, shape: Shape) -> None:
        """A budget in 1..patches, or a rate for every layer.

        Raises:
            BudgetError: for a budget out of range.
            UnsupportedError: for rates that do not fit the decoder, or a decoder too shallow.
        """
        if self.rates and len(self.rates) != shape.decoder_layers:
            raise UnsupportedError(
                f"gsearch needs rates for the {shape.decoder_layers} layers of this decoder, got "
                f"{len(self.rates)} of them."
            )
        if self.rates:
            return
        if self.kept_tokens is None:
            raise BudgetError(
                "gsearch needs kept_tokens, a whole number of visual tokens, or else rates."
            )
        check_budget(self.kept_tokens, shape.most, self)
        if shape.decoder_layers <= FULL:
            raise UnsupportedError(
                f"gsearch cuts behind decoder layer {FULL}, but this decoder has "
                f"{shape.decoder_layers}; take a deeper model."
            )

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, as records keep them."""
        return {**super().describe(), "rates": list(self.rates)}

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """Every layer from the first whose rate may be below 1."""
        first = sum(rate == 1 for rate in self.rates) if self.rates else FULL
        return tuple(range(first, decoder_layers))

    def counts(self, patches: int, decoder_layers: int) -> tuple[int, ...]:
        """Visual tokens per crop at every decoder layer.

        Args:
            patches: of an untouched crop.
            decoder_layers: L.
        """
        if self.rates:
            return _counts(self.rates, patches)
        assert self.kept_tokens is not None
        k = self.k or printed_k(self.kept_tokens / patches, decoder_layers)
        return _p_sigmoid_counts(k, self.kept_tokens, patches, decoder_layers)

    def keep(self, view: LayerView) -> Kept:
        """The tokens that the text attended to most in the layer before, in order."""
        budget = view.per_crop(self.counts(view.patches, view.decoder_layers)[view.layer])
        if budget == view.counts:  # equal rates in a row: nothing to rank
            every = torch.arange(view.visual.shape[1], device=view.visual.device)
            return Kept(every.expand(len(view.counts), -1), view.counts)
        if self.queries == "last":
            return keep_top(view.last_token_attention.mean(1), budget)
        return keep_top(text_attention(view), budget)


@dataclass(frozen=True)
class GSearchGreedy(GSearch):
    """Rates that G-Search found on the very model (the paper's Scenario I)."""

    key: ClassVar[str] = "gsearch_greedy"


@dataclass(frozen=True)
class GSearchBayes(GSearch):
    """A P-Sigmoid whose k was found on the very model (the paper's Scenario II)."""

    key: ClassVar[str] = "gsearch_bayes"


def printed_k(share: float, decoder_layers: int) -> float:
    """The paper's k of the budget nearest to `share` of the tokens, scaled to this depth (kit)."""
    return K_32[min(K_32, key=lambda budget: abs(budget - share))] * 32 / decoder_layers


def p_sigmoid(k: float, alpha: float, layers: range) -> tuple[float, ...]:
    """Keep rates 1 / (1 + exp(k (i - alpha))) of layers i (0-based); tanh does not overflow."""
    return tuple((1 - math.tanh(k * (i - alpha) / 2)) / 2 for i in layers)


@lru_cache  # asked for before every layer
def _p_sigmoid_counts(k: float, kept: int, patches: int, decoder_layers: int) -> tuple[int, ...]:
    """Visual tokens at every layer: a P-Sigmoid whose mean behind the full layers is `kept`."""
    behind = range(FULL, decoder_layers)

    def at(alpha: float) -> tuple[int, ...]:
        return _counts(p_sigmoid(k, alpha, behind), patches)

    # 40 / k layers beyond either end the sigmoid is 0 or 1 to the last bit.
    least, most = -40 / k, decoder_layers + 40 / k
    alpha = solve(at, least, most, kept * len(behind))
    return (*[patches] * FULL, *at(alpha))


def text_attention(view: LayerView) -> Float[Tensor, "images visual"]:
    """S: attention of the text behind each image, mean over heads and its tokens."""
    received = view.attention_from(view.text.index).mean(1)
    asks = view.text.behind.to(received.dtype)[..., None]
    return (received * asks).sum(1) / asks.sum(1)


def _counts(rates: tuple[float, ...], patches: int) -> tuple[int, ...]:
    """floor(r N), at least 1; the slack is for r N that is whole but for its last bit."""
    return tuple(max(1, math.floor(rate * patches + 1e-9)) for rate in rates)
