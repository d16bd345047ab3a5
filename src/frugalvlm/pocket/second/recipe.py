"""The second training recipe: resumable, its data decided by seed and step alone.

In the order of real vision-language models: a decoder that has read texts only, a tower that has
seen pictures and captions only, a projector between the two while both stay frozen, instruction
tuning. The decoder's circuits are made by texts, in all of its layers, and pictures have to use
them: what a decoder meets late it does not take in at its first layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from frugalvlm.pocket.installed import models_dir
from frugalvlm.pocket.objectives import Log
from frugalvlm.pocket.recipe import (
    MuonAdamW,
    Progressed,
    RunFiles,
    load_weights,
    multiplies_bf16,
    seed_of,
)
from frugalvlm.pocket.scenes import IMAGE_SIZE
from frugalvlm.pocket.second.models import build_model, build_tokenizer, spec
from frugalvlm.pocket.second.objectives import (
    TEXT_SHARE,
    Codes,
    PictureObjective,
    Scaffold,
    Sight,
    TextObjective,
    TowerObjective,
)
from frugalvlm.pocket.second.scenes import MAX_THINGS, SecondScene, make_scene

StageName = Literal["text", "tower", "align", "instruct"]
Objective = Callable[[Sequence[SecondScene], np.random.Generator], tuple[Tensor, Log]]
PRINTED = 12  # one scene in so many shows print


@dataclass(frozen=True)
class Stage:
    """One stage of training. `steps` and `batch` count optimiser steps and scenes."""

    name: StageName
    steps: int
    batch: int
    learning_rate: float
    warmup: int
    questions: int = 0  # per scene
    things: tuple[int, ...] = (MAX_THINGS,)  # most things a scene may show, scene by scene
    decoder_rate: float = 1.0  # the decoder's learning rate as a share of the stage's
    tower: bool = False  # instruction tuning reaches the tower, too
    frozen_layers: int = 0  # instruction tuning leaves so many first decoder layers as they are
    sight: tuple[float, float] = (0.7, 0.3)  # shares of steps with few layers seeing, see `Sight`
    clips: float = 0.0  # share of the steps that show clips
    coded: bool = False  # codes stand for what the tower says: to try a recipe without a tower


# Every second scene is a simple one: names are learnt where there is one thing to look at.
MIXED = (1, 2, MAX_THINGS, MAX_THINGS)
STAGES: dict[str, tuple[Stage, ...]] = {
    "pocket-llava-base": (
        Stage("text", 2000, 16, 2.5e-3, 50, 16, MIXED),
        Stage("tower", 3000, 64, 3e-3, 100, things=MIXED),
        Stage("align", 100, 16, 2e-3, 10, 16, MIXED),
        Stage("instruct", 2000, 16, 2e-3, 40, 16, MIXED, decoder_rate=0.7),
    ),
    "pocket-llava-small": (
        Stage("text", 2000, 16, 3e-3, 50, 16, MIXED),
        Stage("tower", 3000, 64, 3e-3, 100, things=MIXED),
        Stage("align", 100, 16, 2e-3, 10, 16, MIXED),
        Stage("instruct", 2500, 16, 2.5e-3, 40, 16, MIXED, decoder_rate=0.7),
    ),
}


class Whole(nn.Module):
    """What a checkpoint holds: the model, and the scaffold that its training needs."""

    def __init__(self, model: PreTrainedModel, scaffold: Scaffold) -> None:
        super().__init__()
        self.model = model
        self.scaffold = scaffold


def scenes_of(stage: Stage, number: int, step: int, side: int = IMAGE_SIZE) -> list[SecondScene]:
    """The scenes of a step, `side` pixels wide: stages never share any."""
    seeds = [seed_of(number, step, stage.batch, i) for i in range(stage.batch)]
    return [
        make_scene(
            "train",
            seed,
            stage.things[i % len(stage.things)],
            printed=not stage.coded and seed % PRINTED == PRINTED - 1,
            side=side,
        )
        for i, seed in enumerate(seeds)
    ]


def train(
    name: str,
    folder: Path,
    stages: Sequence[Stage],
    *,
    seed: int = 0,
    start: Path | None = None,
    begin: int = 0,
    device: str = "cpu",
    checkpoint_every_s: float = 120.0,
    stop_after: int | None = None,
    told: Callable[[str, int, dict[str, float]], None] | None = None,
) -> Whole:
    """Train a model of the second generation, or continue a run that was interrupted.

    Args:
        name: a key of `second.models.SPECS`.
        folder: checkpoints and `log.jsonl` live here; a folder that holds a run is continued.
        stages: the recipe.
        seed: decides initial weights, questions and texts.
        start: a checkpoint (safetensors) whose weights a fresh run starts from.
        begin: the stage that a fresh run begins with; stages 0 and 1 share no weights and may be
            trained side by side, in two folders.
        device: "cpu" or "cuda".
        checkpoint_every_s: seconds between checkpoints.
        stop_after: stop after this many steps in this call (the run can be continued).
        told: hears of every tenth step: stage, step, values.

    Raises:
        ValueError: when the folder holds a run of another model, seed or recipe.
    """
    torch.manual_seed(seed)
    tokenizer, model = build_tokenizer(), build_model(name)
    # Plain attention is the fastest for short sequences on a CPU, where "sdpa" is slow backwards.
    tower: Any = model.model.vision_tower
    tower.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    whole = Whole(model, Scaffold(model, tokenizer)).to(device)
    run = RunFiles(folder, {"model": name, "seed": seed, "stages": [asdict(s) for s in stages]})
    done, here = run.restore(whole), 0
    if done == Progressed():
        done = Progressed(begin)
        parent = spec(name).parent
        if start is not None:
            whole.load_state_dict(load_file(start))
        elif parent is not None:
            load_weights(model, models_dir() / parent)
    side = spec(name).side
    for number in range(done.stage, len(stages)):
        stage = stages[number]
        first = done.step if number == done.stage else 0
        torch.manual_seed(seed + number)
        objective = objective_of(stage, whole, tokenizer)
        trained = trained_parts(whole, stage)
        optimizer = StageOptimizer(trained, stage)
        if first:
            run.restore_optimizer(optimizer, trained, device)  # type: ignore[arg-type]
        spent, started = done.seconds, time.monotonic()
        saved = started
        for step in range(first, stage.steps):
            optimizer.set_learning_rate(stage.learning_rate * rate(step, stage))
            rng = np.random.default_rng([seed, number, step])
            with torch.autocast(device, torch.bfloat16, enabled=multiplies_bf16(device)):
                loss, log = objective(scenes_of(stage, number, step, side), rng)
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            if step % 10 == 0 or step == stage.steps - 1:
                values = {k: round(float(v), 4) for k, v in {"loss": loss.detach(), **log}.items()}
                run.log(stage.name, step, values)
                if told is not None:
                    told(stage.name, step, values)
            here += 1
            now = time.monotonic()
            stopping = stop_after is not None and here >= stop_after
            if now - saved > checkpoint_every_s or stopping:
                done = Progressed(number, step + 1, spent + now - started)
                run.save(whole, trained, optimizer, done)  # type: ignore[arg-type]
                saved = now
            if stopping:
                return whole
        done = Progressed(number + 1, 0, spent + time.monotonic() - started)
        run.save(whole, trained, optimizer, done)  # type: ignore[arg-type]
    return whole


def objective_of(stage: Stage, whole: Whole, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """What a stage minimises."""
    if stage.name == "tower":
        return TowerObjective(whole.model, whole.scaffold)
    if stage.name == "text":
        return TextObjective(whole.model, tokenizer, stage.questions, Sight(*stage.sight))
    share = TEXT_SHARE if stage.name == "instruct" else 0.0
    codes = Codes(whole.model.config.vision_config.hidden_size) if stage.coded else None
    return PictureObjective(
        whole.model, tokenizer, stage.questions, share, codes, Sight(*stage.sight), stage.clips
    )


def trained_parts(whole: Whole, stage: Stage) -> nn.ModuleDict:
    """The modules that a stage trains, by name; everything else is frozen."""
    inner: Any = whole.model.model
    decoder = {"decoder": inner.language_model, "head": whole.model.lm_head}
    tower = {"tower": inner.vision_tower}
    projector = {"projector": inner.multi_modal_projector}
    parts = {
        "text": decoder,
        "tower": {**tower, "scaffold": whole.scaffold},
        "align": projector,
        "instruct": {**projector, **decoder, **(tower if stage.tower else {})},
    }[stage.name]
    whole.requires_grad_(False)
    trained = nn.ModuleDict(parts)
    trained.requires_grad_(True)
    for layer in inner.language_model.layers[: stage.frozen_layers]:
        layer.requires_grad_(False)
    whole.eval()
    trained.train()
    return trained


class StageOptimizer:
    """`MuonAdamW` for every trained part, the decoder's at its own learning rate."""

    def __init__(self, trained: nn.ModuleDict, stage: Stage) -> None:
        # In a list a decoder's layers are called "0.layers...", as `MuonAdamW` knows them.
        self.parts = {
            key: MuonAdamW(nn.ModuleList([part]), stage.learning_rate)
            for key, part in trained.items()
        }
        self.shares = {
            key: stage.decoder_rate if key in ("decoder", "head") else 1.0 for key in self.parts
        }
        self.owner = {
            id(parameter): key for key, part in trained.items() for parameter in part.parameters()
        }

    def set_learning_rate(self, value: float) -> None:
        """The learning rate of the stage at this step."""
        for key, part in self.parts.items():
            part.set_learning_rate(value * self.shares[key])

    def step(self) -> None:
        """Update the parameters, and drop the gradients."""
        for part in self.parts.values():
            part.step()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimiser's memory of one parameter; empty before its first gradient."""
        return self.parts[self.owner[id(parameter)]].state_of(parameter)

    def restore(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Put back what `state_of` gave."""
        self.parts[self.owner[id(parameter)]].restore(parameter, state)


def rate(step: int, stage: Stage) -> float:
    """Linear warm-up, then a cosine down to 5 %."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    share = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share))
