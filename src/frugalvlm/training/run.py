"""Running a lesson with Transformers' Trainer, so that a kill at any moment costs little.

The Trainer carries optimiser, schedule, bfloat16, clipping, accumulation and checkpoints. It is
shown a module that holds what is trained only, so checkpoints leave the frozen model out. Batches
come by number and an objective's randomness follows from the number, so no state of a random
generator decides anything, and a run that goes on after a kill ends with the same weights.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import accelerate  # noqa: F401 - the Trainer needs it; its absence is told at once
import numpy as np
import torch
from rich.progress import Progress, TextColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from frugalvlm.methods.trained import Learnt, Sizes, TrainedMethod, sample_of
from frugalvlm.pocket.recipe import RunFiles, multiplies_bf16
from frugalvlm.training.data import Batch, Collator, Examples, Numbered, PocketExamples
from frugalvlm.training.lesson import Objective, Recipe, TrainingError, lesson_of
from frugalvlm.training.metering import metered

LOGGED = 10  # steps between entries of the learning curve
PROGRESS = "stages.json"  # how many stages are over
_M = TypeVar("_M", bound=TrainedMethod)


def learn(
    method: _M,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    name: str,
    recipes: Sequence[Recipe],
    folder: Path,
    *,
    examples: Examples | None = None,
    device: str = "cpu",
    seed: int = 0,
    checkpoint_every_s: float = 120.0,
    stop_after: int | None = None,
    quiet: bool = False,
) -> _M:
    """Train a method's modules on a model, or continue a training that was interrupted.

    Args:
        method: with the fields that it is to be trained with.
        model: which comes back as it was.
        processor: of the model.
        name: what the model is called.
        recipes: the stages.
        folder: for checkpoints, learning curve and sessions; one that holds a run is continued.
        examples: what is asked; default: questions about scenes, as embedded models are taught.
        device: "cpu" or "cuda".
        seed: decides first weights, data and what an objective draws.
        checkpoint_every_s: seconds between checkpoints.
        stop_after: stop after this many steps in this call (the run can be continued).
        quiet: no bar.

    Returns:
        The method with what it learnt, on the CPU.

    Raises:
        TrainingError: the folder holds another run, nothing is trained, or a second GPU is named.
    """
    if device not in ("cpu", "cuda", "cuda:0"):
        raise TrainingError(
            f"Training runs on the first GPU that it sees, not on {device}: set "
            f"CUDA_VISIBLE_DEVICES={device.rpartition(':')[2]} and name the device 'cuda'."
        )
    lesson = lesson_of(type(method))
    examples = PocketExamples.for_processor(processor, seed) if examples is None else examples
    identity = {
        "method": {f.name: getattr(method, f.name) for f in fields(method) if f.name != "learnt"},
        "key": method.key, "model": name, "seed": seed, "data": examples.describe(),
        "recipes": [asdict(recipe) for recipe in recipes],
    }  # fmt: skip
    try:
        files = RunFiles(folder, identity)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    sample, sizes = sample_of(model), Sizes.of(model)
    torch.manual_seed(seed)
    own = method.build(sizes)
    prefixes = {prefix for recipe in recipes for prefix in recipe.trains}
    with _lent(model.to(device), _inside(prefixes)):
        held = _Held(own, model, prefixes).to(device)
        learnt = Learnt(held.own, {}, sizes, sample, name)
        objective = lesson.objective(replace(method, learnt=learnt), model)
        with metered(folder, device):
            _stages(held, objective, recipes, files, examples, Collator(processor), device, seed,
                    checkpoint_every_s, stop_after, quiet)  # fmt: skip
        tuned = {n: p.detach().cpu().clone() for n, p in held.tuned_by_name()}
        own = held.own.requires_grad_(False).cpu().eval()
    return replace(method, learnt=replace(learnt, own=own, tuned=tuned))


class _Held(nn.Module):
    """What is trained: the method's modules, and parameters of the model; what checkpoints hold.

    Raises:
        TrainingError: a recipe trains what is not there.
    """

    def __init__(self, own: nn.Module, model: nn.Module, prefixes: set[str]) -> None:
        super().__init__()
        self.own, self.tuned = own, nn.Module()
        for name, parameter in model.named_parameters():
            if name.startswith(_inside(prefixes)):
                self.tuned.register_parameter(name.replace(".", "/"), parameter)
        for prefix in prefixes:
            if not any(self._plain(name).startswith(prefix) for name, _ in self.named_parameters()):
                raise TrainingError(
                    f"The recipe trains '{prefix}', which begins no name: those of the method's "
                    "modules begin with 'own.', those of the model with 'tuned.'."
                )
        object.__setattr__(self, "objective", None)  # not a part: it holds the frozen model
        self.heard: dict[str, float] = {}

    @staticmethod
    def _plain(name: str) -> str:
        return name.replace("/", ".")

    def tuned_by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters that are trained, by their names in it."""
        return ((self._plain(n), p) for n, p in self.tuned.named_parameters())

    def choose(self, prefixes: tuple[str, ...]) -> None:
        """Train what begins so, and nothing else."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self._plain(name).startswith(prefixes))

    def listen(self, objective: Objective, seed: int, stage: int) -> None:
        """Which objective the next steps have, and what its randomness follows from."""
        object.__setattr__(self, "objective", (objective, seed, stage))

    def forward(
        self, inputs: dict[str, Tensor], labels: Tensor, numbers: Tensor
    ) -> dict[str, Tensor]:
        """The loss of a batch."""
        objective, seed, stage = self.__dict__["objective"]
        dice = np.random.default_rng([seed, stage, int(numbers[0])])
        batch: Batch = {"inputs": inputs, "labels": labels, "numbers": numbers}
        loss, log = objective(batch, dice)
        self.heard = {k: float(v) for k, v in {"loss": loss.detach(), **log}.items()}
        return {"loss": loss}


def _stages(
    held: _Held, objective: Objective, recipes: Sequence[Recipe], files: RunFiles,
    examples: Examples, collator: Collator, device: str, seed: int, checkpoint_every_s: float,
    stop_after: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Every stage that is not over yet."""
    folder, first = files.folder, 0
    done = _over(folder)
    if done:
        held.load_state_dict(load_file(folder / f"stage-{done - 1}.safetensors"))
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, disable=quiet) as bar:
        for number, recipe in enumerate(recipes):
            first, count = first + recipe.steps * recipe.batch, recipe.steps * recipe.batch
            if number < done:
                continue
            held.choose(recipe.trains)
            held.listen(objective, seed, number)
            watch = _Watch(held, files, number, recipe, bar, checkpoint_every_s, stop_after)
            data = Numbered(examples, first - count, count)
            where = folder / f"checkpoints-{number}"
            trainer = Trainer(
                held, _arguments(recipe, where, device, seed), collator, data, callbacks=[watch]
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=_newest(where))
            stop_after = None if stop_after is None else stop_after - watch.steps_here
            if watch.stopped:
                return
            _finish(folder, number, held)
            shutil.rmtree(where, ignore_errors=True)


def _arguments(recipe: Recipe, where: Path, device: str, seed: int) -> TrainingArguments:
    return _OneDevice(
        output_dir=str(where), max_steps=recipe.steps, seed=seed, use_cpu=device == "cpu",
        per_device_train_batch_size=recipe.batch // recipe.parts,
        gradient_accumulation_steps=recipe.parts, learning_rate=recipe.learning_rate,
        warmup_steps=round(recipe.warmup * recipe.steps), lr_scheduler_type="cosine",
        weight_decay=recipe.weight_decay, max_grad_norm=recipe.clip, bf16=multiplies_bf16(device),
        train_sampling_strategy="sequential", remove_unused_columns=False, save_strategy="no",
        save_total_limit=1, logging_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
    )  # fmt: skip


class _OneDevice(TrainingArguments):
    """One process, one device: on a machine with several GPUs the Trainer would copy the model."""

    @property
    def n_gpu(self) -> int:
        """At most one."""
        return min(1, super().n_gpu)


class _Watch(TrainerCallback):
    """Bar, learning curve, and checkpoints by the clock."""

    def __init__(
        self, held: _Held, files: RunFiles, stage: int, recipe: Recipe, bar: Progress,
        checkpoint_every_s: float, stop_after: int | None,
    ) -> None:  # fmt: skip
        self.held, self.files, self.stage, self.bar = held, files, stage, bar
        self.every, self.stop_after = checkpoint_every_s, stop_after
        self.steps_here, self.stopped = 0, False
        self.task = bar.add_task(f"stage {stage + 1}", total=recipe.steps, note="")
        self.saved = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A run that goes on starts in the middle."""
        self.bar.update(self.task, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One more step."""
        step, heard, now = state.global_step, self.held.heard, time.monotonic()
        self.steps_here += 1
        if step % LOGGED == 1 or step == state.max_steps:
            values = {k: round(v, 4) for k, v in heard.items()}
            self.files.log(str(self.stage), step - 1, values)
            note = " ".join(f"{k} {v:.3f}" for k, v in values.items())
            self.bar.update(self.task, note=note)
        self.bar.update(self.task, completed=step)
        if self.stop_after is not None and self.steps_here >= self.stop_after:
            self.stopped = control.should_training_stop = step < state.max_steps
        if self.stopped or now - self.saved > self.every:
            control.should_save, self.saved = True, now


def _newest(where: Path) -> str | None:
    """The last whole checkpoint; what a kill left half written is removed.

    The Trainer writes its state last.
    """
    for path in sorted(where.glob("checkpoint-*"), key=_step_of, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _over(folder: Path) -> int:
    """How many stages are over."""
    path = folder / PROGRESS
    return json.loads(path.read_text())["over"] if path.exists() else 0


def _finish(folder: Path, stage: int, held: _Held) -> None:
    """A stage is over; the pointer moves last."""
    weights = {k: v.detach().cpu().contiguous() for k, v in held.state_dict().items()}
    save_file(weights, folder / f"stage-{stage}.safetensors")
    pointer = folder / f"{PROGRESS}.tmp"
    pointer.write_text(json.dumps({"over": stage + 1}))
    os.replace(pointer, folder / PROGRESS)


def _inside(prefixes: set[str]) -> tuple[str, ...]:
    """How the names of the model's trained parameters begin, in the model."""
    return tuple(p.removeprefix("tuned.") for p in prefixes if p.startswith("tuned."))


@contextmanager
def _lent(model: nn.Module, tuned: tuple[str, ...]) -> Iterator[None]:
    """Inside, the model is frozen and in evaluation mode; after it, it is what it was."""
    every = dict(model.named_parameters())
    wanted = {name: p.requires_grad for name, p in every.items()}
    before = {n: p.detach().clone() for n, p in every.items() if n.startswith(tuned)}
    training = model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for name, parameter in every.items():
            if name in before:
                parameter.data.copy_(before[name])
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
        model.train(training)
