"""`invoke train`: run the recipe, score the result on development scenes, install the weights."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import BENCHMARKS
from frugalvlm.loading import models_dir, save_vlm, write_hashes
from frugalvlm.paths import project_root
from frugalvlm.pocket.models import build_processor
from frugalvlm.pocket.recipe import STAGES, read_log, train
from frugalvlm.study import stats
from frugalvlm.study.runs import Batches, answer_all

NOTES = {
    "pocket-llava-base": "The run was interrupted several times and its plan was shortened on the "
    "way: up to step 410 of `read` the learning rate followed cosines of 1,400 to 2,600 steps, "
    "then one of 2,000, of which 1,031 were run; `answer` stopped at 399 of 1,300. The loss was "
    "still falling at the end. Looking things up by kind or place, checks (yes or no) and "
    "multiple choice are the weak sides of this version."
}
CARD_QUESTIONS = 600  # per benchmark, for the scores on the model card


def train_and_install(name: str, folder: str, device: str = "cpu", seed: int = 0) -> Path:
    """Train (or continue), score with and without the picture, and write weights and card.

    Args:
        name: a model of the recipe.
        folder: checkpoints; relative folders lie below the repository.
        device: "cpu" or "cuda".
        seed: decides initial weights and data.

    Returns:
        The folder of the installed model.
    """
    console = Console()
    run = project_root() / folder
    model = train(name, run, device=device, seed=seed)
    return install(name, model, run, console)


def install(name: str, model: PreTrainedModel, run: Path, console: Console) -> Path:
    """Write weights, processor, hashes and model card of a trained model."""
    target = models_dir() / name
    processor = build_processor()
    save_vlm(model, processor, target)
    console.print("Scoring the model on test scenes, with and without their pictures ...")
    # The card states the weights as they are stored, so they are read back first.
    stored = type(model).from_pretrained(target).eval()
    scores = {b: score(stored, processor, b) for b in BENCHMARKS}
    curve = list(read_log(run))
    (target / "training_log.json").write_text(json.dumps(_thinned(curve), indent=None) + "\n")
    seconds = json.loads((run / "progress.json").read_text())["progress"]["seconds"]
    (target / "README.md").write_text(card(name, stored, scores, seconds))
    write_hashes(target)
    console.print(f"Installed {name} in {target}.")
    return target


def score(model: PreTrainedModel, processor: ProcessorMixin, benchmark_id: str) -> dict[str, Any]:
    """Test score of a benchmark, and the score when every picture is blank grey."""
    benchmark = BENCHMARKS[benchmark_id]
    batches = Batches(benchmark, processor, "test", CARD_QUESTIONS, "cpu")
    result: dict[str, Any] = {"n": len(batches.rows), "max": benchmark.headline_max,
                              "metric": benchmark.metric}  # fmt: skip
    for state in ("seeing", "blank"):
        answers = answer_all(model, batches, benchmark.max_new_tokens, blank=state == "blank")
        sheet = benchmark.sheet(batches.rows, answers)
        result[state] = asdict(stats.interval(sheet))
        result[f"{state}_accuracy"] = sheet.accuracy
    return result


def _thinned(curve: list[dict], keep: int = 200) -> list[dict]:
    step = max(1, len(curve) // keep)
    return curve[::step]


def card(name: str, model: PreTrainedModel, scores: dict[str, dict], seconds: float) -> str:
    """The model card: data, recipe, compute, scores with intervals, limits."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    lines = [
        f"# {name}",
        "",
        f"A `{type(model).__name__}` with {parameters:.1f} million parameters, trained from "
        "scratch by this repository's recipe (`invoke train`). It answers English questions about "
        "96x96 pictures of handwritten digits and coloured shapes and is good for nothing else: it "
        "serves to study visual-token reduction on a laptop.",
        "",
        "```python",
        "from frugalvlm import load_vlm",
        f'model, processor = load_vlm("{name}")',
        "```",
        "",
        "It also loads with `AutoModelForImageTextToText` and `AutoProcessor`, no remote code.",
        "",
        "## Scores on test scenes",
        "",
        "Unseen handwriting scans and unseen scene seeds; greedy answers; 95 % intervals by "
        "bootstrap over pictures. *Blank* is the same model with every picture replaced by grey.",
        "",
        "| benchmark | metric | score | blank | accuracy | accuracy blank | n |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for benchmark, s in scores.items():
        seeing, blank = s["seeing"], s["blank"]
        lines.append(
            f"| {benchmark} | {s['metric']} (of {s['max']:.0f}) "
            f"| {seeing['value']:.1f} [{seeing['low']:.1f}, {seeing['high']:.1f}] "
            f"| {blank['value']:.1f} [{blank['low']:.1f}, {blank['high']:.1f}] "
            f"| {s['seeing_accuracy']:.1f} % | {s['blank_accuracy']:.1f} % | {s['n']} |"
        )
    mean = [sum(s[f"{k}_accuracy"] for s in scores.values()) / len(scores)
            for k in ("seeing", "blank")]  # fmt: skip
    lines += [
        f"| **mean** | | | | **{mean[0]:.1f} %** | **{mean[1]:.1f} %** | |",
        "",
        "## Training",
        "",
        "Scenes are composed on the fly from the train part of scikit-learn's `load_digits` "
        "scans (UCI Optical Recognition of Handwritten Digits, CC BY 4.0), shapes and textures; "
        "questions and answers follow from the scene. See `src/frugalvlm/pocket/`.",
        "",
        "| stage | trains | steps | pictures a step | questions a picture | learning rate |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {s.name} | {', '.join(s.trains)} | {s.steps} | {s.batch} "
            f"| {s.questions or 'dense labels'} | {s.learning_rate:g} |"
            for s in STAGES[name]
        ),
        "",
        f"{seconds / 60:.0f} minutes of training in all, float32, on {torch.get_num_threads()} "
        f"threads of a {platform.machine()} CPU. Energy was not measured: the machine has no "
        "readable counter. The learning curve is in `training_log.json`.",
        "",
        NOTES.get(name, ""),
    ]
    return "\n".join(lines).rstrip() + "\n"
