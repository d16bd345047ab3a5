"""Natural early exit: a token leaves the decoder as soon as a gate says that its answer stands.

Intermediate layers are read through the model's own final norm and output layer; nothing is trained
and nothing is added. The paper finds that this ability is there in ordinary transformers, and that
gates without joint training find the right layer poorly.

Paper: Shan, Meng et al., arXiv:2412.01455v1. No code was released, and only the abstract was
readable: the formulas below are the standard ones of the early-exit literature, not quotations.

1. Layer l = 1..L leaves h_l; z_l = W_out norm(h_l), p_l = softmax(z_l), y_l = argmax z_l.
2. Gate, read after every layer from `first_layer` on:
   confidence: max p_l >= tau; entropy: H(p_l) / log V <= tau;
   patience: y_l is the same for the tau-th time in a row (tau repetitions).
3. The first layer g < L whose gate fires is the exit; y_g is emitted, layers g+1..L are skipped.
4. What a skipped layer puts in the KV cache (`kv_copy`):
   hidden: keys and values that it projects from h_g, at the token's own position;
   keys_values: a copy of the keys and values of layer g;
   recompute: its true ones. It is then not skipped: a control without saving.

Only decoding exits early; the prompt, image included, is read by all layers.
Complexity: one output-layer product per layer that is run.
Deviations: unknown, as the paper's text is. Whether norm is applied to h_l, and which of the two
copies the paper makes, is not settled; norm is applied, and both copies are here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from frugalvlm.methods.base import DepthPolicy, check_keeps_all
from frugalvlm.methods.fields import Limits, refuse
from frugalvlm.views import Shape, UnsupportedError

Gate = Literal["confidence", "entropy", "patience"]
KVCopy = Literal["hidden", "keys_values", "recompute"]


@dataclass(frozen=True)
class EarlyExit(DepthPolicy):
    """Leave at the first layer whose `gate` passes `threshold`.

    Thresholds out of reach (confidence above 1, entropy below 0, patience of L) never fire: the
    answers are then those of the untouched model.
    """

    key: ClassVar[str] = "early_exit"
    gate: Annotated[Gate, "what is read, see 2"] = "confidence"
    threshold: Annotated[
        float, "tau; of patience a number of layers; the paper's values are not known"
    ] = 0.9
    kv_copy: Annotated[KVCopy, "what skipped layers put in the KV cache, see 4"] = "hidden"
    first_layer: Annotated[int, Limits(1), "the first after which a token may leave"] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate == "patience" and (self.threshold < 1 or self.threshold % 1):
            raise refuse(self, "threshold", "with patience a whole number from 1, of layers")

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """Every visual token stays: the only budget is `total_tokens`."""
        check_keeps_all(cls.key, kept_tokens, total_tokens)
        return cls()

    def check(self, shape: Shape) -> None:
        """`first_layer` must exist."""
        if self.first_layer > shape.decoder_layers:
            raise UnsupportedError(
                f"early_exit cannot leave after layer {self.first_layer} of a decoder with "
                f"{shape.decoder_layers}; choose first_layer in 1..{shape.decoder_layers}."
            )

    def score(
        self, logits: Float[Tensor, "tokens vocabulary"], repeats: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """What the gate looks at, per token.

        Args:
            logits: z_l.
            repeats: for how many layers in a row y_l has been what it is now; 0 where it is new.
        """
        if self.gate == "patience":
            return repeats.float()
        log_p = logits.log_softmax(-1, dtype=torch.float32)
        if self.gate == "confidence":
            return log_p.max(-1).values.exp()
        return -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])

    def fires(self, score: Float[Tensor, "*tokens"]) -> Bool[Tensor, "*tokens"]:
        """Whether a token with this score may leave."""
        return score <= self.threshold if self.gate == "entropy" else score >= self.threshold
