"""FasterVLM: keep the patches that the vision tower's [CLS] token attends to most.

The encoder's own [CLS] attention is concentrated and free of the position bias of text-to-image
attention inside the language model, so patches are ranked by it and the rest is dropped before
the language model sees anything. Training-free and text-agnostic.

Paper: Zhang et al., arXiv:2412.01818 **v1** (v2 is another method, VisPruner).
Code read: Theia-4869/FasterVLM at f5d5f12, `clip_encoder.py` and `llava_arch.py`.

1. a = attention row of [CLS] over the patches, in the layer whose output are the features.
2. s = mean of a over heads.
3. Keep the T patches with the largest s, in raster order; positions are renumbered.

LLaVA-NeXT: T per crop; no newline tokens and no un-padding, as in the released code.
Complexity: one query row; O(patches) memory.
Deviations: none (tokens are dropped before the projector instead of after it; it acts per token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from frugalvlm.methods.base import EncoderReducer, check_budget
from frugalvlm.methods.fields import Tokens
from frugalvlm.views import EncoderView, Reduced, Shape, UnsupportedError


@dataclass(frozen=True)
class FasterVLM(EncoderReducer):
    """Keep the `kept_tokens` patches of each crop with most [CLS] attention."""

    key: ClassVar[str] = "fastervlm"
    needs_cls: ClassVar[bool] = True
    kept_tokens: Annotated[Tokens, "T, per crop; 144 of 576 at a reduction ratio of 75 %"]

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """T is the budget."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens)

    def check(self, shape: Shape) -> None:
        """Needs a [CLS] token, and a budget in 1..patches."""
        if not shape.has_cls:
            raise UnsupportedError(
                "fastervlm ranks patches by [CLS] attention, and this vision tower has no [CLS] "
                "token; use a model with a CLIP tower, or visionzip with score='received'."
            )
        check_budget(self.kept_tokens, shape.most, self)

    def reduce(self, view: EncoderView) -> Reduced:
        """The kept patches in raster order."""
        score = view.cls_attention.mean(1)
        source = score.topk(self.kept_tokens, dim=-1).indices.sort(-1).values
        tokens = view.patches.gather(1, source[..., None].expand(-1, -1, view.patches.shape[-1]))
        return Reduced(tokens, source)
