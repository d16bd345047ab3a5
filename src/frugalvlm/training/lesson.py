"""What a paper's training consists of: its recipes, and what it minimises."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from frugalvlm.checks import check_whole
from frugalvlm.errors import FrugalError
from frugalvlm.methods import METHODS
from frugalvlm.methods.trained import TrainedMethod
from frugalvlm.training.data import Batch

Log = dict[str, Tensor | float]


class TrainingError(FrugalError, ValueError):
    """Training that cannot start or go on; says what to do."""


@dataclass(frozen=True)
class Recipe:
    """One stage of training.

    Attributes:
        steps: optimiser steps.
        batch: prompts a step.
        learning_rate: the highest; warmed up linearly, then down along half a cosine to 0.
        warmup: share of the steps.
        weight_decay: of AdamW.
        clip: largest norm of the gradients.
        trains: how the names of the trained parameters begin; "own." are the method's modules,
            "tuned." the model's parameters.
        parts: batches that a step is computed in, to save memory (gradient accumulation).
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    trains: tuple[str, ...] = ("own.",)
    parts: int = 1

    def __post_init__(self) -> None:
        check_whole("steps of a recipe", self.steps)
        check_whole("batch of a recipe", self.batch)
        check_whole("parts of a recipe", self.parts)
        if self.batch % self.parts:
            raise TrainingError(f"A batch of {self.batch} cannot be cut into {self.parts} parts.")


class Objective(ABC):
    """What a paper minimises.

    Attributes:
        method: with the modules that are being trained.
        model: the vision-language model, in evaluation mode.
    """

    def __init__(self, method: Any, model: PreTrainedModel) -> None:
        self.method, self.model = method, model

    @abstractmethod
    def __call__(self, batch: Batch, dice: np.random.Generator) -> tuple[Tensor, Log]:
        """The loss of a batch, and figures for the log.

        Args:
            batch: prompts with their answers.
            dice: all randomness of the step.
        """


@dataclass(frozen=True)
class Lesson:
    """How a method is trained.

    Attributes:
        objective: its class.
        recipes: by embedded model the stages of its training; "" for any other model.
    """

    objective: type[Objective]
    recipes: Mapping[str, tuple[Recipe, ...]]

    def recipes_for(self, model: str) -> tuple[Recipe, ...]:
        """The stages for a model.

        Raises:
            TrainingError: when none is known.
        """
        found = self.recipes.get(model) or self.recipes.get("")
        if found is None:
            raise TrainingError(
                f"There is no recipe for '{model}'. Known: {', '.join(self.recipes)}."
            )
        return found


def lesson_of(method: type) -> Lesson:
    """The lesson of a method's class.

    Raises:
        TrainingError: when the method learns nothing.
    """
    key = getattr(method, "key", "")
    room = f"{__name__.rpartition('.')[0]}.{key}"
    if not issubclass(method, TrainedMethod) or importlib.util.find_spec(room) is None:
        raise TrainingError(
            f"{key or method.__name__} has nothing to train. Methods that learn: "
            f"{', '.join(learners())}."
        )
    return importlib.import_module(room).LESSON


def learners() -> list[str]:
    """Keys of the methods with a lesson."""
    return [key for key, method in METHODS.items() if issubclass(method, TrainedMethod)]
