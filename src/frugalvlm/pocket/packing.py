"""Many questions about one picture in one forward pass, each as if it were asked alone.

Training pays for a picture's visual tokens once and asks some twenty questions behind them. Every
question attends to the prefix (the picture) and to itself, never to its neighbours. The attention
below computes just these blocks: no mask over the whole packed sequence is ever built, which on a
CPU makes the step about three times faster than masked attention over the packed sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

Asked = tuple[list[int], list[int]]  # tokens of a question with its cue; tokens of its answer

ATTENTION = "frugalvlm_packed"  # name under which Transformers finds the block attention
_ROUND = 4  # slots are rounded up to this many tokens, so that equal ones share a computation


@dataclass(frozen=True)
class Slots:
    """Where questions lie in a packed sequence: behind `prefix` tokens, one slot after another."""

    prefix: int
    lengths: tuple[int, ...]
    visual: tuple[int, int] = (0, 0)  # first token of the picture and of what follows it
    sight: range | None = None  # decoder layers whose text sees the picture; None: all

    @property
    def total(self) -> int:
        """Length of the packed sequence."""
        return self.prefix + sum(self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """First token of every slot."""
        ends = torch.tensor((self.prefix, *self.lengths)).cumsum(0)
        return tuple(int(e) for e in ends[:-1])

    def groups(self) -> Iterator[tuple[int, int]]:
        """Neighbouring slots of one length, as (how many, length)."""
        for length, same in groupby(self.lengths):
            yield len(list(same)), length


def _packed_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
    attention_mask: None,
    scaling: float,
    slots: Slots,
    **_: Any,
) -> tuple[Float[Tensor, "batch tokens heads dim"], None]:
    """Causal attention inside the prefix; every slot sees the prefix and, causally, itself."""
    p = slots.prefix
    head_key, head_value = key[:, :, :p], value[:, :, :p]
    layer: Any = module.layer_idx
    blind = slots.sight is not None and layer not in slots.sight
    unseen = slice(*slots.visual) if blind else slice(0, 0)
    parts = [_causal(query[:, :, :p], head_key, head_value, scaling, unseen)]
    start = p
    for count, length in slots.groups():
        piece = slice(start, start + count * length)
        start = piece.stop
        q, k, v = (t[:, :, piece].unflatten(2, (count, length)) for t in (query, key, value))
        to_prefix = (q.flatten(2, 3) @ head_key.mT).unflatten(2, (count, length))
        to_prefix[..., unseen] = float("-inf")
        to_self = q @ k.mT + _future(length, q)
        scores = torch.cat([to_prefix, to_self], -1) * scaling
        weights = scores.softmax(-1).to(v.dtype)
        seen = (weights[..., :p].flatten(2, 3) @ head_value).unflatten(2, (count, length))
        parts.append((seen + weights[..., p:] @ v).flatten(2, 3))
    return torch.cat(parts, 2).transpose(1, 2), None


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, unseen: slice = slice(0, 0)) -> Tensor:
    scores = (q @ k.mT + _future(q.shape[2], q)) * scaling
    # What nobody behind the picture sees may go on seeing itself.
    scores[:, :, unseen.stop :, unseen] = float("-inf")
    return scores.softmax(-1).to(v.dtype) @ v


def _future(length: int, like: Tensor) -> Float[Tensor, "length length"]:
    """Minus infinity above the diagonal."""
    full = torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device)
    return full.triu(1)


AttentionInterface.register(ATTENTION, _packed_attention)


@contextmanager
def packed_attention(decoder: PreTrainedModel) -> Iterator[None]:
    """Inside the block the decoder computes block attention and needs a `slots` argument."""
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def answer_loss(
    model: PreTrainedModel,
    features: Float[Tensor, "batch visual channels"],
    head: Sequence[int],
    tail: Sequence[int],
    packs: Sequence[Sequence[Asked]],
    offsets: Int[Tensor, "batch questions"] | None = None,
    sight: range | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of every answer, all questions of a picture sharing its visual tokens.

    Equals the loss of separate prompts (a test compares them).

    Args:
        model: a vision-language model of Transformers; its vision side is not used here.
        features: visual tokens as the decoder takes them.
        head: tokens in front of the visual ones.
        tail: tokens between the visual ones and the question.
        packs: per picture, questions and answers (with end of sequence) as tokens.
        offsets: how many positions further on each question stands, as if other turns of a
            conversation lay between it and the picture.
        sight: decoder layers (from 0) in which text sees the picture; None: all.

    Returns:
        The loss, in which a question weighs with the square root of its answer's length (so that
        a description counts for more than one word, but does not drown the one-word answers), and
        the share of answer tokens that the model would have guessed.
    """
    logits, said = _answer_logits(model, features, head, tail, packs, offsets, sight)
    losses = F.cross_entropy(logits, said.wanted, reduction="none")
    loss = (losses * said.weight).sum() / said.weight.sum()
    with torch.no_grad():
        right = (logits.argmax(-1) == said.wanted).float()
    return loss, {"tokens_right": right.mean()}


@torch.inference_mode()
def answered_right(
    model: PreTrainedModel,
    features: Float[Tensor, "batch visual channels"],
    head: Sequence[int],
    tail: Sequence[int],
    packs: Sequence[Sequence[Asked]],
    sight: range | None = None,
) -> list[list[bool]]:
    """Whether the greedy answer to each question is the whole right one.

    An answer is right when every token of it is the likeliest behind the ones before, which is
    when greedy decoding gives it. Arguments as for `answer_loss`.

    Args:
        model: as there.
        features: as there.
        head: as there.
        tail: as there.
        packs: as there.
        sight: as there.
    """
    logits, said = _answer_logits(model, features, head, tail, packs, None, sight)
    right = [[True] * len(pack) for pack in packs]
    for (b, i), good in zip(said.owner, (logits.argmax(-1) == said.wanted).tolist(), strict=True):
        right[b][i] &= good
    return right


@dataclass(frozen=True)
class _Said:
    """The answer tokens of a packed batch, in the order of its positions."""

    wanted: Tensor  # [tokens]
    weight: Tensor  # [tokens]
    owner: list[tuple[int, int]]  # picture and question of each token


def _answer_logits(
    model: PreTrainedModel, features: Tensor, head: Sequence[int], tail: Sequence[int],
    packs: Sequence[Sequence[Asked]], offsets: Tensor | None, sight: range | None,
) -> tuple[Tensor, _Said]:  # fmt: skip
    device = features.device
    batch, visual = features.shape[:2]
    sizes = [[len(ask) + len(answer) for ask, answer in pack] for pack in packs]
    order = [sorted(range(len(s)), key=s.__getitem__) for s in sizes]
    seen = (len(head), len(head) + visual)
    slots = _slots(len(head) + visual + len(tail), sizes, order)
    slots = replace(slots, visual=seen, sight=sight)

    pad = model.config.get_text_config().pad_token_id
    ids = torch.full((batch, slots.total), pad)
    targets = torch.full((batch, slots.total), -100)
    positions = torch.arange(slots.total).repeat(batch, 1)
    weights = torch.zeros(batch, slots.total)
    owner = torch.zeros(batch, slots.total, dtype=torch.long)
    ids[:, : len(head)] = torch.tensor(head, dtype=torch.long)
    ids[:, slots.prefix - len(tail) : slots.prefix] = torch.tensor(tail, dtype=torch.long)
    for b, pack in enumerate(packs):
        # Short questions first in every picture, so that slots fit; empty slots come first.
        used = list(zip(slots.starts, slots.lengths, strict=True))[len(slots.lengths) - len(pack) :]
        for (start, length), i in zip(used, order[b], strict=True):
            ask, answer = pack[i]
            end = start + len(ask) + len(answer)
            ids[b, start:end] = torch.tensor(ask + answer)
            # The token before an answer token predicts it.
            said = slice(start + len(ask) - 1, end - 1)
            targets[b, said] = torch.tensor(answer)
            weights[b, said] = len(answer) ** -0.5
            owner[b, said] = i
            shift = 0 if offsets is None else int(offsets[b, i])
            positions[b, start : start + length] = slots.prefix + shift + torch.arange(length)

    embeds = model.get_input_embeddings()(ids.to(device))
    embeds = torch.cat(
        [embeds[:, : len(head)], features.to(embeds.dtype), embeds[:, len(head) + visual :]], 1
    )
    decoder = model.model.language_model
    with packed_attention(decoder):
        hidden = decoder(
            inputs_embeds=embeds, position_ids=positions.to(device), use_cache=False, slots=slots
        ).last_hidden_state
    asked = (targets != -100).to(device)
    logits = model.lm_head(hidden[asked]).float()
    wanted, weight = targets.to(device)[asked], weights.to(device)[asked]
    picture = asked.nonzero()[:, 0].tolist()
    owners = list(zip(picture, owner[targets != -100].tolist(), strict=True))
    return logits, _Said(wanted, weight, owners)


def _slots(prefix: int, sizes: Sequence[list[int]], order: Sequence[list[int]]) -> Slots:
    """One slot per question; the k-th slot from the end fits every picture's k-th longest."""
    most = max(map(len, sizes))
    lengths = [1] * most
    for lengths_here, ranks in zip(sizes, order, strict=True):
        for k, i in enumerate(reversed(ranks)):
            lengths[most - 1 - k] = max(lengths[most - 1 - k], lengths_here[i])
    return Slots(prefix, tuple(-(-n // _ROUND) * _ROUND for n in lengths))
