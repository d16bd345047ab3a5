"""`invoke train --method KEY`: train a method on an embedded model, score and install it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import BENCHMARKS, HD_BENCHMARKS, load_benchmark, stats
from frugalvlm.benchmarks.asking import Batches, answer
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.methods import Vanilla, method_class
from frugalvlm.methods.base import Method
from frugalvlm.methods.trained import (
    TrainedMethod,
    methods_dir,
    write_learnt,
    write_learnt_hashes,
)
from frugalvlm.pocket.installed import put_in_place
from frugalvlm.pocket.models import SPECS, spec
from frugalvlm.pocket.recipe import read_log
from frugalvlm.pocket.scenes import IMAGE_SIZE
from frugalvlm.probes import model_card
from frugalvlm.probes.training import LOG, SCORES, check_options, run_folder, thinned
from frugalvlm.training import Recipe, TrainingError, lesson_of
from frugalvlm.training.metering import SESSIONS
from frugalvlm.training.run import learn

DEV_QUESTIONS = 200  # per benchmark, for the scores on a card


def train_method(
    key: str, model_name: str, folder: str = "", device: str = "cpu", seed: int = 0
) -> Path:
    """Train a method on an embedded model (or continue), score it on dev, install its weights.

    Args:
        key: of the method.
        model_name: an embedded model that is installed.
        folder: checkpoints; default: a folder of `checkpoints/`.
        device: "cpu" or "cuda".
        seed: decides first weights and data.

    Returns:
        The folder of the installed weights.

    Raises:
        TrainingError: nothing to train, no recipe, or a folder that holds another run.
        WeightsError: the model is not installed, or damaged.
    """
    cls: Any = method_class(key)
    lesson = lesson_of(cls)
    if model_name not in SPECS:
        raise TrainingError(
            f"'{model_name}' is no embedded model ({', '.join(SPECS)}): for another one call "
            "frugalvlm.training.run.learn with examples of your own."
        )
    recipes = lesson.recipes_for(model_name)
    check_options(device, seed)
    run = run_folder(folder, f"{key}-{model_name}-{model_hash(model_name)[:8]}")
    model, processor = load_vlm(model_name, device=device)
    method = learn(cls(), model, processor, model_name, recipes, run, device=device, seed=seed)
    return install_method(method, model.to("cpu"), processor, run, recipes, seed)


def install_method(
    method: TrainedMethod, model: PreTrainedModel, processor: ProcessorMixin, run: Path,
    recipes: Sequence[Recipe], seed: int,
) -> Path:  # fmt: skip
    """Write weights, hashes, learning curve, scores and card of a trained method.

    Everything is made in the run's folder first, so a kill meanwhile leaves what was installed.
    """
    assert method.learnt is not None
    name, console = method.learnt.model, Console()
    made, target = run / "installed", methods_dir() / method.key / name
    shutil.rmtree(made, ignore_errors=True)
    identity = json.loads((run / "run.json").read_text())
    notes = {
        "model_weights": model_hash(name), "seed": seed, "data": identity["data"],
        "recipes": [asdict(recipe) for recipe in recipes],
    }  # fmt: skip
    write_learnt(made, method, notes)
    write_learnt_hashes(made)
    sessions = [json.loads(line) for line in (run / SESSIONS).read_text().splitlines()]
    seconds = sum(session["seconds"] for session in sessions)
    curve = thinned(list(read_log(run)))
    log = {**notes, "seconds": seconds, "sessions": sessions, "curve": curve}
    (made / LOG).write_text(json.dumps(log) + "\n")
    console.print("Scoring on the dev split, with and without the method ...")
    stored = type(method).load(str(made))  # as it is stored, in half precision
    scores = dev_scores(model, processor, stored)
    (made / SCORES).write_text(json.dumps(scores) + "\n")
    (made / "README.md").write_text(card(stored, scores, log))
    put_in_place(made, target)
    console.print(f"Installed {method.key} for {name} in {target}.")
    return target


def dev_scores(
    model: PreTrainedModel, processor: ProcessorMixin, method: Method, n: int = DEV_QUESTIONS
) -> dict[str, dict[str, Any]]:
    """Per benchmark the dev score of the untouched model and of the method, and what it keeps."""
    name = getattr(getattr(method, "learnt", None), "model", "")
    large = name in SPECS and spec(name).side > IMAGE_SIZE
    return {
        benchmark: {
            "n": n, "metric": load_benchmark(benchmark).metric,
            "untouched": _score(model, processor, benchmark, Vanilla(), n),
            "method": _score(model, processor, benchmark, method, n),
        }
        for benchmark in (HD_BENCHMARKS if large else BENCHMARKS)
    }  # fmt: skip


def _score(
    model: PreTrainedModel, processor: ProcessorMixin, benchmark_id: str, method: Method, n: int
) -> dict[str, float]:
    """Score, its interval, and visual tokens of a picture, mean over questions and layers."""
    benchmark = load_benchmark(benchmark_id)
    batches = Batches(benchmark, processor, "dev", n, "cpu")
    said: dict[str, str | None] = {}
    kept: list[float] = []
    for ids, inputs in batches.batches:
        with method.on(model) as trace:
            answers = answer(model, processor, inputs, benchmark.max_new_tokens)
        said.update(zip(ids, answers, strict=True))
        kept += [trace.mean_tokens] * len(ids)
    found = stats.interval(benchmark.sheet(batches.rows, [said[i] for i in batches.ids]))
    return {"value": found.value, "low": found.low, "high": found.high, "tokens": fmean(kept)}


def card(method: TrainedMethod, scores: dict[str, dict[str, Any]], log: dict[str, Any]) -> str:
    """The card of a method's weights in Markdown."""
    learnt, cls = method.learnt, type(method).__name__
    assert learnt is not None
    own = sum(p.numel() for p in learnt.own.parameters())
    tuned = sum(p.numel() for p in learnt.tuned.values())
    lines = [
        f"# {method.key} for {learnt.model}",
        "",
        f"{own:,} parameters of the method's own modules"
        + (f" and {tuned:,} of the model's" if tuned else "")
        + f", trained on `{learnt.model}` (weights {log['model_weights']}) by this repository's "
        f"recipe: `invoke train --method {method.key} --model {learnt.model}`.",
        "",
        "```python",
        "from frugalvlm import load_vlm, methods",
        f'model, processor = load_vlm("{learnt.model}")',
        f'with methods.{cls}.load("{learnt.model}").on(model) as trace:',
        "    ...",
        "```",
        "",
        "## Scores on dev scenes",
        "",
        "Nothing was chosen by the test split. Tokens are visual tokens of a picture, mean over "
        "questions and decoder layers; 95 % intervals by bootstrap over pictures.",
        "",
        "| benchmark | metric | untouched | with it | tokens untouched | tokens with it | n |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(benchmark, s) for benchmark, s in scores.items()),
        "",
        "## Training",
        "",
        "| stage | trains | steps | prompts a step | peak learning rate |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {i} | {', '.join(r['trains'])} | {r['steps']} | {r['batch']} "
            f"| {r['learning_rate']:g} |"
            for i, r in enumerate(log["recipes"], 1)
        ),
        "",
        f"Data: {', '.join(f'{k} {v}' for k, v in log['data'].items())}. Seed {log['seed']}. "
        f"{log['seconds'] / 60:.1f} minutes of training, "
        f"{model_card.machines(log['sessions'])}. The learning curve is in `{LOG}`.",
        "",
        model_card.energy(log["sessions"], log["seconds"]),
        "",
        "Weights are stored in half precision. On another model they are refused.",
    ]
    return "\n".join(lines) + "\n"


def _row(benchmark: str, s: dict[str, Any]) -> str:
    def shown(part: dict[str, float]) -> str:
        return f"{part['value']:.1f} [{part['low']:.1f}, {part['high']:.1f}]"

    before, after = s["untouched"], s["method"]
    return (
        f"| {benchmark} | {s['metric']} | {shown(before)} | {shown(after)} "
        f"| {before['tokens']:.1f} | {after['tokens']:.1f} | {s['n']} |"
    )
