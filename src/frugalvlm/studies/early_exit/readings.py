"""What every layer of a decoder would say, read through the model's own output layer.

One pass over a prompt and its answer shows, for each token of the answer, what the state behind
every block, and between attention and MLP inside it, already predicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from frugalvlm.engine.exits import Reader
from frugalvlm.methods import EarlyExit
from frugalvlm.methods.early_exit import Gate

PARTS = ("whole word", "first piece", "later piece")


@dataclass(frozen=True, eq=False)
class Answered:
    """A batch of prompts and the untouched model's greedy answers.

    Attributes:
        inputs: what the model is given.
        ids: [batch, places] the answers, the end token included; padding behind it.
        real: [batch, places] which of them are no padding.
        items: the number of each row's prompt in its source.
    """

    inputs: Mapping[str, Tensor]
    ids: Tensor
    real: Tensor
    items: np.ndarray


@torch.inference_mode()
def generate(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Greedy answers [batch, places], and which of their places are no padding."""
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    ids = ids[:, inputs["input_ids"].shape[1] :]
    return ids, no_padding(ends(model, ids))


def ends(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Which tokens end an answer."""
    eos = model.generation_config.eos_token_id  # a number, several, or none
    return torch.isin(ids, ids.new_tensor([] if eos is None else eos))


def no_padding(ended: Tensor) -> Tensor:
    """Which places [batch, places] belong to an answer: all up to its first end."""
    return ended.cumsum(-1) - ended.long() == 0


@dataclass(frozen=True, eq=False)
class Readings:
    """What every place inside the decoder says, for all answer tokens of a batch.

    Attributes:
        halves: [2 x layers, tokens] words: after attention and after the MLP of each block.
        scores: by gate, [layers, tokens], behind each block.
    """

    halves: np.ndarray
    scores: dict[str, np.ndarray]

    @property
    def words(self) -> np.ndarray:
        """Words behind each block, [layers, tokens]; the last row is the model's answer."""
        return self.halves[1::2]

    @property
    def first_match(self) -> np.ndarray:
        """The first block, from 1, that says what the last one says."""
        return (self.words == self.words[-1]).argmax(0) + 1

    @property
    def saturation(self) -> np.ndarray:
        """The first block from which on all say what the last one says."""
        other = (self.words != self.words[-1])[::-1]  # from the last block down
        return np.where(other.any(0), len(other) - other.argmax(0) + 1, 1)

    @property
    def after_attention(self) -> np.ndarray:
        """Whether the first match comes after the attention of a block, before its MLP."""
        return (self.halves == self.halves[-1]).argmax(0) % 2 == 0

    def exits(self, method: EarlyExit) -> np.ndarray:
        """The block at which each token would leave with a gate, whatever others do."""
        fires = self.fires(method)
        return np.where(fires.any(0), fires.argmax(0) + 1, len(self.words))

    def fires(self, method: EarlyExit) -> np.ndarray:
        """Whether the gate fires behind each block but the last, [layers - 1, tokens]."""
        return method.fires(torch.from_numpy(self.scores[method.gate][:-1])).numpy()


@torch.inference_mode()
def read(model: PreTrainedModel, batch: Answered, gates: Iterable[Gate]) -> Readings:
    """Read all states of one pass over prompts and answers; see `Readings`."""
    reader, looks = Reader(model), {gate: EarlyExit(gate, 1) for gate in gates}
    length = batch.inputs["input_ids"].shape[1]
    halves: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {gate: [] for gate in looks}
    repeats = torch.zeros(int(batch.real.sum()), dtype=torch.long, device=batch.ids.device)

    def answers(hidden: Tensor) -> Tensor:
        """Logits at the places that predict the answer tokens."""
        return reader.logits(hidden[:, length - 1 : -1][batch.real])

    def inside(module: Any, args: tuple) -> None:
        halves.append(answers(args[0]).argmax(-1))

    def behind(module: Any, args: tuple, output: Tensor) -> None:
        nonlocal repeats
        logits = answers(output)
        word = logits.argmax(-1)
        before = halves[-2] if len(halves) > 1 else word - 1
        repeats = (repeats + 1).where(word == before, 0)
        halves.append(word)
        for gate, method in looks.items():
            scores[gate].append(method.score(logits, repeats))

    mask = torch.cat([batch.inputs["attention_mask"], batch.real.long()], 1)
    inputs = {
        **batch.inputs,
        "input_ids": torch.cat([batch.inputs["input_ids"], batch.ids], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    with hooked(
        *(layer.post_attention_layernorm.register_forward_pre_hook(inside)
          for layer in reader.layers),
        *(layer.register_forward_hook(behind) for layer in reader.layers),
    ):  # fmt: skip
        model(**inputs, use_cache=False, logits_to_keep=1)
    every = {gate: torch.stack(rows).cpu().numpy() for gate, rows in scores.items()}
    return Readings(torch.stack(halves).cpu().numpy(), every)


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Take hooks away again."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def word_parts(tokens: Sequence[str]) -> list[str]:
    """For each token of an answer, one of PARTS.

    Knows the marks of word pieces (`##` in front of a later one) and of SentencePiece and
    byte-level BPE (`▁`, `Ġ` in front of a first one). Signs and special tokens are whole words.
    """
    marked = any(token.startswith(("▁", "Ġ")) for token in tokens)

    def later(token: str) -> bool:
        if not marked:
            return token.startswith("##")
        return not token.startswith(("▁", "Ġ")) and token[:1].isalnum()

    parts = []
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        first = later(following) and token.strip("▁Ġ")[:1].isalnum()
        parts.append(PARTS[2] if later(token) else PARTS[1] if first else PARTS[0])
    return parts
