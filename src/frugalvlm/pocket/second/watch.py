"""How far down the decoder a scene is read, while training goes on: fast, without generation.

Development scenes are shown as pictures or told as stories, many questions share a scene, and an
answer counts as right when every token of it is the likeliest one. What the picture is worth
behind a layer comes from hiding it from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frugalvlm.pocket.packing import answered_right
from frugalvlm.pocket.second.objectives import Asking, Codes, coded_features, visual_features
from frugalvlm.pocket.second.questions import Categorised, training_questions
from frugalvlm.pocket.second.scenes import SecondScene, make_scene

Eyes = Literal["picture", "story", "codes"]
BATCH = 25


@dataclass(frozen=True)
class Exam:
    """Development scenes with questions about them."""

    scenes: tuple[SecondScene, ...]
    questions: tuple[tuple[Categorised, ...], ...]  # per scene

    @classmethod
    def of(cls, number: int, first_seed: int = 0, per_scene: int = 16, printed: bool = False
           ) -> Exam:  # fmt: skip
        """`number` development scenes; descriptions are left out, they are long."""
        scenes = tuple(
            make_scene("dev", seed, printed=printed)
            for seed in range(first_seed, first_seed + number)
        )
        return cls(scenes, tuple(
            tuple(q for q in training_questions(s, np.random.default_rng(s.seed), per_scene)
                  if q.family != "describe")
            for s in scenes
        ))  # fmt: skip


@torch.inference_mode()
def shown(asking: Asking, scenes: Sequence[SecondScene], eyes: Eyes, blank: bool) -> Tensor:
    """Visual tokens of scenes, or of a grey picture, or of a story in which nothing happens."""
    hidden = np.full(len(scenes), blank)
    if eyes == "story":
        rng = np.random.default_rng([scene.seed for scene in scenes])
        return asking.stories(scenes, rng, hidden)
    if eyes == "picture":
        return visual_features(asking.model, scenes, hidden)
    codes = Codes(asking.model.config.vision_config.hidden_size)
    return coded_features(asking.model, codes, scenes, hidden)


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: Exam,
    eyes: Eyes,
    *,
    blank: bool = False,
    sight: range | None = None,
) -> pd.DataFrame:
    """One row per question: scene, family, category, right.

    Args:
        model: the model.
        tokenizer: of the model.
        exam: what to ask.
        eyes: what stands in the prompt where the picture stands.
        blank: show nothing instead.
        sight: decoder layers (from 0) that see the picture; None: all.
    """
    asking, lines = Asking(model, tokenizer, 0), []
    for start in range(0, len(exam.scenes), BATCH):
        part = slice(start, start + BATCH)
        packs = [[asking.encode(q.text, q.answer) for q in qs] for qs in exam.questions[part]]
        features = shown(asking, exam.scenes[part], eyes, blank)
        right = answered_right(
            model, features, asking.encode.head, asking.encode.tail, packs, sight
        )
        for scene, questions, marks in zip(
            exam.scenes[part], exam.questions[part], right, strict=True
        ):
            lines += [
                {"scene": scene.seed, "family": q.family, "category": q.category, "right": mark}
                for q, mark in zip(questions, marks, strict=True)
            ]
    return pd.DataFrame(lines)


def removal_curve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: Exam,
    eyes: Eyes,
    layers: Iterable[int] | None = None,
) -> pd.DataFrame:
    """Accuracy and share of the visual gain by the last layer that sees the picture.

    Returns:
        Indexed by layer (0: a blank one), in percent: `accuracy`, `gain`.
    """
    depth = model.config.get_text_config().num_hidden_layers
    behind = range(1, depth) if layers is None else layers

    def score(blank: bool = False, sight: range | None = None) -> float:
        table = answers(model, tokenizer, exam, eyes, blank=blank, sight=sight)
        return 100 * float(table["right"].mean())

    points = {0: score(blank=True), **{k: score(sight=range(k)) for k in behind}, depth: score()}
    frame = pd.DataFrame({"accuracy": points})
    whole = points[depth] - points[0]
    frame["gain"] = 100 * (frame["accuracy"] - points[0]) / whole if whole > 0 else np.nan
    return frame
