"""ToMe: merge the most similar pairs of tokens, found by bipartite matching.

Tokens are dealt into two sets in turns; each of the first finds its most similar partner in the
second, and the best pairs become one token. Nothing is thrown away. Training-free, text-agnostic.

Paper: Bolya et al., arXiv:2210.09461 (ICLR 2023), section 3. Code read: facebookresearch/ToMe at
af95e4b, `tome/merge.py`.

One round, with n tokens:
1. Metric: keys averaged over heads; similarity is their cosine.
2. A = tokens 0, 2, 4, ...; B = tokens 1, 3, 5, ...
3. Each token of A has an edge to its most similar token of B.
4. The r best edges stay; along them A's tokens are merged into B's.
5. Merging is a mean weighted by size, the number of patches that a token stands for; the metric is
   merged alike. The next round reads A's unmerged tokens, then B.
Rounds of r = min(n // 2, n - T) until T tokens are left.

Complexity: (n/2)^2 similarities a round, at most log2(patches / T) + 1 rounds.
Deviations: ToMe merges inside the vision tower, some tokens in every block. An unmodified tower
keeps its length, so here all merging is done on its output with the keys of the layer that gives
the features, which is how tables of visual-token reduction run it on LLaVA. Sizes weigh the means;
they are not added to the attention logits, for the language model stays as it is. Unmerged tokens
keep their order between rounds (ToMe: only where there is a [CLS] token), and tokens reach the
language model in the order of their first patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from frugalvlm.methods.base import SizedReducer
from frugalvlm.views import MERGED_SOURCE, EncoderView, Reduced


@dataclass(frozen=True)
class ToMe(SizedReducer):
    """Merge the patches of each crop into `kept_tokens` tokens."""

    key: ClassVar[str] = "tome"

    def reduce(self, view: EncoderView) -> Reduced:
        """Merged and unmerged tokens in the order of their first patches."""
        keys, count = view.keys.mean(1), view.patch_count
        patch = torch.arange(count, device=keys.device).expand(view.crops, -1)
        group = patch  # the token that each patch is part of
        while count > self.kept_tokens:
            merged = min(count // 2, count - self.kept_tokens)
            group = _match(_means(keys, group, count), merged).gather(1, group)
            count -= merged

        first = torch.full_like(group, len(patch[0])).scatter_reduce(1, group, patch, "amin")
        group = first[:, :count].argsort(-1).argsort(-1).gather(1, group)
        size = one_hot(group, count).sum(1)
        first = first[:, :count].sort(-1).values
        alone = size.gather(1, group) == 1
        return Reduced(
            _means(view.patches, group, count),
            first.masked_fill(size > 1, MERGED_SOURCE),
            group.masked_fill(alone, -1),
        )


def _means(
    values: Float[Tensor, "crops patches width"], group: Int[Tensor, "crops patches"], count: int
) -> Float[Tensor, "crops count width"]:
    """The mean over each group's patches: what size-weighted means of means come to."""
    member = one_hot(group, count).to(values.dtype)
    return member.transpose(1, 2) @ values / member.sum(1)[..., None]


def _match(metric: Float[Tensor, "crops count width"], merged: int) -> Int[Tensor, "crops count"]:
    """One round: the new number of every token, unmerged ones of A first, then B."""
    unit = normalize(metric, dim=-1)
    similarity, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)).max(-1)
    unmerged = partner.shape[1] - merged
    worst_first = (
        similarity.argsort(dim=-1, descending=True, stable=True)[:, merged:].sort(-1).values
    )
    place = torch.arange(metric.shape[1] - merged, device=metric.device)
    new = torch.empty_like(metric[..., 0], dtype=torch.long)
    new[:, 1::2] = place[unmerged:]
    new[:, ::2] = (partner + unmerged).scatter(
        1, worst_first, place[:unmerged].expand(len(metric), -1)
    )
    return new
