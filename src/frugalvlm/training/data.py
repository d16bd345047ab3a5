"""What methods are trained on: questions about pictures with their answers, by number.

Example i is the same for ever, so the data of a step follow from its number. Embedded models get
questions about scenes of the training split, of their own generation; others a file in LLaVA's
format with a folder of pictures.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor, nn
from transformers import ProcessorMixin

from frugalvlm.benchmarks.base import prompt
from frugalvlm.errors import FrugalError
from frugalvlm.pocket import questions, scenes
from frugalvlm.pocket import recipe as first_recipe
from frugalvlm.pocket.recipe import seed_of
from frugalvlm.pocket.second import questions as second_questions
from frugalvlm.pocket.second import recipe as second_recipe
from frugalvlm.pocket.second import scenes as second_scenes

IGNORED = -100  # label of a token that is no answer
STAGE = 40  # scenes of methods lie behind those of any stage of a model's own training


class DataError(FrugalError, ValueError):
    """Training data that are not there or not in the format; says what to do."""


class Batch(TypedDict):
    """A step's prompts with their answers, padded on the right.

    Attributes:
        inputs: what the model takes: `input_ids`, `attention_mask`, `pixel_values` and so on.
        labels: [batch, length] the answer's tokens, end of sequence included, where they stand;
            `IGNORED` elsewhere.
        numbers: [batch] of the examples.
    """

    inputs: dict[str, Tensor]
    labels: Int[Tensor, "batch length"]
    numbers: Int[Tensor, " batch"]


@dataclass(frozen=True)
class Example:
    """One question."""

    picture: Image.Image
    question: str
    answer: str


class Examples(ABC):
    """Questions by number."""

    @abstractmethod
    def __getitem__(self, number: int) -> Example:
        """The example of this number, from 0; there is no last one."""

    def describe(self) -> dict[str, Any]:
        """What a card says of the data, and a resumed run must find again."""
        return {"examples": type(self).__name__}


@dataclass(frozen=True)
class PocketExamples(Examples):
    """Questions about scenes of the training split, one a scene, of all families in turn.

    Attributes:
        seed: another seed, other scenes.
        second: scenes of the second generation.
    """

    seed: int = 0
    second: bool = False

    @staticmethod
    def for_processor(processor: Any, seed: int = 0) -> PocketExamples:
        """The generation whose words a model's tokenizer knows."""
        known = processor.tokenizer.get_vocab()
        return PocketExamples(seed, all(w in known for w in second_questions.NEW_WORDS))

    def __getitem__(self, number: int) -> Example:
        """A scene with a question about it."""
        dice = np.random.default_rng([self.seed, number])
        make = _second_generation if self.second else _first_generation
        return make(seed_of(STAGE + self.seed, 0, 1, number), number, dice)

    def describe(self) -> dict[str, Any]:
        """Generation and seed."""
        return {**super().describe(), "generation": 2 if self.second else 1, "seed": self.seed}


def _first_generation(seed: int, number: int, dice: np.random.Generator) -> Example:
    most = first_recipe.MIXED[number % len(first_recipe.MIXED)]
    scene = scenes.make_scene("train", seed, most)
    asked = questions.training_questions(scene, dice, 1)[0]
    return Example(scene.image(), asked.text, asked.answer)


def _second_generation(seed: int, number: int, dice: np.random.Generator) -> Example:
    most = second_recipe.MIXED[number % len(second_recipe.MIXED)]
    printed = number % second_recipe.PRINTED == second_recipe.PRINTED - 1
    scene = second_scenes.make_scene("train", seed, most, printed)
    asked = second_questions.training_questions(scene, dice, 1)[0]
    return Example(scene.image(), asked.text, asked.answer)


class LlavaExamples(Examples):
    """A file in the format of LLaVA's instruction data, in a shuffled order, over and over.

    Of it the samples with one picture and one turn count, as DyVTE's authors chose them.

    Args:
        file: the JSON file.
        pictures: the folder that its picture names refer to.
        seed: of the order.

    Raises:
        DataError: there is no such file, or no sample that counts in it.
    """

    def __init__(self, file: Path, pictures: Path, seed: int = 0) -> None:
        try:
            samples = json.loads(file.read_text(encoding="utf-8"))
            self.samples = [s for s in samples if "image" in s and len(s["conversations"]) == 2]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{file} cannot be read as LLaVA's instruction data ({error}): name a JSON list of "
                "samples with `image` and `conversations`."
            ) from error
        if not self.samples:
            raise DataError(f"{file} holds no sample with one picture and one turn.")
        self.file, self.pictures, self.seed = file, pictures, seed

    def __getitem__(self, number: int) -> Example:
        """A sample; each round has an order of its own."""
        turn, place = divmod(number, len(self.samples))
        order = np.random.default_rng([self.seed, turn]).permutation(len(self.samples))
        sample = self.samples[order[place]]
        asked, said = (turn["value"] for turn in sample["conversations"])
        picture = Image.open(self.pictures / sample["image"]).convert("RGB")
        return Example(picture, asked.replace("<image>", "").strip(), said)

    def describe(self) -> dict[str, Any]:
        """File, number of samples and seed."""
        told = {"file": self.file.name, "samples": len(self.samples), "seed": self.seed}
        return {**super().describe(), **told}


class Numbered(torch.utils.data.Dataset):
    """Examples as a data set of so many, for a loader.

    Args:
        examples: what it shows.
        first: number of the first one.
        count: how many.
    """

    def __init__(self, examples: Examples, first: int, count: int) -> None:
        self.examples, self.first, self.count = examples, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> tuple[int, Example]:
        return self.first + place, self.examples[self.first + place]


class Collator:
    """Examples as a batch, tokenised as the benchmarks' prompts are."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor: Any = processor

    def __call__(self, numbered: Sequence[tuple[int, Example]]) -> Batch:
        """A batch of numbered examples."""
        tokenizer = self.processor.tokenizer
        rows, labels, pictures = [], [], []
        for _, example in numbered:
            made = self.processor(
                images=example.picture, text=prompt(example.question), return_tensors="pt"
            )
            said = tokenizer(example.answer, add_special_tokens=False).input_ids
            said = torch.tensor([*said, tokenizer.eos_token_id])
            asked = made.pop("input_ids")[0]
            made.pop("attention_mask")
            pictures.append(made)
            rows.append(torch.cat([asked, said]))
            labels.append(torch.cat([torch.full_like(asked, IGNORED), said]))
        padded = nn.utils.rnn.pad_sequence
        ids = padded(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths).long()}
        for name in pictures[0]:
            inputs[name] = torch.cat([picture[name] for picture in pictures])
        return {
            "inputs": inputs,
            "labels": padded(labels, batch_first=True, padding_value=IGNORED),
            "numbers": torch.tensor([number for number, _ in numbered]),
        }
