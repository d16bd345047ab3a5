"""DyVTE: small trained gates tell from the text whether the picture is still needed, and when not,
all visual tokens leave the decoder.

After some layer the visual tokens no longer change the answer, and that layer differs from question
to question. A gate behind every layer looks at two text vectors; at the first that says "exit" the
remaining layers read text only.

Paper: Wu et al., arXiv:2411.19628v2 (NeurIPS 2025), sections 3 and 4. Code read: DoubtedSteam/DyVTE
at b4a3396, `modeling_llama.py` (of the first version of the paper), `modeling_llama_fastv.py`.

1. T = states of the text behind the picture (question and cue) as they leave layer k, not normed;
   f_k = [mean of all but the last of T ; the last of T] (Eq. 1).
2. p = softmax(GELU(f_k W1) W2), no biases; W1 has h = 2048 columns (d = 4096 and 5120).
3. At the first layer k with p[1] > p[0] every visual token leaves; layers 0..k have seen it
   (0-based). Position ids stay; KV caches of later layers hold no visual token.
4. While an answer is decoded no gate is asked.
The gates alone are trained, see `frugalvlm.training.dyvte`.

Complexity: 4 d h products per prompt and layer until the exit.
Deviations: the last layer's gate is not asked, as nothing comes behind it. Where no gate fires the
released code asks the gates again at the first new token, and stops with an error; here the picture
stays. Each prompt of a batch exits by itself (the code: one prompt); of several pictures in one the
text behind the first counts, and all leave. A single word behind the picture is its own mean.
Narrower decoders have h = d / 2, as the paper's 7B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from frugalvlm.methods.base import LayerReducer, check_budget
from frugalvlm.methods.fields import Limits, Share, Tokens, refuse
from frugalvlm.methods.trained import Sizes, TrainedMethod
from frugalvlm.views import (
    BudgetError,
    Kept,
    LayerView,
    Shape,
    UnsupportedError,
    keep_top,
)

Inputs = Literal["mean_text", "last_text", "mean_visual", "last_visual"]
TEXT_INPUTS: tuple[Inputs, ...] = ("mean_text", "last_text")


class Gate(nn.Module):
    """The paper's "hyper-network" of one layer: two linear maps without biases."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(features, hidden, bias=False)
        self.w2 = nn.Linear(hidden, 2, bias=False)
        for layer in (self.w1, self.w2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, features: Float[Tensor, "prompts features"]) -> Float[Tensor, "prompts 2"]:
        """Logits of "keep" and "exit"."""
        return self.w2(nn.functional.gelu(self.w1(features)))


def gate_input(
    hidden: Float[Tensor, "batch length width"],
    parts: Mapping[str, Bool[Tensor, "batch length"]],
    inputs: Sequence[Inputs] = TEXT_INPUTS,
) -> Float[Tensor, "batch features"]:
    """f_k (Eq. 1): of the text, say, the mean of all but the last, and the last.

    Args:
        hidden: what left a layer.
        parts: where "text" (behind the picture) and "visual" tokens stand; at least one in a row.
        inputs: which vectors, in order.
    """
    return torch.cat([_vector(hidden, parts[name.partition("_")[2]], name) for name in inputs], -1)


def _vector(hidden: Tensor, part: Bool[Tensor, "batch length"], name: str) -> Tensor:
    at = torch.arange(part.shape[1], device=part.device)
    last = (part * at).argmax(1)
    if name.startswith("last"):
        return hidden[torch.arange(len(hidden), device=last.device), last]
    others = part & ((at != last[:, None]) | (part.sum(1, keepdim=True) == 1))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    sums = (others[:, None].to(wide) @ hidden.to(wide))[:, 0]
    return (sums / others.sum(1, keepdim=True)).to(hidden.dtype)


@dataclass(frozen=True)
class DyVTE(TrainedMethod, LayerReducer):
    """Drop all visual tokens behind the first layer whose trained gate says so.

    `load` gives it its gates. The gates decide how much is kept; a budget has no part in it.
    """

    key: ClassVar[str] = "dyvte"
    adaptive: ClassVar[bool] = True
    hidden: Annotated[
        int | None, Limits(1), "h, width of a gate; None: d / 2, at most the paper's 2048"
    ] = None
    inputs: Annotated[tuple[Inputs, ...], "what a gate sees; others in Table 4"] = TEXT_INPUTS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise refuse(self, "inputs", "at least one of those vectors")

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The gates decide, whatever the budget."""
        check_budget(kept_tokens, total_tokens)
        return cls()

    def build(self, sizes: Sizes) -> nn.Module:
        """A gate for each layer, the last included (the paper trains it, too)."""
        hidden = self.hidden or max(1, min(2048, sizes.width // 2))
        features = len(self.inputs) * sizes.width
        return nn.ModuleList([Gate(features, hidden) for _ in range(sizes.decoder_layers)])

    def check(self, shape: Shape) -> None:
        """There must be layers to exit between."""
        if shape.decoder_layers < 2:
            raise UnsupportedError(f"{self.key} exits between decoder layers; this model has one.")

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """Behind every layer but the last."""
        return tuple(range(1, decoder_layers))

    def fires(self, logits: Float[Tensor, "prompts 2"]) -> Bool[Tensor, " prompts"]:
        """Whether the picture is no longer needed."""
        return logits[:, 1] > logits[:, 0]

    def keep(self, view: LayerView) -> Kept:
        """All visual tokens of a prompt, or none."""
        left = self.exits(view)
        counts = tuple(0 if gone else n for gone, n in zip(left.tolist(), view.counts, strict=True))
        every = torch.arange(max(counts), device=view.visual.device)
        return Kept(every.expand(len(counts), -1), counts)

    def exits(self, view: LayerView) -> Bool[Tensor, " images"]:
        """For each picture whether its prompt exits here, or did so before."""
        if view.hidden.is_meta:
            raise UnsupportedError(
                f"{self.key} exits where values say so, and meta tensors have none: count its "
                "costs with ManualExit at the layers that it was seen to exit at."
            )
        gone = torch.tensor([n == 0 for n in view.counts], device=view.hidden.device)
        if not any(view.counts):
            return gone
        rows = view.rows[~gone].unique()
        parts = {"text": text_behind(view)[rows], "visual": visual_tokens(view)[rows]}
        logits = self.own[view.layer - 1](gate_input(view.hidden[rows], parts, self.inputs))
        fired = torch.zeros(len(view.hidden), dtype=torch.bool, device=gone.device)
        fired[rows] = self.fires(logits)
        return fired[view.rows] | gone


def text_behind(view: LayerView) -> Bool[Tensor, "batch length"]:
    """The text of each prompt behind its first picture."""
    marked = torch.zeros(view.hidden.shape[:2], dtype=torch.long, device=view.hidden.device)
    index = view.text.index[view.rows]
    rows = view.rows[:, None].expand_as(index)
    return marked.index_put((rows, index), view.text.behind.long(), accumulate=True) > 0


def visual_tokens(view: LayerView) -> Bool[Tensor, "batch length"]:
    """The visual tokens of each prompt that are still there."""
    batch, length = view.hidden.shape[:2]
    marked = torch.zeros(batch, length + 1, dtype=torch.bool, device=view.hidden.device)
    marked[view.rows[:, None], view.visual] = True  # padding slots lie behind the sequence
    return marked[:, :length]


@dataclass(frozen=True)
class DyVTERate(DyVTE):
    """DyVTE with a knob, which the paper does not have: exit where p[1] is above `threshold`."""

    key: ClassVar[str] = "dyvte_rate"
    weights_of: ClassVar[str] = "dyvte"
    threshold: Annotated[Share, "of p[1]; 0.5 is DyVTE, less exits earlier"] = 0.5

    def fires(self, logits: Float[Tensor, "prompts 2"]) -> Bool[Tensor, " prompts"]:
        """Whether the gate is sure enough."""
        return logits.softmax(-1, dtype=torch.float32)[:, 1] > self.threshold


@dataclass(frozen=True)
class DyVTEFastV(DyVTE):
    """DyVTE and FastV together, as released: FastV's cut before layer `k`, gates everywhere."""

    key: ClassVar[str] = "dyvte_fastv"
    weights_of: ClassVar[str] = "dyvte"
    kept_tokens: Annotated[Tokens, "what FastV keeps of a crop; half of them in the paper"] = 288
    k: Annotated[int, Limits(1), "FastV's K, decoder layers that keep all"] = 2

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The budget is what FastV leaves."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens=kept_tokens)

    def check(self, shape: Shape) -> None:
        """As both."""
        super().check(shape)
        check_budget(self.kept_tokens, shape.patches, self)
        if not self.k < shape.decoder_layers:
            raise UnsupportedError(
                f"{self.key} drops tokens before decoder layer k={self.k}, but this decoder has "
                f"{shape.decoder_layers} layers; choose k in 1..{shape.decoder_layers - 1}."
            )

    def keep(self, view: LayerView) -> Kept:
        """At K the most attended tokens of the prompts that do not exit."""
        kept = super().keep(view)
        if view.layer != self.k:
            return kept
        budget = view.per_crop(self.kept_tokens)
        counts = tuple(min(a, b) for a, b in zip(kept.counts, budget, strict=True))
        return keep_top(view.last_token_attention.mean(1), counts)


@dataclass(frozen=True)
class ManualExit(LayerReducer):
    """All visual tokens leave behind the first `after` decoder layers, without any training.

    The paper's Figure 3 removes them so; it is also what DyVTE costs at a given exit.
    """

    key: ClassVar[str] = "manual_exit"
    after: Annotated[int | None, Limits(1), "layers that see the picture; None: all of them"]

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """A number of layers is needed, too: see `for_mean`.

        Raises:
            BudgetError: for any budget but all, which never exits.
        """
        check_budget(kept_tokens, total_tokens)
        if kept_tokens < total_tokens:
            raise BudgetError(
                "manual_exit keeps all visual tokens or none: give the mean over the decoder's "
                "layers with for_mean, or the layers that see the picture with ManualExit(after)."
            )
        return cls(None)

    @classmethod
    def for_mean(cls, mean_tokens: int, total_tokens: int, decoder_layers: int) -> Self:
        """The budget is the mean over all layers, to the nearest whole number of layers."""
        check_budget(mean_tokens, total_tokens)
        return cls(max(1, round(mean_tokens * decoder_layers / total_tokens)))

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """One cut; none where all layers see the picture."""
        after = decoder_layers if self.after is None else self.after
        return (after,) if after < decoder_layers else ()

    def keep(self, view: LayerView) -> Kept:
        """Nothing of any picture."""
        nothing = torch.zeros(len(view.counts), 0, dtype=torch.long, device=view.visual.device)
        return Kept(nothing, (0,) * len(view.counts))
