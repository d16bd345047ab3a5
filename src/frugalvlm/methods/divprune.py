"""DivPrune: keep the tokens that differ most from each other.

Attention scores keep many tokens that look alike. DivPrune instead solves the max-min diversity
problem greedily: the smallest distance between two kept tokens should be as large as possible.
Training-free and text-agnostic, and it needs no attention at all.

Paper: Alvar et al., arXiv:2503.02175 (CVPR 2025), Algorithm 1. Code read: vbdi/divprune at 799e2d9,
`llava_arch.py`.

1. d(i, j) = 1 - cosine of the projected features of patches i and j.
2. First token: the one whose nearest neighbour is farthest away.
3. Then, until T are chosen: the token whose nearest chosen token is farthest away.
4. Kept tokens stay in raster order; positions are renumbered.

LLaVA-NeXT: T per crop; the released code chooses among all tokens of the image at once.
Complexity: patches^2 distances, T steps; all patches go through the projector.
Deviations: the crops of LLaVA-NeXT, as above. Distances are computed in float32 (released code: in
the model's half precision, where many of them tie). A token is never chosen twice; the released
code can do so when nothing but copies of chosen tokens is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from frugalvlm.methods.base import SizedReducer
from frugalvlm.views import EncoderView, Reduced


@dataclass(frozen=True)
class DivPrune(SizedReducer):
    """Keep the `kept_tokens` most diverse patches of each crop."""

    key: ClassVar[str] = "divprune"

    def reduce(self, view: EncoderView) -> Reduced:
        """The kept patches in raster order."""
        # Half precision would tie most of the distances.
        precise = torch.promote_types(view.projected.dtype, torch.float32)
        unit = normalize(view.projected.to(precise), dim=-1)
        distance = 1 - unit @ unit.transpose(-1, -2)
        # Two tokens may be each other's nearest: the first one wins, not the rounding.
        distance = (distance + distance.transpose(-1, -2)) / 2
        itself = torch.eye(view.patch_count, dtype=torch.bool, device=distance.device)
        nearest = distance.masked_fill(itself, torch.inf).amin(1)
        chosen = []
        for step in range(self.kept_tokens):
            best = nearest.argmax(-1, keepdim=True)
            row = distance.gather(1, best[..., None].expand(-1, -1, view.patch_count))[:, 0]
            nearest = torch.minimum(nearest, row) if step else row
            chosen.append(best)
            nearest = nearest.scatter(1, torch.cat(chosen, 1), -torch.inf)
        source = torch.cat(chosen, 1).sort(-1).values
        tokens = view.patches.gather(1, source[..., None].expand(-1, -1, view.patches.shape[-1]))
        return Reduced(tokens, source)
