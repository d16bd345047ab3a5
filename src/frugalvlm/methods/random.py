"""Random selection: the baseline that every token selector has to beat.

Keeps a uniformly random subset of the patches of each crop, right after the vision tower. The
choice depends on the seed and on the crop's pixels only, so a picture loses the same tokens in
any batch and in any run.

Source: none; the usual control, as in arXiv:2502.11501.
Complexity: O(patches log patches). Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from frugalvlm.methods.base import SizedReducer
from frugalvlm.methods.fields import Limits
from frugalvlm.views import EncoderView, Reduced


@dataclass(frozen=True)
class Random(SizedReducer):
    """Keep `kept_tokens` random patches of each crop."""

    key: ClassVar[str] = "random"
    seed: Annotated[int, Limits(0, 2**32 - 1), "another seed, another choice"] = 0

    def reduce(self, view: EncoderView) -> Reduced:
        """The kept patches in raster order."""
        noise = _hash(view.fingerprint[:, None] + self.seed * 7_919, view.patch_count)
        source = noise.topk(self.kept_tokens, dim=-1).indices.sort(-1).values
        return Reduced(
            view.patches.gather(1, source[..., None].expand(-1, -1, view.patches.shape[-1])), source
        )


def _hash(seeds: Int[Tensor, "crops 1"], count: int) -> Int[Tensor, "crops count"]:
    """Pseudo-random whole numbers from seeds: a multiply-xor-shift mix, the same on any device."""
    x = seeds * 1_000_003 + torch.arange(count, device=seeds.device)
    for multiplier in (0x45D9F3B3335B369, 0x3335B36945D9F3B):
        x = (x ^ (x >> 31)) * multiplier
    return (x ^ (x >> 33)) & 0x7FFFFFFFFFFF
