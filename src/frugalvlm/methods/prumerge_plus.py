"""LLaVA-PruMerge+: attention outliers, an even supplement, and a merge with similar tokens.

Few patches get far more [CLS] attention than the others: keep these outliers, add evenly spaced
patches so that no region is lost, and let each kept token take in the tokens most like it. How many
outliers there are depends on the picture; tables at a fixed budget take equally many of both kinds.
Training-free here; the paper also fine-tunes with it.

Paper: Shang et al., arXiv:2403.15388, sections 3.2-3.4. Code read: 42Shawn/LLaVA-PruMerge at
097c041, `clip_encoder.py`, `token_prune_merge_advanced_plus`.

1. a = softmax of [CLS] with all positions, in the layer that reads the features (CLIP's last), all
   heads taken as one: q.k / sqrt(width).
2. Outliers: a above Q3 + 1.5 (Q3 - Q1). Their number is M.
3. Supplement: every s-th patch that is no outlier, s = floor(floor(N / M) / 3).
4. Each kept token adds to itself the attention-weighted sum of the k patches whose keys are most
   similar (cosine; kept ones count too). The weights are not normalised.
5. One more token: the attention-weighted sum of all patches that were not kept.
6. The language model reads outliers by falling attention, the supplement in raster order, and the
   extra token.

At a budget T: the T // 2 most attended patches, (T - 1) // 2 as supplement, and the extra token.
Complexity: one query row, keys of one more tower layer, kept x N similarities.
Deviations: a fixed budget's supplement is spread evenly over the patches that are left (the
released training branch takes fixed places and may take a patch twice). An image without outliers
has one, the most attended patch; one with so many that everything would be kept drops the last of
the supplement; a picture in tiles that would keep more than the model's own cutting of its margins
leaves room for loses the tokens of those margins. T = N keeps every patch and merges nothing. k
keeps its share of 32 in 576 patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from frugalvlm.methods.base import EncoderReducer, check_budget
from frugalvlm.methods.fields import Limits, Tokens
from frugalvlm.views import MERGED_SOURCE, EncoderView, Reduced, Shape, UnsupportedError, softmax


@dataclass(frozen=True)
class PruMergePlus(EncoderReducer):
    """Keep and merge to `kept_tokens` tokens per crop, or as many as its outliers ask for."""

    key: ClassVar[str] = "prumerge_plus"
    needs_cls: ClassVar[bool] = True
    kept_tokens: Annotated[
        Tokens | None, "T, per crop, the extra token included; None: adaptive, as published"
    ] = None
    neighbours: Annotated[int, Limits(1), "k, patches that a kept token takes in, of 576"] = 32

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """T is the budget; k is 32 of 576."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens, max(1, round(32 * total_tokens / 576)))

    def check(self, shape: Shape) -> None:
        """Needs a [CLS] token; the budget must be in 1..patches, k in 1..patches-1."""
        if not shape.has_cls:
            raise UnsupportedError(
                "prumerge_plus finds outliers of the [CLS] attention, and this vision tower has no "
                "[CLS] token; use a model with a CLIP tower, or tome."
            )
        check_budget(self.kept_tokens or 1, shape.most, self)
        if not shape.follows:
            raise UnsupportedError(
                "prumerge_plus reads the tower layer behind the features, and here they leave the "
                "tower's last layer: use visionzip, or a model with an earlier "
                "vision_feature_layer (LLaVA: -2)."
            )
        if self.neighbours >= shape.patches:
            raise UnsupportedError(
                f"{self} merges each token with {self.neighbours} others, but this model has "
                f"{shape.patches} patches per crop: choose neighbours in 1..{shape.patches - 1}."
            )

    def reduce(self, view: EncoderView) -> Reduced:
        """Outliers, supplement, extra token."""
        if self.kept_tokens == view.patch_count:
            every = torch.arange(view.patch_count, device=view.patches.device)
            return Reduced(view.patches, every.expand(view.crops, -1))
        reads = view.following
        width = reads.keys.shape[1] * reads.keys.shape[-1]
        attention = softmax(reads.cls_logits.sum(1) * width**-0.5)[:, 1:]
        keys = normalize(reads.keys.transpose(1, 2).flatten(2), dim=-1)
        if self.kept_tokens is not None:
            chosen = _fixed(attention, self.kept_tokens)
            return Reduced(*_merged(view.patches, attention, keys, chosen, self.neighbours))
        if attention.is_meta:
            raise UnsupportedError(
                "How many outliers there are depends on the picture; for inputs without values set "
                "kept_tokens."
            )
        rows = [
            _merged(
                view.patches[i : i + 1],
                attention[i : i + 1],
                keys[i : i + 1],
                _adaptive(attention[i])[None],
                self.neighbours,
            )
            for i in range(view.crops)
        ]
        tokens, source, merged_into = zip(*rows, strict=True)
        pad = torch.nn.utils.rnn.pad_sequence
        return Reduced(
            pad([t[0] for t in tokens], batch_first=True),
            pad([s[0] for s in source], batch_first=True, padding_value=MERGED_SOURCE),
            torch.cat(merged_into),
            tuple(s.shape[1] for s in source),
        )


def _fixed(attention: Float[Tensor, "crops patches"], kept: int) -> Int[Tensor, "crops chosen"]:
    """Half of the budget by attention, half evenly spaced over the rest, but for one token."""
    outliers, more = kept // 2, (kept - 1) // 2
    order = attention.argsort(dim=-1, descending=True, stable=True)
    rest = order[:, outliers:].sort(-1).values
    every = torch.arange(more, device=attention.device)
    places = (2 * every + 1) * rest.shape[1] // max(1, 2 * more)
    return torch.cat([order[:, :outliers], rest[:, places]], 1)


def _adaptive(attention: Float[Tensor, " patches"]) -> Int[Tensor, " chosen"]:
    """Outliers by the interquartile range, and every s-th other patch."""
    count = len(attention)
    low, high = attention.quantile(attention.new_tensor([0.25, 0.75]))
    found = max(1, int((attention > high + 1.5 * (high - low)).sum()))
    outliers = attention.argsort(dim=-1, descending=True, stable=True)[:found]
    step = max(1, count // found // 3)
    grid = torch.arange(0, count - 1, step, device=attention.device)
    grid = grid[~torch.isin(grid, outliers)]
    return torch.cat([outliers, grid])[: count - 1]


def _merged(
    patches: Float[Tensor, "crops patches width"],
    attention: Float[Tensor, "crops patches"],
    keys: Float[Tensor, "crops patches key_width"],
    chosen: Int[Tensor, "crops chosen"],
    neighbours: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their patches, and where the patches that were not kept went: the extra token."""
    attention = attention.to(patches.dtype)

    def own(values: Tensor) -> Tensor:
        return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))

    similarity = own(keys) @ keys.transpose(-1, -2)
    similarity = similarity.scatter(-1, chosen[..., None], -torch.inf)
    nearest = similarity.topk(neighbours, dim=-1).indices
    weights = torch.zeros_like(similarity).scatter(-1, nearest, 1.0) * attention[:, None]
    left = attention.scatter(1, chosen, 0.0)
    tokens = torch.cat([own(patches) + weights @ patches, left[:, None] @ patches], 1)
    source = torch.cat([chosen, chosen.new_full((len(chosen), 1), MERGED_SOURCE)], 1)
    extra = torch.full_like(left, chosen.shape[1], dtype=torch.long).scatter(1, chosen, -1)
    return tokens, source, extra
