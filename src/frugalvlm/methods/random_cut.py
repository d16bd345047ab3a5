"""Controls that cut where a method cuts and keep as many tokens there, at random.

A method inside the decoder gains by cutting late as well as by choosing. Its twin here has its
layers and its counts, and dice in place of its ranking: the difference of the two is what the
choice is worth.

Source: none; controls. That random choices rival attention inside decoders is shown in
arXiv:2502.11501 and arXiv:2511.02650.

1. Cuts and numbers of tokens are those of the method with the same hyper-parameters.
2. The tokens that stay are drawn anew at every cut, evenly. The dice depend on the seed, the layer
   and the words behind the picture only: the same prompt keeps the same places in any batch and in
   any run.

Complexity: that of the method's own ranking, which is computed to learn its counts.
Deviations: where the method makes new tokens of dropped ones (`sparsevlm`), as many more are drawn
instead. The twin of `sgl` asks no small model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from frugalvlm.methods.aim import AIM
from frugalvlm.methods.base import LayerReducer, check_budget
from frugalvlm.methods.fastv import FastV
from frugalvlm.methods.fields import Limits, Share, Tokens
from frugalvlm.methods.gsearch import GSearch
from frugalvlm.methods.pyramiddrop import PyramidDrop
from frugalvlm.methods.sgl import SGL
from frugalvlm.methods.sparsevlm import SparseVLM
from frugalvlm.views import Kept, LayerView, Shape, keep_top

Seed = Annotated[int, Limits(0, 2**32 - 1), "another seed, another choice"]


@dataclass(frozen=True)
class _Dice(LayerReducer):
    """Keeps as many tokens as the class behind it, at random."""

    seed: Seed = 0

    def keep(self, view: LayerView) -> Kept:
        """As many tokens as the method keeps; random ones, in order."""
        wanted = super().keep(view)  # type: ignore[safe-super]
        if wanted.counts == view.counts or not any(wanted.counts):
            return Kept(wanted.index, wanted.counts)
        return keep_top(dice(view, self.seed), wanted.counts)


@dataclass(frozen=True)
class RandomFastV(_Dice, FastV):
    """FastV's cut, random tokens."""

    key: ClassVar[str] = "random_fastv"


@dataclass(frozen=True)
class RandomPyramidDrop(_Dice, PyramidDrop):
    """PyramidDrop's schedule, random tokens."""

    key: ClassVar[str] = "random_pyramiddrop"


@dataclass(frozen=True)
class RandomGSearch(_Dice, GSearch):
    """P-Sigmoid's schedule, random tokens."""

    key: ClassVar[str] = "random_gsearch"


@dataclass(frozen=True)
class RandomSparseVLM(_Dice, SparseVLM):
    """SparseVLM's schedule, random tokens and none recycled."""

    key: ClassVar[str] = "random_sparsevlm"


@dataclass(frozen=True)
class RandomAIM(_Dice, AIM):
    """AIM's merging and its schedule, random tokens pruned."""

    key: ClassVar[str] = "random_aim"


@dataclass(frozen=True)
class RandomSGL(LayerReducer):
    """SGL's cut, random tokens; no small model is asked."""

    key: ClassVar[str] = "random_sgl"
    kept_tokens: Annotated[Tokens, "R, per crop"]
    depth: Annotated[Share, "K = int(depth * layers), as SGL has it"]
    seed: Seed = 0

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """As SGL's: what is left after layer K, which is the earlier the less is left."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens, kept_tokens / total_tokens)

    def check(self, shape: Shape) -> None:
        """As SGL's."""
        self._twin.check(shape)

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """As SGL's."""
        return self._twin.layers(decoder_layers)

    def keep(self, view: LayerView) -> Kept:
        """Random tokens, in order."""
        return keep_top(dice(view, self.seed), view.per_crop(self.kept_tokens))

    @property
    def _twin(self) -> SGL:
        return SGL(self.kept_tokens, self.depth)


def dice(view: LayerView, seed: int) -> Float[Tensor, "images visual"]:
    """A number in 0..1 for every visual token; padding slots hold -1.

    Args:
        view: whose visual tokens; its prompt and layer seed the numbers.
        seed: another one gives others.
    """
    score = torch.full(view.visual.shape, -1.0)
    for image, (start, count) in enumerate(zip(_seeds(view), view.counts, strict=True)):
        mixed = start * 1_000_003 + seed * 7_919 + view.layer * 104_729
        generator = torch.Generator().manual_seed(mixed % 2**63)
        score[image, :count] = torch.rand(count, generator=generator)
    return score.to(view.visual.device)


def _seeds(view: LayerView) -> list[int]:
    """A whole number for each image from the words behind it: bare embeddings are exact."""
    if view.visual.is_meta:
        return [0] * len(view.counts)
    text = view.text
    exact = (text.embeddings.double() * 2**16).round().to(torch.int64)
    weights = torch.arange(exact.shape[-1], device=exact.device) % 65_521 + 1
    words = (exact * weights).sum(-1)[view.rows]
    places = text.behind.long().cumsum(-1) * 1_000_003 % 65_521
    return (words * places * text.behind).sum(-1).tolist()
