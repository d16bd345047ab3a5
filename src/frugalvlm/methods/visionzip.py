"""VisionZip: dominant tokens by encoder attention, contextual tokens by merging the rest.

In the deep layers of the vision tower nearly all attention goes to a few tokens. VisionZip keeps
those, folds all others into a few contextual tokens by key similarity, and hands the short sequence
to an untouched language model.

Paper: Yang et al., arXiv:2412.04467 (CVPR 2025), section 3. Code read: dvlab-research/VisionZip at
3151f6d, `visionzip/clip_encoder.py`.

1. s_j = attention of [CLS] to patch j, summed over heads, in the layer that gives the features.
   Towers without [CLS] (SigLIP): s_j = attention that j receives, mean over heads and queries.
2. Dominant: [CLS] itself and the D-1 patches with the largest s, in raster order.
3. M = key projections of that layer, averaged over heads, L2-normalised.
4. Contextual targets: every (rest // C)-th of the remaining patches, the first C of them.
5. Each other remaining patch joins the target with the most similar key (cosine).
6. contextual = target + mean of the patches that joined it.
7. [CLS], dominant, contextual go through the projector; positions are renumbered.

Complexity: one query row and a (rest x C) similarity.
Deviations: step 6 is what the released code does; the mean of the whole group, as the paper's
prose suggests, is `merge="mean"` (`visionzip_mean`). C = 0 and D + C >= patches are defined here
(no merging; nothing to compress), the released code fails on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from frugalvlm.methods.base import EncoderReducer, check_budget
from frugalvlm.methods.fields import Limits, Tokens
from frugalvlm.views import (
    CLS_SOURCE,
    MERGED_SOURCE,
    BudgetError,
    EncoderView,
    Reduced,
    Shape,
    UnsupportedError,
)

Merge = Literal["target_plus_mean", "mean"]
# Table 8 and 9: (dominant with [CLS], contextual) of the paper's budgets per crop.
PAPER_BUDGETS = {192: (162, 30), 128: (108, 20), 64: (54, 10), 32: (27, 5)}


@dataclass(frozen=True)
class VisionZip(EncoderReducer):
    """Keep `dominant` tokens ([CLS] counts as one) and `contextual` merged ones, per crop."""

    key: ClassVar[str] = "visionzip"
    dominant: Annotated[Tokens, "D, per crop, [CLS] counted; 54 of 64"]
    contextual: Annotated[
        int, Limits(0, unit="visual tokens", error=BudgetError), "C, per crop; 10 of 64"
    ]
    merge: Annotated[Merge, "what a contextual token is, see 6"] = "target_plus_mean"
    score: Annotated[
        Literal["auto", "cls", "received"],
        "the attention that ranks, see 1; auto: of [CLS] where there is one",
    ] = "auto"

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The paper's split of a budget: 54 + 10 of 64 (about 16 % contextual)."""
        check_budget(kept_tokens, total_tokens)
        if kept_tokens == total_tokens:
            return cls(kept_tokens, 0)
        if total_tokens == 576 and kept_tokens in PAPER_BUDGETS:
            return cls(*PAPER_BUDGETS[kept_tokens])
        contextual = round(kept_tokens * 10 / 64)
        return cls(kept_tokens - contextual, contextual)

    def check(self, shape: Shape) -> None:
        """`dominant + contextual` must be in 1..patches."""
        check_budget(self.dominant + self.contextual, shape.most, self)
        if self.score == "cls" and not shape.has_cls:
            raise UnsupportedError(
                "visionzip with score='cls' needs a [CLS] token and this vision tower has none; "
                "use score='received'."
            )

    def reduce(self, view: EncoderView) -> Reduced:
        """[CLS], dominant patches in raster order, contextual tokens in target order."""
        if self.dominant + self.contextual >= view.patch_count:
            every = torch.arange(view.patch_count, device=view.patches.device)
            return Reduced(view.patches, every.expand(view.crops, -1))
        by_cls = self.score == "cls" or (self.score == "auto" and view.ranks_by_cls)
        score = view.cls_attention.sum(1) if by_cls else view.received_attention
        patches_kept = self.dominant - int(view.has_cls)
        order = score.argsort(dim=-1, descending=True, stable=True)
        dominant = order[:, :patches_kept].sort(-1).values
        rest = order[:, patches_kept:].sort(-1).values
        contextual, slots, targets = self._merge(view, rest)

        parts = [view.cls] if view.has_cls else []
        tokens = torch.cat([*parts, _pick(view.patches, dominant), contextual], 1)
        source = torch.full(tokens.shape[:2], MERGED_SOURCE, device=tokens.device)
        source[:, : self.dominant] = CLS_SOURCE
        source[:, self.dominant - patches_kept : self.dominant] = dominant
        if not self.contextual:
            return Reduced(tokens, source)
        nowhere = torch.full_like(order, -1)
        merged_into = nowhere.scatter(1, rest, slots + self.dominant)
        stands_at = torch.cat([source[:, : self.dominant], targets], 1)
        return Reduced(tokens, source, merged_into, stands_at=stands_at)

    def _merge(
        self, view: EncoderView, rest: Int[Tensor, "crops rest"]
    ) -> tuple[
        Float[Tensor, "crops contextual width"],
        Int[Tensor, "crops rest"],
        Int[Tensor, "crops contextual"],
    ]:
        """Contextual tokens, the one that each remaining patch went to, and their targets."""
        features = _pick(view.patches, rest)
        if not self.contextual:
            return features[:, :0], torch.zeros_like(rest), rest[:, :0]
        every = torch.arange(rest.shape[1], device=rest.device)
        target = every[:: max(1, len(every) // self.contextual)][: self.contextual]
        metric = normalize(_pick(view.keys.mean(1), rest), dim=-1)
        slots = (metric @ metric[:, target].transpose(-1, -2)).argmax(-1)
        slots[:, target] = every[: self.contextual]  # a target stands for itself
        joins = (slots[:, :, None] == every[: self.contextual]).to(features.dtype)
        if self.merge == "target_plus_mean":
            joins[:, target] = 0  # and takes no part in the mean
        mean = joins.transpose(1, 2) @ features / joins.sum(1)[..., None].clamp(min=1)
        if self.merge == "mean":
            return mean, slots, rest[:, target]
        return features[:, target] + mean, slots, rest[:, target]


@dataclass(frozen=True)
class VisionZipMean(VisionZip):
    """The variant whose contextual token is the true mean of its group."""

    key: ClassVar[str] = "visionzip_mean"
    merge: Annotated[Merge, "what a contextual token is, see 6"] = "mean"


def _pick(
    values: Float[Tensor, "crops patches width"], index: Int[Tensor, "crops kept"]
) -> Float[Tensor, "crops kept width"]:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
