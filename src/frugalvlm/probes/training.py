"""`invoke train`: train a pocket model, check its recipe, score the result, install the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from frugalvlm import measure
from frugalvlm.benchmarks import (
    BENCHMARKS,
    HD_BENCHMARKS,
    LONG_BENCHMARKS,
    VIDEO_BENCHMARKS,
    load_benchmark,
    stats,
)
from frugalvlm.benchmarks.asking import Batches, answer_all
from frugalvlm.benchmarks.base import mean_sheet
from frugalvlm.checks import OptionError, check_present, check_whole
from frugalvlm.errors import FrugalError
from frugalvlm.paths import checkpoints_dir, command, repository
from frugalvlm.pocket import recipe
from frugalvlm.pocket.installed import models_dir, put_in_place, save_vlm, verify, write_hashes
from frugalvlm.pocket.models import build_model, build_processor, build_tokenizer, spec
from frugalvlm.pocket.objectives import Scaffold
from frugalvlm.pocket.recipe import STAGES, Progressed, Stage, Whole, read_log, train
from frugalvlm.pocket.scenes import IMAGE_SIZE
from frugalvlm.probes.model_card import card
from frugalvlm.training.metering import SESSIONS, metered

CARD_QUESTIONS = 600  # per benchmark, for the scores on the model card
LONG_QUESTIONS = 300  # of models whose prompts are two to five times as long
CHECK_STEPS, CHECK_PICTURES = 6, 4  # of every stage; a step, at most
# Relative. CPUs differ in the number format they are fast in: bfloat16 in place of float32 moved
# these losses by at most 0.001 (pocket-llava-base); a learning rate 10 % too high moved them by up
# to 0.02, another seed by up to 0.08 (pocket-llava-tiny).
CHECK_TOLERANCE = 0.005

CHECK, LOG, SCORES = "check.json", "training_log.json", "scores.json"
PARENT = "parent.json"  # name and hash of the weights a first run started from, where it had any
WORDS = "visual_words.safetensors"  # the part of the scaffold that instruction tuning goes on with


class TrainingError(FrugalError, ValueError):
    """Training that cannot start, or a recipe that does not reproduce; says what to do."""


def train_and_install(name: str, folder: str = "", device: str = "cpu", seed: int = 0) -> Path:
    """Train (or continue), score with and without the picture, and write weights and card.

    Args:
        name: a model of the recipe.
        folder: checkpoints; default: a folder of `checkpoints/`.
        device: "cpu", "cuda", "cuda:1", ...
        seed: decides initial weights and questions.

    Returns:
        The folder of the installed model.

    Raises:
        TrainingError: unknown model, no such device, or a folder that holds another run.
    """
    plan = _recipe_of(name)
    return _train(name, run_folder(folder, name), plan, device, seed)


def train_more(name: str, steps: int, folder: str = "", device: str = "cpu", seed: int = 0) -> Path:
    """Continue instruction tuning from the installed weights, on new scenes, and install.

    The optimiser starts afresh and the learning rate takes another turn (a warm restart:
    Loshchilov and Hutter, arXiv:1608.03983).

    Raises:
        TrainingError: as `train_and_install`; or weights that an older version installed.
        WeightsError: when the model is not installed, or damaged.
    """
    check_whole("more (steps)", steps)
    check_options(device, seed)
    last = _recipe_of(name)[-1]
    installed = models_dir() / name
    weights = verify(installed)["model.safetensors"]
    if not (installed / WORDS).is_file():
        raise TrainingError(
            f"{installed} was installed by an older version, which kept too little to go on with: "
            f"run `{command(f'train --model {name}')}`."
        )
    before = json.loads((installed / LOG).read_text())
    known = [f.name for f in fields(Stage)]
    earlier = [{k: s[k] for k in known if k in s} for s in before["stages"]]
    done = [Stage(**{**s, "things": tuple(s["things"])}) for s in earlier]
    plan = (*done, replace(last, steps=steps, warmup=min(last.warmup, steps // 10)))
    # The weights name the folder: an interrupted continuation is found again, a new one is new.
    run = run_folder(folder, f"{name}-from-{weights[:8]}")
    files = _open(run, name, seed, plan)
    if not (run / "progress.json").exists():
        model = build_model(name)
        recipe.load_weights(model, installed)
        whole = Whole(model, Scaffold(model, build_tokenizer()))
        whole.scaffold.words.load_state_dict(load_file(installed / WORDS))
        trained = recipe.trained_parts(whole, plan[-1])
        shutil.copy(installed / LOG, run / LOG)
        optimizer = recipe.MuonAdamW(trained, last.learning_rate)
        files.save(whole, trained, optimizer, Progressed(len(done), 0, before["seconds"]))
    return _train(name, run, plan, device, seed)


def check(name: str, device: str = "cpu") -> str:
    """Retrain the first steps of every stage and compare their losses with the shipped ones.

    Returns:
        One sentence that says how well they agree.

    Raises:
        TrainingError: when they differ by more than `CHECK_TOLERANCE`, or cannot be compared.
        WeightsError: when the model is not installed, or damaged.
    """
    _recipe_of(name)
    check_present(device)
    verify(models_dir() / name)
    path = models_dir() / name / CHECK
    if not path.is_file():
        raise TrainingError(
            f"There is nothing to compare with: {path} is missing; it is written when "
            f"`{command(f'train --model {name}')}` installs the model."
        )
    shipped = json.loads(path.read_text())
    here = first_steps(name, device, shipped["seed"])
    if [e[:2] for e in here] != [e[:2] for e in shipped["losses"]]:
        raise TrainingError(f"The recipe of {name} has other stages or steps than {path} records.")
    worst = 0.0
    for (stage, step, loss), (_, _, expected) in zip(here, shipped["losses"], strict=True):
        # A loss that is not a number compares as false, so the comparison asks for agreement.
        if not (apart := abs(loss - expected) / abs(expected)) <= CHECK_TOLERANCE:
            raise TrainingError(
                f"The training of {name} does not reproduce: at step {step} of stage '{stage}' the "
                f"loss is {loss} here and {expected} in {path} ({apart:.1%} apart, "
                f"{CHECK_TOLERANCE:.1%} allowed; recorded with torch {shipped['torch']}, "
                f"transformers {shipped['transformers']}): the recipe, the data or a library "
                "changed."
            )
        worst = max(worst, apart)
    sentence = (
        f"The first {CHECK_STEPS} steps of every stage of {name} reproduce: {len(here)} losses "
        f"agree within {worst:.2%} ({CHECK_TOLERANCE:.1%} allowed)."
    )
    Console().print(sentence)
    return sentence


def first_steps(name: str, device: str = "cpu", seed: int = 0) -> list[list[Any]]:
    """[stage, step, loss] of a short run: the recipe with few steps of few pictures per stage."""
    plan = [
        replace(s, steps=CHECK_STEPS, warmup=min(s.warmup, 2), batch=min(s.batch, CHECK_PICTURES))
        for s in STAGES[name]
    ]
    with TemporaryDirectory() as folder:
        train(name, Path(folder), device=device, seed=seed, stages=plan, quiet=True)
        return [[e["stage"], e["step"], e["loss"]] for e in read_log(Path(folder))]


def install(name: str, model: PreTrainedModel, run: Path) -> Path:
    """Write weights, processor, scores, learning curve, hashes and model card of a trained model.

    Everything is made in the run's folder first, so a kill meanwhile leaves what was installed.

    Args:
        name: the model's name.
        model: its weights.
        run: the folder of its training run.
    """
    console = Console()
    made, target = run / "installed", models_dir() / name
    shutil.rmtree(made, ignore_errors=True)
    processor = build_processor(name)
    save_vlm(model, processor, made)
    log = _training_log(run)
    _write(made / LOG, log)
    save_file(_visual_words(run), made / WORDS)
    console.print(f"Recording the first steps of every stage, for `{command('train --check')}` ...")
    versions = {key: measure.describe("cpu")[key] for key in ("torch", "transformers")}
    losses = first_steps(name, "cpu", log["seed"])
    _write(made / CHECK, {"seed": log["seed"], **versions, "losses": losses})
    console.print("Scoring the model on test scenes, with and without their pictures ...")
    # The card states the weights as they are stored, so they are read back first.
    stored = AutoModelForImageTextToText.from_pretrained(made, dtype=torch.float32).eval()
    suite = HD_BENCHMARKS if spec(name).side > IMAGE_SIZE else {**BENCHMARKS, **LONG_BENCHMARKS}
    video = VIDEO_BENCHMARKS if getattr(processor, "video_processor", None) else {}
    n = CARD_QUESTIONS if spec(name).family == "llava" else LONG_QUESTIONS
    scores = {b: score(stored, processor, b, n) for b in (*suite, *video)}
    _write(made / SCORES, scores)
    (made / "README.md").write_text(card(name, stored, scores, log))
    write_hashes(made)
    put_in_place(made, target)
    console.print(f"Installed {name} in {target}.")
    return target


def score(
    model: PreTrainedModel, processor: ProcessorMixin, benchmark_id: str, n: int | None = None
) -> dict[str, Any]:
    """Test score of a benchmark, the score when every picture is blank grey, and the difference.

    The difference is that of the questions' mean scores, paired, in percentage points: the F1 of
    mere guesses is 0 or 67, by the side they fall on. `study.guard` reads it.
    """
    benchmark = load_benchmark(benchmark_id)
    batches = Batches(benchmark, processor, "test", n or CARD_QUESTIONS, "cpu")
    result: dict[str, Any] = {"n": len(batches.rows), "max": benchmark.headline_max,
                              "metric": benchmark.metric}  # fmt: skip
    sheets = {}
    for state in ("seeing", "blank"):
        answers = answer_all(model, batches, benchmark.max_new_tokens, blank=state == "blank")
        sheet = benchmark.sheet(batches.rows, answers)
        sheets[state] = mean_sheet(batches.rows, sheet.correct.tolist())
        result[state] = stats.interval(sheet).plain()
        result[f"{state}_accuracy"] = sheet.accuracy
    difference = stats.paired_difference(sheets["seeing"], sheets["blank"])
    result["difference"] = difference.plain()
    return result


def _train(name: str, run: Path, plan: Sequence[Stage], device: str, seed: int) -> Path:
    check_options(device, seed)
    _open(run, name, seed, plan)
    fresh = not (run / LOG).exists() and not (run / PARENT).exists()
    if fresh and (parent := spec(name).parent) is not None:
        weights = verify(models_dir() / parent)["model.safetensors"]
        _write(run / PARENT, {"model": parent, "weights": weights})
    with metered(run, device):
        model = train(name, run, device=device, seed=seed, stages=plan)
    return install(name, model, run)


def _recipe_of(name: str) -> tuple[Stage, ...]:
    if name not in STAGES:
        raise TrainingError(f"There is no recipe for '{name}'. Known: {', '.join(STAGES)}.")
    return STAGES[name]


def check_options(device: str, seed: int) -> None:
    """Refuse what would fail late: no such device, a seed below 0, weights with no place to go."""
    check_present(device)
    check_whole("seed", seed, 0, 2**32 - 1)
    if repository() is None and not os.environ.get("FRUGALVLM_DATA"):
        raise TrainingError(
            "Training installs its weights in data/models, which an installed package must not "
            "change: work in a clone after `pip install -e .`, or set FRUGALVLM_DATA to a copy of "
            "its data/ folder."
        )


def run_folder(folder: str, name: str) -> Path:
    """Where the checkpoints of a run go."""
    run = Path(folder).expanduser().absolute() if folder else checkpoints_dir() / name
    for part in (run, *run.parents):
        if part.exists():
            if not part.is_dir():
                raise OptionError(f"{part} is a file, not a folder for checkpoints: name another.")
            break
    return run


def _open(run: Path, name: str, seed: int, plan: Sequence[Stage]) -> recipe.RunFiles:
    identity = {"model": name, "seed": seed, "stages": [asdict(s) for s in plan]}
    try:
        files = recipe.RunFiles(run, identity)
        files.check()
    except OSError as error:
        raise TrainingError(
            f"Cannot write to {run} ({error.strerror or error}): name a folder you may write to."
        ) from None
    except ValueError as error:  # the folder holds another run, or half of one
        raise TrainingError(str(error)) from None
    return files


def _training_log(run: Path) -> dict[str, Any]:
    """Stages and steps done, seconds, sessions, thinned curve; earlier training included."""
    identity = json.loads((run / "run.json").read_text())
    done = Progressed(**json.loads((run / "progress.json").read_text())["progress"])
    before: dict[str, Any] = {"stages": [], "sessions": [], "curve": []}
    if (run / LOG).exists():  # a continuation of installed weights
        before = json.loads((run / LOG).read_text())
    stages = list(before["stages"])
    for i, stage in enumerate(identity["stages"][len(stages) :], len(stages)):
        taken = stage["steps"] if i < done.stage else done.step if i == done.stage else 0
        stages.append({**stage, "done": taken})
    sessions = run / SESSIONS
    lines = sessions.read_text().splitlines() if sessions.exists() else []
    return {
        "seed": identity["seed"],
        "seconds": done.seconds,
        "stages": stages,
        "sessions": before["sessions"] + [json.loads(line) for line in lines],
        "curve": before["curve"] + thinned(list(read_log(run))),
        **{key: before[key] for key in ("parent", "notes") if key in before},
        **({"parent": json.loads((run / PARENT).read_text())} if (run / PARENT).exists() else {}),
    }


def thinned(curve: list[dict], keep: int = 200) -> list[dict]:
    """About so many entries of a learning curve."""
    step = max(1, len(curve) // keep)
    return curve[::step]


def _visual_words(run: Path) -> dict[str, torch.Tensor]:
    whole = load_file(run / json.loads((run / "progress.json").read_text())["model"])
    prefix = "scaffold.words."
    return {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=None) + "\n")
