"""The training recipe of the pocket models: one command, resumable, on a CPU or a GPU.

Four stages, as real vision-language models are made: a language model that has never seen a
picture, a vision tower trained on captions, a projector that aligns the two, and instruction
tuning on many questions about each picture. The data of a step follow from the seed and the
step's number alone, so a run that was interrupted continues exactly.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import Progress, TextColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerBase

from frugalvlm.checks import check_whole
from frugalvlm.pocket.installed import WeightsError, models_dir, verify
from frugalvlm.pocket.models import build_model, build_tokenizer, spec
from frugalvlm.pocket.objectives import (
    AlignObjective,
    InstructObjective,
    LanguageObjective,
    Objective,
    Scaffold,
    TowerObjective,
)
from frugalvlm.pocket.scenes import IMAGE_SIZE, MAX_THINGS, make_scene

StageName = Literal["language", "tower", "align", "instruct"]


@dataclass(frozen=True)
class Stage:
    """One stage of training. `steps` and `batch` count optimiser steps and pictures."""

    name: StageName
    steps: int
    batch: int
    learning_rate: float
    warmup: int
    questions: int = 0  # per picture
    late: bool = False  # ask more often what is learnt last
    things: tuple[int, ...] = (MAX_THINGS,)  # most things a scene may show, picture by picture
    side: int = IMAGE_SIZE  # pixels of the scenes
    half_depth: bool = False  # train every second decoder layer; the others start as bystanders
    clips: float = 0.0  # share of the steps that show clips

    def __post_init__(self) -> None:
        check_whole(f"steps of the {self.name} stage", self.steps)
        check_whole(f"batch of the {self.name} stage", self.batch)
        for most in self.things:
            check_whole(f"things of the {self.name} stage", most, 1, MAX_THINGS)


# What is asked and what is seen must be compared. That is learnt first where there is only one
# thing to look at, so every second picture is a simple one.
MIXED = (1, 2, MAX_THINGS, MAX_THINGS)

STAGES: dict[str, tuple[Stage, ...]] = {
    "pocket-llava-base": (
        Stage("language", 2000, 16, 3e-3, 50, 20, things=MIXED, half_depth=True),
        Stage("tower", 1500, 64, 3e-3, 50),
        Stage("align", 120, 16, 2e-3, 10, half_depth=True),
        Stage("instruct", 1200, 16, 2e-3, 40, 20, True, MIXED),
    ),
    "pocket-llava-small": (
        Stage("language", 2000, 16, 3e-3, 50, 20, things=MIXED),
        Stage("tower", 1500, 64, 3e-3, 50),
        Stage("align", 120, 16, 2e-3, 10),
        Stage("instruct", 1500, 16, 2e-3, 40, 20, True, MIXED),
    ),
    "pocket-llava-hd": (Stage("instruct", 520, 8, 1e-3, 30, 20, True, MIXED, side=2 * IMAGE_SIZE),),
    "pocket-siglip-base": (
        Stage("tower", 200, 64, 1.5e-3, 30),
        Stage("instruct", 360, 12, 1e-3, 30, 20, True, MIXED, clips=0.4),
    ),
    "pocket-llava-tiny": (
        Stage("language", 10, 8, 2e-3, 5, 8, things=MIXED, half_depth=True),
        Stage("tower", 20, 16, 2e-3, 5),
        Stage("align", 5, 8, 2e-3, 2, half_depth=True),
        Stage("instruct", 10, 8, 2e-3, 5, 8, True, MIXED),
    ),
}


@dataclass(frozen=True)
class Progressed:
    """How far a run is: stage number, step inside it, seconds spent training."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0


class Whole(nn.Module):
    """What a checkpoint holds: the model, and the scaffold that its training needs."""

    def __init__(self, model: PreTrainedModel, scaffold: Scaffold) -> None:
        super().__init__()
        self.model = model
        self.scaffold = scaffold


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
    stages: Sequence[Stage] | None = None,
    start: Path | None = None,
    stop_after: int | None = None,
    quiet: bool = False,
) -> PreTrainedModel:
    """Train a pocket model, or continue a run that was interrupted.

    Args:
        name: a key of `STAGES`.
        folder: checkpoints and `log.jsonl` live here; a folder that holds a run is continued.
        device: "cpu" or "cuda". The forward pass runs in bfloat16 where the hardware multiplies
            it fast (any recent GPU; CPUs with AVX512-BF16 or AMX).
        seed: decides initial weights, scenes and questions.
        checkpoint_every_s: seconds between checkpoints.
        stages: overrides the recipe, for tests and courses.
        start: folder of a model to take the first weights from; default: fresh ones, or those of
            the model's parent where it has one.
        stop_after: stop after this many steps in this call (the run can be continued).
        quiet: no progress bar.

    Returns:
        The model, in float32 on the CPU.

    Raises:
        ValueError: when the folder holds a run of another model, seed or recipe.
    """
    plan = STAGES[spec(name).name] if stages is None else tuple(stages)
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = build_model(name)
    parent = spec(name).parent
    if start is None and parent is not None:
        start = models_dir() / parent
    if start is not None:
        load_weights(model, start)
    # Plain attention is the fastest for short sequences on a CPU, where "sdpa" is slow backwards.
    tower: Any = model.model.vision_tower
    tower.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    whole = Whole(model, Scaffold(model, tokenizer)).to(device)
    run = RunFiles(folder, {"model": name, "seed": seed, "stages": [asdict(s) for s in plan]})
    done = run.restore(whole)
    kind, steps_here = torch.device(device).type, 0
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}"),
                  disable=quiet) as progress:  # fmt: skip
        for number in range(done.stage, len(plan)):
            stage = plan[number]
            first = done.step if number == done.stage else 0
            torch.manual_seed(seed + number)
            objective = _objective(stage, whole, tokenizer)
            with _depth(model, stage.half_depth):
                trained = trained_parts(whole, stage)
                optimizer = MuonAdamW(trained, stage.learning_rate)
                if first:
                    run.restore_optimizer(optimizer, trained, device)
                task = progress.add_task(
                    f"{name}: {stage.name}", total=stage.steps, completed=first, note=""
                )
                started = saved = time.monotonic()
                spent = done.seconds
                for step in range(first, stage.steps):
                    optimizer.set_learning_rate(stage.learning_rate * _schedule(step, stage))
                    scenes = [
                        make_scene(
                            "train",
                            seed_of(number, step, stage.batch, i),
                            stage.things[i % len(stage.things)],
                            stage.side,
                        )
                        for i in range(stage.batch)
                    ]
                    rng = np.random.default_rng([seed, number, step])
                    with torch.autocast(kind, torch.bfloat16, enabled=multiplies_bf16(device)):
                        loss, log = objective(scenes, rng)
                    loss.backward()
                    nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
                    optimizer.step()
                    if step % 10 == 0 or step == stage.steps - 1:
                        values = {
                            k: round(float(v.detach()), 4) for k, v in {"loss": loss, **log}.items()
                        }
                        run.log(stage.name, step, values)
                        note = " ".join(f"{k} {v:.3f}" for k, v in values.items())
                        progress.update(task, note=note)
                    progress.advance(task)
                    steps_here += 1
                    now = time.monotonic()
                    stopping = stop_after is not None and steps_here >= stop_after
                    if now - saved > checkpoint_every_s or stopping:
                        done = Progressed(number, step + 1, spent + now - started)
                        run.save(whole, trained, optimizer, done)
                        saved = now
                    if stopping:
                        return _finished(model)
            if stage.half_depth and not any(later.half_depth for later in plan[number + 1 :]):
                _wake_bystanders(model)
            done = Progressed(number + 1, 0, spent + time.monotonic() - started)
            run.save(whole, trained, optimizer, done)
    return _finished(model)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Take the weights of a model with the same layers.

    Raises:
        WeightsError: when there are none, or they do not fit.
    """
    verify(folder)
    weights = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    own = model.state_dict()
    # A child may lack the parent's [CLS], have biases (they start at zero) or a head of its own.
    places = "model.vision_tower.embeddings.position_embedding.weight"
    if len(weights[places]) == len(own[places]) + 1:
        weights[places] = weights[places][1:]
    taken = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    lacking = [
        k for k in own if k not in taken and "language_model" in k and not k.endswith("_proj.bias")
    ]
    if lacking:
        raise WeightsError(
            f"The weights in {folder} do not fit this model: {lacking[0]} is not there; "
            "name a folder of the same shape."
        )
    model.load_state_dict(taken, strict=False)


def _finished(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(True)
    tower: Any = model.model.vision_tower
    tower.set_attn_implementation("sdpa")
    return model.float().cpu().eval()


def multiplies_bf16(device: str) -> bool:
    """Whether bfloat16 is the fast number format of a device."""
    if device != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _objective(stage: Stage, whole: Whole, tokenizer: PreTrainedTokenizerBase) -> Objective:
    model, scaffold = whole.model, whole.scaffold
    if stage.name == "tower":
        return TowerObjective(model, scaffold)
    asking = (model, scaffold, tokenizer, stage.questions, stage.late)
    if stage.name == "instruct":
        return InstructObjective(*asking, stage.clips)
    return (LanguageObjective if stage.name == "language" else AlignObjective)(*asking)


def trained_parts(whole: Whole, stage: Stage) -> nn.ModuleList:
    """The modules that a stage trains; everything else is frozen."""
    model, scaffold = whole.model, whole.scaffold
    inner: Any = model.model
    decoder = [inner.language_model, model.lm_head, scaffold.words]
    parts = {
        "language": decoder,
        "tower": [inner.vision_tower, scaffold.heads, scaffold.captions],
        "align": [inner.multi_modal_projector],
        "instruct": [inner.multi_modal_projector, *decoder],
    }[stage.name]
    whole.requires_grad_(False)
    trained = nn.ModuleList(parts)
    trained.requires_grad_(True)
    whole.eval()
    trained.train()
    return trained


@contextmanager
def _depth(model: PreTrainedModel, half: bool) -> Iterator[None]:
    """Inside the block every second decoder layer hands its input on, if `half`."""
    decoder: Any = model.model.language_model
    bystanders = decoder.layers[1::2] if half else []
    for layer in bystanders:
        layer.forward = lambda hidden_states, **_: hidden_states
    try:
        yield
    finally:
        for layer in bystanders:
            del layer.forward


def _wake_bystanders(model: PreTrainedModel) -> None:
    """Make every second layer a copy of the one before it that does not yet say anything.

    The decoder's function stays what it was: the copies write nothing into the residual stream
    until training moves their output projections away from zero.
    """
    decoder: Any = model.model.language_model
    layers = decoder.layers
    for before, layer in zip(layers[::2], layers[1::2], strict=True):
        layer.load_state_dict(before.state_dict())
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)


class MuonAdamW:
    """Muon for the matrices of transformer layers, AdamW for everything else.

    Muon's updates are scaled to the size of AdamW's, so one learning rate serves both. In a trial
    over 240 steps of the language stage its loss was 0.54 where AdamW's was 0.68.
    """

    def __init__(self, module: nn.Module, learning_rate: float) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            inside = ".layers." in name and parameter.ndim == 2
            (matrices if inside else others).append(parameter)
        decayed = [p for p in others if p.ndim >= 2]
        plain = [p for p in others if p.ndim < 2]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=learning_rate, betas=(0.9, 0.98), fused=True,
        )  # fmt: skip
        self.parts: list[torch.optim.Optimizer] = [self.adamw]
        if matrices:
            muon = torch.optim.Muon(
                matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            )
            self.parts.append(muon)
        self.in_muon = set(map(id, matrices))

    def set_learning_rate(self, value: float) -> None:
        """The learning rate of both halves."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = value

    def step(self) -> None:
        """Update the parameters, and drop the gradients."""
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """The optimiser's memory of one parameter; empty before its first gradient."""
        return self._part(parameter).state.get(parameter, {})

    def restore(self, parameter: nn.Parameter, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state_of` gave."""
        self._part(parameter).state[parameter] = state

    def _part(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return self.parts[1] if id(parameter) in self.in_muon else self.adamw


def _schedule(step: int, stage: Stage) -> float:
    """Linear warm-up, then a cosine down to 5 %."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    share = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share))


class RunFiles:
    """The files of one training run. Every file is replaced whole, never half written."""

    def __init__(self, folder: Path, identity: dict) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        identity = json.loads(json.dumps(identity))
        if path.exists() and _parsed(path) != identity:
            raise ValueError(
                f"{folder} holds a training run of another model, seed or recipe; "
                "name another folder or delete this one."
            )
        path.write_text(json.dumps(identity, indent=1))

    def check(self) -> None:
        """Whether a run that is here can be continued.

        Raises:
            ValueError: when its last checkpoint is damaged or not whole.
        """
        path = self.folder / "progress.json"
        if not path.exists():
            return
        try:
            state = _parsed(path) or {}
            Progressed(**state["progress"])
            for part in ("model", "optimizer"):
                with safe_open(self.folder / state[part], framework="pt") as file:
                    file.keys()
        except (KeyError, TypeError, OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.folder} holds a checkpoint that is not whole ({error}): delete the folder "
                "to train from the beginning, or name another."
            ) from error

    def restore(self, whole: nn.Module) -> Progressed:
        """Weights of the last checkpoint, if there is one, and how far it had come."""
        path = self.folder / "progress.json"
        if not path.exists():
            return Progressed()
        state = json.loads(path.read_text())
        whole.load_state_dict(load_file(self.folder / state["model"]))
        self._state = state
        return Progressed(**state["progress"])

    def restore_optimizer(self, optimizer: MuonAdamW, trained: nn.Module, device: str) -> None:
        """The optimiser's state of the last checkpoint."""
        tensors = load_file(self.folder / self._state["optimizer"], device=device)
        for key, parameter in trained.named_parameters():
            state = {
                field: tensors[f"{field}.{key}"]
                for field in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
                if f"{field}.{key}" in tensors
            }
            if state:
                optimizer.restore(parameter, state)

    def save(
        self, whole: nn.Module, trained: nn.Module, optimizer: MuonAdamW,
        done: Progressed,
    ) -> None:  # fmt: skip
        """Write a checkpoint; a kill meanwhile leaves the one before."""
        names = {k: f"{k}-{done.stage}-{done.step}.safetensors" for k in ("model", "optimizer")}
        save_file({k: v.contiguous() for k, v in whole.state_dict().items()},
                  self.folder / names["model"])  # fmt: skip
        tensors = {
            f"{field}.{key}": value.detach().clone()
            for key, parameter in trained.named_parameters()
            for field, value in optimizer.state_of(parameter).items()
        }
        save_file(tensors, self.folder / names["optimizer"])
        # The pointer moves last: a kill at any moment leaves a whole checkpoint behind it.
        pointer = self.folder / "progress.json.tmp"
        pointer.write_text(json.dumps({**names, "progress": asdict(done)}))
        os.replace(pointer, self.folder / "progress.json")
        for old in self.folder.glob("*.safetensors"):
            if old.name not in names.values():
                old.unlink()

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Add a line to the learning curve."""
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")


def _parsed(path: Path) -> dict | None:
    """A file's JSON; None where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def read_log(folder: Path) -> Iterator[dict]:
    """The learning curve of a run, one entry per logged step; a resumed step counts once."""
    entries: dict[tuple[str, int], dict] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entries[entry["stage"], entry["step"]] = entry
    yield from entries.values()
