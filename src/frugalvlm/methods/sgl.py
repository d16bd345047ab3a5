"""SGL: a small model answers first; its attention tells a large one which visual tokens to drop.

One decoder layer's attention ranks visual tokens badly, the attention of all layers together ranks
them well, and a small model of the family ranks them almost as the large one does. So the small
model's attention is summed up while it answers, and where its answer looks safe it is the answer.

Paper: Zhao et al., arXiv:2412.03324 (CVPR 2025), section 3. Code read: NUS-HPC-AI-Lab/SGL at
7e76fd2, `modeling_internlm2.py` and `modeling_internvl_chat.py`.

1. The guide reads the prompt: A_P = attention that each visual token gets, summed over layers,
   heads and the prompt's rows from its last visual token on.
2. It decodes its answer: A_D = the same, summed over the generated tokens that are fed back.
3. A = A_P + A_D, plain sums.
4. SGP: before decoder layer K the large model keeps the R visual tokens with the largest A, in
   order and with their position ids; the KV cache of layers below K stays full.
5. SEE: S = (confidence + consistency) / 2. Confidence is the geometric mean of the probabilities
   of the guide's answer tokens; consistency the product of these probabilities when the guide sees
   only its top 5 % of visual tokens. From a threshold on S the guide's answer is returned.

Complexity: the guide's whole answer, and one query row per token behind the picture and per layer.
Deviations: prompts with several pictures take the rows from the last one on (the paper has one).
The exit (5) is not in the released code; `exit_score` is the score, who compares it may exit. No
minimum answer length: an answer may be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from jaxtyping import Bool, Float
from torch import Tensor

from frugalvlm.methods.base import GuidedReducer, check_budget
from frugalvlm.methods.fields import Share, Tokens, refuse
from frugalvlm.methods.schedules import check_depth, check_mean
from frugalvlm.views import Kept, LayerView, Shape, UnsupportedError, keep_top

Queries = Literal["both", "prompt", "generated", "last_prompt"]
LAST_PROMPT, PROMPT, GENERATED = range(3)  # along `sources` of a guidance


@dataclass(frozen=True)
class SGL(GuidedReducer):
    """Keep the `kept_tokens` visual tokens per crop that a guide attends to most, from K on."""

    key: ClassVar[str] = "sgl"
    kept_tokens: Annotated[Tokens, "R, per crop"]
    depth: Annotated[
        Share, "K = int(depth * layers); the paper's tables have depth = share of tokens kept"
    ]
    queries: Annotated[Queries, "whose attention counts, Table 3"] = "both"
    guide_from: Annotated[Share, "the guide's first layer that counts, of its depth"] = 0.0
    guide_to: Annotated[Share, "its last, Table 2"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide_from > self.guide_to:
            raise refuse(self, "guide_from", f"at most guide_to, which is {self.guide_to}")

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The budget is what is left after layer K, which is the earlier the less is left."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens, kept_tokens / total_tokens)

    @classmethod
    def for_mean(cls, mean_tokens: int, total_tokens: int, decoder_layers: int) -> Self:
        """The largest budget whose mean over all layers is at most this one.

        Raises:
            BudgetError: when the first layer alone exceeds it.
        """
        check_budget(mean_tokens, total_tokens)
        check_depth(decoder_layers)
        least = total_tokens + decoder_layers - 1
        check_mean(cls.key, mean_tokens, least, decoder_layers, 1)
        method = cls.for_budget(1, total_tokens)
        for kept in range(1, total_tokens + 1):
            larger = cls.for_budget(kept, total_tokens)
            (cut,) = larger.layers(decoder_layers)
            if cut * total_tokens + (decoder_layers - cut) * kept > mean_tokens * decoder_layers:
                break
            method = larger
        return method

    def check(self, shape: Shape) -> None:
        """The budget must be in 1..patches, and there must be layers to cut between."""
        check_budget(self.kept_tokens, shape.most, self)
        if shape.decoder_layers < 2:
            raise UnsupportedError("sgl drops tokens between decoder layers; this model has one.")

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """One cut, before layer K, with at least one layer on either side of it."""
        return (min(max(int(self.depth * decoder_layers), 1), decoder_layers - 1),)

    def keep(self, view: LayerView) -> Kept:
        """The tokens that the guide attended to most, in order."""
        assert self.ask is not None, "`on` says whom to ask"
        score = self.importance(self.ask(view).attention)
        return keep_top(score.to(view.visual.device), view.per_crop(self.kept_tokens))

    def importance(
        self, attention: Float[Tensor, "layers sources images visual"]
    ) -> Float[Tensor, "images visual"]:
        """A (section 3.2), from the guide's attention; padding slots are negative."""
        first = min(round(self.guide_from * len(attention)), len(attention) - 1)
        counted = attention[first : max(first + 1, round(self.guide_to * len(attention)))].sum(0)
        sources = {
            "both": (PROMPT, GENERATED),
            "prompt": (PROMPT,),
            "generated": (GENERATED,),
            "last_prompt": (LAST_PROMPT,),
        }[self.queries]
        return counted[list(sources)].sum(0)


def confidence(
    log_probs: Float[Tensor, "batch new"], valid: Bool[Tensor, "batch new"]
) -> Float[Tensor, " batch"]:
    """Geometric mean of the probabilities of an answer's tokens, end of sequence included."""
    return ((log_probs * valid).sum(1) / valid.sum(1)).exp()


def exit_score(
    confidence: Float[Tensor, " batch"], consistency: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """S of SEE (section 3.3): the guide's answer is returned from a threshold on it on."""
    return (confidence + consistency) / 2
