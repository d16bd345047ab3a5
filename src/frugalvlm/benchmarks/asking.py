"""Asking a model a benchmark's questions: batches that every method shares, and its answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks.base import Benchmark, prompt, without_pictures
from frugalvlm.digest import request_hash
from frugalvlm.views import UnsupportedError

BATCH_SIZE = 32


class Batches:
    """A benchmark's questions, tokenised and padded once, the same for every method.

    Attributes:
        towers: what each model's vision tower made of the pictures (see `tower_once`).
        size: questions of a batch.
        request: what records say of the questions beside the benchmark's name.
        code: modules that decide the answers, beside those that always do.

    Raises:
        UnsupportedError: the questions are about clips, and the processor takes none.
    """

    def __init__(
        self, benchmark: Benchmark, processor: ProcessorMixin, split: str, n: int, device: str
    ) -> None:
        self.processor, self.device = processor, device
        self._data: Dataset = benchmark.dataset(split, n)  # type: ignore[arg-type]
        self._shown = "frames" if "frames" in self._data.column_names else "image"
        _check_shown(processor, self._shown == "frames")
        self.rows: list[dict[str, Any]] = list(without_pictures(self._data))
        self.ids: list[str] = [row["question_id"] for row in self.rows]
        self.data_hash = request_hash(self.rows)
        self.towers: WeakKeyDictionary[PreTrainedModel, dict[bytes, Tensor]] = WeakKeyDictionary()
        self.size = BATCH_SIZE
        self.request: dict[str, str] = {}
        self.code: tuple[str, ...] = ()

    @cached_property
    def batches(self) -> list[tuple[list[str], dict[str, Any]]]:
        """Question ids and model inputs; prepared when the first answer is missing."""
        # Questions of similar length share a batch, so little is spent on padding.
        order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]["question"]))
        return [
            (
                [self.ids[i] for i in part],
                prepare(self.processor, [self._data[i][self._shown] for i in part],
                        [self.rows[i]["question"] for i in part], self.device),
            )
            for part in chunks(order, BATCH_SIZE)
        ]  # fmt: skip

    def kept(self, model: PreTrainedModel) -> dict[bytes, Tensor]:
        """What the vision tower of a model made of the pictures, to be added to."""
        return self.towers.setdefault(model, {})

    def pending(self, done: dict[str, str | None]) -> Iterable[tuple[list[str], dict]]:
        """Batches with a question that is not answered yet."""
        return [b for b in self.batches if any(i not in done for i in b[0])]


def chunks(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """`order` cut into pieces of `size`; the last one may be shorter."""
    return [order[i : i + size] for i in range(0, len(order), size)]


def _check_shown(processor: ProcessorMixin, clips: bool) -> None:
    if clips and getattr(processor, "video_processor", None) is None:
        raise UnsupportedError(
            f"{type(processor).__name__} takes no videos: ask about clips with a model that does, "
            "such as one of the LLaVA-OneVision family."
        )


def prepare(
    processor: ProcessorMixin, images: list, questions: list[str], device: str
) -> dict[str, Any]:
    """Model inputs for questions about pictures, or about clips: lists of frames.

    One prompt per question, padded to the longest, on `device`.
    """
    clips = bool(images) and isinstance(images[0], list)
    texts = [prompt(q, "<video>" if clips else "<image>") for q in questions]
    shown = {"videos" if clips else "images": images}
    inputs = processor(**shown, text=texts, return_tensors="pt", padding=True)
    return dict(inputs.to(device))


@torch.inference_mode()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, inputs: dict, max_new_tokens: int
) -> list[str | None]:
    """Greedy answers of a batch."""
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]


def answer_all(
    model: PreTrainedModel, batches: Batches, max_new_tokens: int, blank: bool = False
) -> list[str | None]:
    """Answers of the untouched model to all questions, in order; `blank` hides the pictures."""
    done: dict[str, str | None] = {}
    for ids, inputs in batches.batches:
        if blank:
            inputs = {
                name: torch.zeros_like(value) if name.startswith("pixel_values") else value
                for name, value in inputs.items()
            }
        done.update(zip(ids, answer(model, batches.processor, inputs, max_new_tokens), strict=True))
    return [done[i] for i in batches.ids]
