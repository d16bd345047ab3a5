"""Batches of an official benchmark's questions, which stream: nothing is held but what is asked.

The pixels of all questions of GQA take 16 GB. So a batch is read, decoded and padded when its turn
comes, by other processes ahead of time where the model is on a GPU, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks.asking import chunks
from frugalvlm.benchmarks.official.base import Asked, Official
from frugalvlm.benchmarks.official.frames import Frame
from frugalvlm.digest import request_hash
from frugalvlm.errors import FrugalError

__all__ = ["STORE_BYTES", "Store", "Streamed", "TooLittleMemoryError", "batch_size_for"]

MOST = 32  # questions of a batch
ROOM = 0.7  # of free memory; the rest is for what is counted too low
STORE_BYTES = 2**31  # of what the vision tower made of pictures, for the next method


class TooLittleMemoryError(FrugalError, ValueError):
    """Not even one question fits into memory; the message says how much it takes."""


class Streamed:
    """An official benchmark's questions in batches, the same for every method.

    Args:
        benchmark: whose questions.
        processor: of the model.
        n: how many questions; 0: all.
        device: where the model is.
        frame: how it is asked.
        size: questions of a batch.
        ahead: processes that prepare batches ahead; 0: none.
        store: bytes of what the vision tower made of pictures, kept for the next method.

    Attributes:
        asked: the questions.
        rows: without pictures.
        size: of a batch.
        request: what records say of the questions and of the prompt.
        code: modules that decide the answers, beside those that always do.
    """

    def __init__(
        self, benchmark: Official, processor: ProcessorMixin, n: int, device: str, frame: Frame,
        size: int = 1, ahead: int = 0, store: int = STORE_BYTES,
    ) -> None:  # fmt: skip
        self.processor, self.device, self.frame = processor, device, frame
        self.size, self.ahead, self._room = size, ahead, store
        self.asked: Asked = benchmark.dataset("test", n)
        self.rows: list[dict[str, Any]] = self.asked.texts
        self.ids: list[str] = [row["question_id"] for row in self.rows]
        self.data_hash = request_hash(self.rows)
        self.request = {"data": benchmark.data_name, "prompt": frame.name}
        shared = ("base", "data", "frames", "asking")
        self.code = (
            *(f"benchmarks.official.{name}" for name in shared), benchmark.read.__module__,
        )  # fmt: skip
        # Prompts of similar length share a batch; the longest come first, so that too little
        # memory is known at once.
        order = sorted(
            range(len(self.rows)), key=lambda i: -len(frame.text(self.rows[i]["question"]))
        )
        self._order = order
        self._store = Store(store)

    @property
    def parts(self) -> list[Sequence[int]]:
        """The numbers of the questions, batch by batch."""
        return chunks(self._order, self.size)

    @property
    def batches(self) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """Question ids and model inputs, anew every time."""
        return self._stream(self.parts)

    def pending(self, done: Mapping[str, str | None]) -> Iterator[tuple[list[str], dict[str, Any]]]:
        """Batches with a question that is not answered yet."""
        return self._stream([p for p in self.parts if any(self.ids[i] not in done for i in p)])

    def kept(self, model: PreTrainedModel) -> Store:
        """What the vision tower made of pictures, as far as there is room."""
        return self._store

    def forget(self) -> None:
        """Give that room back."""
        self._store = Store(self._room)

    def prepared(self, part: Sequence[int]) -> tuple[list[str], Any]:
        """Ids and inputs of some questions, in main memory."""
        pictures = [self.frame.picture(self.asked.picture(i)) for i in part]
        texts = [self.frame.text(self.rows[i]["question"]) for i in part]
        inputs = self.processor(images=pictures, text=texts, return_tensors="pt", padding=True)
        return [self.ids[i] for i in part], inputs

    def _stream(self, parts: Sequence[Sequence[int]]) -> Iterator[tuple[list[str], dict[str, Any]]]:
        loader = DataLoader(
            _Prepared(self, parts), batch_size=None, collate_fn=_as_it_is,
            num_workers=min(self.ahead, len(parts)),
        )  # fmt: skip
        for ids, inputs in loader:
            yield ids, dict(inputs.to(self.device))


class _Prepared(torch.utils.data.Dataset):
    """Batches by their number, as a loader asks for them."""

    def __init__(self, questions: Streamed, parts: Sequence[Sequence[int]]) -> None:
        self.questions, self.parts = questions, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[list[str], Any]:
        return self.questions.prepared(self.parts[number])


def _as_it_is(batch: Any) -> Any:
    return batch


class Store(dict[bytes, Tensor]):
    """What comes first is kept, up to so many bytes; of what comes later only the last.

    Every method goes through all pictures in one order. A store that makes room for the newest
    would have forgotten each picture when it comes again.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.held = most, 0
        self._passing: dict[bytes, Tensor] = {}

    def __setitem__(self, key: bytes, value: Tensor) -> None:
        size = value.element_size() * value.nelement()
        if self.held + size <= self.most:
            self.held += size
            super().__setitem__(key, value)
        else:
            self._passing = {key: value}

    def __missing__(self, key: bytes) -> Tensor:
        return self._passing[key]


def batch_size_for(model: PreTrainedModel, tokens: int, free_bytes: int) -> int:
    """How many questions fit into memory at once: a power of two, at most MOST.

    Counted are the cache of keys and values, the widest activations of a layer, and one layer's
    attention matrix, which methods that read attention need.

    Args:
        model: the untouched model, in memory already.
        tokens: of the longest prompt, with its answer.
        free_bytes: beside the weights.

    Raises:
        TooLittleMemoryError: not even one fits.
    """
    text: Any = model.config.get_text_config()
    item = torch.empty((), dtype=model.dtype).element_size()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    cache = 2 * text.num_hidden_layers * (text.num_key_value_heads or heads) * head * item
    wide = (6 * text.hidden_size + 3 * text.intermediate_size) * item
    matrix = 2 * heads * tokens * 4  # weights in float32, and once more while they are summed
    each = tokens * (cache + wide + matrix) + 4 * text.vocab_size
    fit = int(ROOM * free_bytes) // each
    if fit < 1:
        raise TooLittleMemoryError(
            f"One question of {tokens} tokens takes about {each / 2**30:.1f} GiB beside the "
            f"weights and {free_bytes / 2**30:.1f} GiB are free: take a larger GPU."
        )
    return min(MOST, 2 ** (fit.bit_length() - 1))
