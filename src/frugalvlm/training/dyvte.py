"""How DyVTE's gates are trained: is the answer the same when the picture is gone behind a layer?

For each step one exit layer l is drawn. The prompt with its answer is read twice, as it is and with
the visual tokens hidden from all layers behind l. A prompt is labelled "exit" where the likeliest
answer tokens stay the same and the answer's cross-entropy hardly grows (Eq. 4-6); the gate of layer
l learns the label. Nothing but gates has gradients.

Paper: arXiv:2411.19628v2, section 4. Code read: DoubtedSteam/DyVTE at b4a3396, `modeling_llama.py`,
from which come the numbers 0.99 (share of equal tokens) and 1.03 (the paper's tau, as a factor on
the prompt's own cross-entropy), the layer drawn once a step, and masks in place of removal.
Deviation: a visual token whose every key is hidden sees itself; nothing sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from frugalvlm.hosts import Host, host_for
from frugalvlm.methods.dyvte import gate_input
from frugalvlm.training.data import IGNORED, Batch
from frugalvlm.training.lesson import Lesson, Log, Objective, Recipe
from frugalvlm.views import UnsupportedError

AGREEMENT, TAU = 0.99, 1.03


class ExitObjective(Objective):
    """Two-class cross-entropy of the drawn layer's gate."""

    def __call__(self, batch: Batch, dice: np.random.Generator) -> tuple[Tensor, Log]:
        """The loss; how often the gate is right, and how often it should have said "exit"."""
        host = host_for(self.model)
        layer = int(dice.integers(host.shape.decoder_layers))
        with torch.no_grad():
            hidden, parts, labels = lesson_of_layer(host, batch, layer)
            features = gate_input(hidden, parts, self.method.inputs)
        own = self.method.own[layer]
        logits = own(features.to(own.w1.weight.dtype)).float()
        right = (logits.argmax(-1) == labels).float().mean()
        told: Log = {"right": right, "exit": labels.float().mean(), "layer": layer}
        return F.cross_entropy(logits, labels), told


def lesson_of_layer(
    host: Host, batch: Batch, layer: int
) -> tuple[
    Float[Tensor, "batch length width"], dict[str, Bool[Tensor, "batch length"]],
    Int[Tensor, " batch"],
]:  # fmt: skip
    """What the gate of a layer (0-based) may see of each prompt, and what it should say of it.

    States that left the layer, where the parts of the prompts stand (answers are none), and labels.
    """
    ids, labels = batch["inputs"]["input_ids"], batch["labels"]
    pictures = host.placeholders(ids)
    real = batch["inputs"]["attention_mask"] > 0
    with twofold(host, layer, pictures, real) as seen:
        states = host.inner(**batch["inputs"], use_cache=False).last_hidden_state
    text = (pictures.cumsum(1) > 0) & ~pictures & real & (labels == IGNORED)
    said = labels[:, 1:] != IGNORED  # predicted by the token before
    head, both = host.model.lm_head, states[:, :-1].chunk(2)
    whole, without = (head(part[said]).float() for part in both)
    owner = said.nonzero()[:, 0]
    made = exit_labels(whole, without, labels[:, 1:][said], owner)
    return seen.hidden, {"text": text, "visual": pictures}, made


def exit_labels(
    whole: Float[Tensor, "tokens vocabulary"],
    without: Float[Tensor, "tokens vocabulary"],
    wanted: Int[Tensor, " tokens"],
    owner: Int[Tensor, " tokens"],
) -> Int[Tensor, " batch"]:
    """y of Eq. 4-6: 1 where a prompt may exit.

    Args:
        whole: logits of the answers' tokens, of the model as it is.
        without: the same, the picture hidden behind the exit.
        wanted: the true answers.
        owner: which prompt each token belongs to; every prompt has one.
    """

    def mean(values: Tensor) -> Tensor:
        prompts = int(owner.max()) + 1
        sums = values.new_zeros(prompts).index_add(0, owner, values)
        return sums / torch.bincount(owner, minlength=prompts)

    same = mean((whole.argmax(-1) == without.argmax(-1)).float())
    losses = (mean(F.cross_entropy(x, wanted, reduction="none")) for x in (without, whole))
    loss, usual = losses
    return ((same > AGREEMENT) & (loss < TAU * usual)).long()


@dataclass
class _Seen:
    """What a doubled pass shows: the states that left the exit layer."""

    hidden: Any = None


@contextmanager
def twofold(
    host: Host, layer: int, pictures: Bool[Tensor, "batch length"],
    real: Bool[Tensor, "batch length"],
) -> Iterator[_Seen]:  # fmt: skip
    """Inside, the decoder reads a batch once up to a layer (included), and twice behind it.

    The second half of what comes out is that of a model whose later layers do not see the pictures.

    Raises:
        UnsupportedError: for an attention kernel that takes no such mask.
    """
    decoder = host.language_model
    kernel = decoder.config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise UnsupportedError(
            f"DyVTE's gates are trained with masks that '{kernel}' does not take: load the model "
            "with attn_implementation='sdpa'."
        )
    seen = _Seen()
    length = real.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=real.device)
    causal = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
    keys = torch.cat([real, real & ~pictures])
    visible = ((causal & keys[:, None]) | itself)[:, None]

    def mask_for(hidden: Tensor) -> Tensor:
        if kernel == "sdpa":
            return visible
        return hidden.new_zeros(()).expand(visible.shape).masked_fill(
            ~visible, torch.finfo(hidden.dtype).min
        )  # fmt: skip

    def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        if seen.hidden is None:
            seen.hidden = hidden
            hidden = torch.cat([hidden, hidden])
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = mask_for(hidden)
        return (hidden, *args[1:]), kwargs

    with ExitStack() as stack:
        for module in (*decoder.layers[layer + 1 :], decoder.norm):
            hook = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
        yield seen


# Widths differ by a factor of 25 to 40 from the paper's, and with them the learning rate.
LESSON = Lesson(
    ExitObjective,
    {
        "pocket-llava-base": (Recipe(steps=480, batch=32, learning_rate=1e-3),),
        "pocket-llava-small": (Recipe(steps=480, batch=32, learning_rate=1e-3),),
        "pocket-llava-hd": (Recipe(steps=480, batch=16, learning_rate=1e-3),),
        "pocket-siglip-base": (Recipe(steps=480, batch=32, learning_rate=1e-3),),
        "pocket-llava-tiny": (Recipe(steps=20, batch=8, learning_rate=1e-3),),
        # The paper's: 1 % of 665 thousand samples, once; the released script's batch.
        "": (Recipe(steps=52, batch=128, learning_rate=4e-5, parts=8),),
    },
)
