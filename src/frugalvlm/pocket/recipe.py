"""The training recipe of the pocket models: one command, resumable, on a CPU or a GPU.

Stages, in LLaVA's order: the vision tower first (dense labels), then projector and decoder on many
questions per image with the tower frozen. The data of a step follow from
the seed and the step's number alone, so a run that was interrupted continues exactly.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress, TextColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from frugalvlm.pocket.models import IMAGE_TOKEN, VISUAL_TOKENS, build_model, build_tokenizer, spec
from frugalvlm.pocket.objectives import TowerObjective, packed_question_loss, pixel_values
from frugalvlm.pocket.questions import training_questions
from frugalvlm.pocket.scenes import MAX_THINGS, Scene, draw, make_scene


@dataclass(frozen=True)
class Stage:
    """One stage of training. `steps` and `batch` count optimiser steps and pictures."""

    name: str
    trains: tuple[str, ...]  # of "tower", "projector", "decoder"
    steps: int
    batch: int
    learning_rate: float
    warmup: int
    questions: int = 0  # per picture; 0 for the tower's own objective
    curriculum: int = 0  # steps over which scenes grow from one thing to all
    things: tuple[int, ...] = (MAX_THINGS,)  # most things a scene may show, picture by picture
    per_question: bool = False  # weigh questions, not answer tokens, alike
    horizon: int = 0  # steps until the learning rate has fallen; 0: `steps`


STAGES: dict[str, tuple[Stage, ...]] = {
    "pocket-llava-base": (
        Stage("tower", ("tower",), 1700, 64, 1.5e-3, 100),
        # Token-weighted first: descriptions teach the decoder to read the picture. Then every
        # question alike, which is what checks (yes or no) and multiple choice wait for.
        Stage("read", ("projector", "decoder"), 1031, 16, 1.5e-3, 100, 20, 200, horizon=2000),
        Stage("answer", ("projector", "decoder"), 399, 16, 1.2e-3, 30, 20,
              per_question=True, horizon=1300),
        # Checks and choices compare what was asked with what is seen. That is learnt first where
        # there is only one thing to look at, so every second picture is a simple one.
        Stage("compare", ("projector", "decoder"), 900, 16, 1e-3, 20, 20,
              per_question=True, things=(1, 2, MAX_THINGS, MAX_THINGS)),
    ),
    "pocket-llava-tiny": (
        Stage("tower", ("tower",), 30, 16, 2e-3, 5),
        Stage("tune", ("projector", "decoder"), 30, 8, 2e-3, 5, 8, 10),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Progressed:
    """How far a run is: stage number, step inside it, seconds spent training."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0


def seed_of(stage: int, step: int, batch: int, index: int) -> int:
    """The scene seed of one picture of one step: stages never share pictures."""
    return (stage + 1) * 100_000_000 + step * batch + index


def train(
    name: str,
    folder: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    checkpoint_every_s: float = 120.0,
    stages: tuple[Stage, ...] | None = None,
    stop_after: int | None = None,
    quiet: bool = False,
) -> LlavaForConditionalGeneration:
    """Train a pocket model, or continue a run that was interrupted.

    Args:
        name: a key of `STAGES`.
        folder: checkpoints and `log.jsonl` live here; a folder that holds a run is continued.
        device: "cpu" or "cuda"; on a GPU the forward pass runs in bfloat16.
        seed: decides initial weights and questions.
        checkpoint_every_s: seconds between checkpoints.
        stages: overrides the recipe, for tests and courses.
        stop_after: stop after this many steps in this call (the run can be continued).
        quiet: no progress bar.

    Returns:
        The model, in float32 on the CPU.

    Raises:
        ValueError: when the folder holds a run of another model, seed or recipe.
    """
    plan = STAGES[spec(name).name] if stages is None else stages
    torch.manual_seed(seed)
    model = build_model(name)
    run = _Run(folder, {"model": name, "seed": seed, "stages": [asdict(s) for s in plan]})
    done = run.restore_model(model)
    model.to(device)
    tokenizer = build_tokenizer()
    steps_here = 0
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}"),
                  disable=quiet) as progress:  # fmt: skip
        for number in range(done.stage, len(plan)):
            stage = plan[number]
            torch.manual_seed(seed + number)
            loss_of = _objective(model, stage, tokenizer, device, seed)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            trained = nn.ModuleList(
                [m for part in stage.trains for m in _parts(model)[part]] + loss_of.extra_modules
            )
            trained.requires_grad_(True)
            optimizer = torch.optim.AdamW(
                _groups(trained), lr=stage.learning_rate, betas=(0.9, 0.98)
            )
            first = done.step if number == done.stage else 0
            if first:
                run.restore_optimizer(optimizer, trained, device)
            task = progress.add_task(f"{name}: {stage.name}", total=stage.steps, completed=first,
                                     note="")  # fmt: skip
            model.train()
            started = saved = time.monotonic()
            spent = done.seconds
            for step in range(first, stage.steps):
                for group in optimizer.param_groups:
                    group["lr"] = stage.learning_rate * _schedule(step, stage)
                scenes = [
                    make_scene(
                        "train", seed_of(number, step, stage.batch, i), _things(step, i, stage)
                    )
                    for i in range(stage.batch)
                ]
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    loss, log = loss_of(scenes)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                optimizer.step()
                if step % 10 == 0 or step == stage.steps - 1:
                    values = {
                        k: round(float(v.detach()), 4) for k, v in {"loss": loss, **log}.items()
                    }
                    run.log(stage.name, step, values)
                    progress.update(task, note=" ".join(f"{k} {v:.3f}" for k, v in values.items()))
                progress.advance(task)
                steps_here += 1
                now = time.monotonic()
                stopping = stop_after is not None and steps_here >= stop_after
                if now - saved > checkpoint_every_s or stopping:
                    done = Progressed(number, step + 1, spent + now - started)
                    run.save(model, trained, optimizer, done)
                    saved = now
                if stopping:
                    return model.float().cpu().eval()
            done = Progressed(number + 1, 0, spent + time.monotonic() - started)
            run.save(model, trained, optimizer, done)
    model.requires_grad_(True)
    return model.float().cpu().eval()


def _parts(model: LlavaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    inner = model.model
    return {
        "tower": [inner.vision_tower],
        "projector": [inner.multi_modal_projector],
        "decoder": [inner.language_model, model.lm_head],
    }


def _groups(module: nn.Module) -> list[dict]:
    """Weight decay on matrices only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _schedule(step: int, stage: Stage) -> float:
    """Linear warm-up, then a cosine down to 5 %."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    share = (step - stage.warmup) / max(1, (stage.horizon or stage.steps) - stage.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share))


def _things(step: int, picture: int, stage: Stage) -> int:
    """How many things a picture of this step may show."""
    most = stage.things[picture % len(stage.things)]
    if step >= stage.curriculum:
        return most
    return min(most, 1 + step * MAX_THINGS // stage.curriculum)


class _objective:
    """The loss of a stage as a function of scenes."""

    def __init__(
        self, model: LlavaForConditionalGeneration, stage: Stage, tokenizer: Callable, device: str,
        seed: int,
    ) -> None:  # fmt: skip
        self.model, self.stage, self.device, self.seed = model, stage, device, seed
        self.extra_modules: list[nn.Module] = []
        if stage.questions:
            self.encode = QuestionEncoder(tokenizer)
        else:
            self.tower = TowerObjective(
                model.model.vision_tower, model.config.vision_config.hidden_size
            ).to(device)
            self.extra_modules = [
                self.tower.kind, self.tower.color, self.tower.position, self.tower.scene,
            ]  # fmt: skip

    def __call__(self, scenes: list[Scene]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = pixel_values([draw(s) for s in scenes]).to(self.device)
        if not self.stage.questions:
            return self.tower(pixels, scenes)
        packs = [[self.encode(q.text, q.answer) for q in self._ask(scene)] for scene in scenes]
        return packed_question_loss(
            self.model,
            pixels,
            self.encode.prefix,
            packs,
            "tower" in self.stage.trains,
            self.stage.per_question,
        )

    def _ask(self, scene: Scene) -> list:
        rng = np.random.default_rng([self.seed, scene.seed, 7])
        return training_questions(scene, rng, self.stage.questions)


class QuestionEncoder:
    """Question and answer as tokens, as the processor would give them for a whole prompt."""

    def __init__(self, tokenizer: Callable) -> None:
        self.tokenizer = tokenizer
        head = tokenizer("USER: " + IMAGE_TOKEN + "\n").input_ids
        image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)  # type: ignore[attr-defined]
        self.prefix = [t for i in head for t in ([i] * VISUAL_TOKENS if i == image else [i])]
        self.cache: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def __call__(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of the question with its cue, and of the answer with the end of sequence."""
        key = (question, answer)
        if key not in self.cache:
            ask = self.tokenizer(f"{question} ASSISTANT:", add_special_tokens=False).input_ids
            say = self.tokenizer(answer, add_special_tokens=False).input_ids
            self.cache[key] = (ask, [*say, self.tokenizer.eos_token_id])  # type: ignore[attr-defined]
        return self.cache[key]


class _Run:
    """The files of one training run. Every file is replaced whole, never half written."""

    def __init__(self, folder: Path, identity: dict) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        identity = json.loads(json.dumps(identity))
        if path.exists() and json.loads(path.read_text()) != identity:
            raise ValueError(
                f"{folder} holds a training run of another model, seed or recipe; "
                "name another folder or delete this one."
            )
        path.write_text(json.dumps(identity, indent=1))

    def restore_model(self, model: nn.Module) -> Progressed:
        path = self.folder / "progress.json"
        if not path.exists():
            return Progressed()
        state = json.loads(path.read_text())
        model.load_state_dict(load_file(self.folder / state["model"]))
        self._state = state
        return Progressed(**state["progress"])

    def restore_optimizer(
        self, optimizer: torch.optim.Optimizer, trained: nn.Module, device: str
    ) -> None:
        tensors = load_file(self.folder / self._state["optimizer"], device=device)
        for key, parameter in trained.named_parameters():
            optimizer.state[parameter] = {
                "step": tensors[f"step.{key}"].cpu(),
                "exp_avg": tensors[f"exp_avg.{key}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{key}"],
            }
            parameter.data.copy_(tensors[f"value.{key}"])

    def save(
        self, model: nn.Module, trained: nn.Module, optimizer: torch.optim.Optimizer,
        done: Progressed,
    ) -> None:  # fmt: skip
        names = {k: f"{k}-{done.stage}-{done.step}.safetensors" for k in ("model", "optimizer")}
        save_file({k: v.contiguous() for k, v in model.state_dict().items()},
                  self.folder / names["model"])  # fmt: skip
        tensors = {}
        for key, parameter in trained.named_parameters():
            tensors[f"value.{key}"] = parameter.detach().clone()
            for field, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{field}.{key}"] = value.detach().clone()
        save_file(tensors, self.folder / names["optimizer"])
        # The pointer moves last: a kill at any moment leaves a whole checkpoint behind it.
        pointer = self.folder / "progress.json.tmp"
        pointer.write_text(json.dumps({**names, "progress": asdict(done)}))
        os.replace(pointer, self.folder / "progress.json")
        for old in self.folder.glob("*.safetensors"):
            if old.name not in names.values():
                old.unlink()

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")


def read_log(folder: Path) -> Iterator[dict]:
    """The learning curve of a run, one entry per logged step; a resumed step counts once."""
    entries: dict[tuple[str, int], dict] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entries[entry["stage"], entry["step"]] = entry
    yield from entries.values()
