"""The model card of a pocket model: scores, recipe, compute, energy, limits."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from frugalvlm.benchmarks import BENCHMARKS, HD_BENCHMARKS
from frugalvlm.measure import GRID_FACTOR_G_PER_KWH, carbon_g
from frugalvlm.pocket.models import spec

# codecarbon's fallback for a CPU it does not know. On one and the same work, tools and modes were
# seen to say 4, 8 and 24 W: an estimate that rests on it is an order of magnitude, not a figure.
WATTS_PER_THREAD = 4.0

TRAINS = {
    "language": "decoder, on symbolic pictures: the pretrained language model",
    "tower": "vision tower, on captions and patch labels: the pretrained CLIP or SigLIP",
    "align": "projector: LLaVA's feature alignment",
    "instruct": "projector and decoder: LLaVA's visual instruction tuning",
}
GOAL, MARGIN = 75, 30  # percent right; percentage points above a blank picture


def card(
    name: str, model: PreTrainedModel, scores: dict[str, dict[str, Any]], log: dict[str, Any]
) -> str:
    """The model card in Markdown.

    Args:
        name: the model's name.
        model: its weights as installed.
        scores: per benchmark, what `train.score` gives.
        log: what `training_log.json` holds: seed, stages, seconds, sessions, curve; by hand, where
            a run did not follow the recipe to the letter, `notes` that say so.
    """
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    side = spec(name).side
    lines = [
        f"# {name}",
        "",
        f"A `{type(model).__name__}` with {parameters:.1f} million parameters, trained from "
        "scratch by this repository's recipe (`invoke train`). It answers English questions about "
        f"{side}x{side} pictures of handwritten digits and coloured shapes and is good for nothing "
        "else: it serves to study visual-token reduction on a laptop.",
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
        *(_score_row(benchmark, s) for benchmark, s in scores.items()),
        "| **mean of the suite** | | | | "
        + " | ".join(f"**{_mean(scores, state):.1f} %**" for state in ("seeing", "blank"))
        + " | |",
        "",
        "## Training",
        "",
        "Scenes are composed on the fly from the train part of scikit-learn's `load_digits` "
        "scans (UCI Optical Recognition of Handwritten Digits, CC BY 4.0), shapes and textures; "
        "questions and answers follow from the scene. See `src/frugalvlm/pocket/`.",
        "",
        "| stage | trains | steps | pictures a step | questions a picture | peak learning rate |",
        "| --- | --- | --- | --- | --- | --- |",
        *map(_stage_row, log["stages"]),
        "",
        *_started_from(log),
        *(line for note in log.get("notes", ()) for line in (note, "")),
        f"{log['seconds'] / 60:.0f} minutes of training steps in all, seed {log['seed']}, "
        f"{machines(log['sessions'])}. The learning curve is in `training_log.json`. "
        f"`invoke train --model {name} --check` retrains the first steps of every stage and "
        "compares their losses; `--more N` in its place continues from these weights.",
        "",
        energy(log["sessions"], log["seconds"]),
        "",
        "## What the papers rest on",
        "",
        "Whether attention in this model looks as it does in the papers' models; figures in "
        "`notebooks/learn/the_pocket_benchmarks.ipynb`, rules in `frugalvlm/study/phenomena.py`.",
        "",
        f"<!-- generated: phenomena model={name} -->",
        "",
        "Run `invoke readme` to fill in what the records say.",
        "",
        "<!-- end: phenomena -->",
        "",
        "## Limits",
        "",
        "- Its world is 4 shapes, 10 digits, 8 colours, 9 places and about 150 words. Anything "
        "else gets an answer that sounds just as sure.",
        "- The scans of the test scenes are unseen, their writers are not: the data set does not "
        "say who wrote what.",
        "- Weights are stored in half precision and used in float32.",
        _weak(scores),
    ]
    return "\n".join(lines) + "\n"


def _score_row(benchmark: str, s: dict[str, Any]) -> str:
    seeing, blank = s["seeing"], s["blank"]
    return (
        f"| {benchmark} | {s['metric']} (of {s['max']:.0f}) "
        f"| {seeing['value']:.1f} [{seeing['low']:.1f}, {seeing['high']:.1f}] "
        f"| {blank['value']:.1f} [{blank['low']:.1f}, {blank['high']:.1f}] "
        f"| {s['seeing_accuracy']:.1f} % | {s['blank_accuracy']:.1f} % | {s['n']} |"
    )


def _mean(scores: dict[str, dict[str, Any]], state: str) -> float:
    """Over the suite; benchmarks apart from it stand in the table only."""
    suite = [s for benchmark, s in scores.items() if benchmark in BENCHMARKS | HD_BENCHMARKS]
    return sum(s[f"{state}_accuracy"] for s in suite) / len(suite)


def _stage_row(stage: dict[str, Any]) -> str:
    steps = str(stage["done"])
    if stage["done"] < stage["steps"]:
        steps += f" of {stage['steps']}"
    half = ", every second layer" if stage["half_depth"] else ""
    clips = f"; {stage['clips']:.0%} of the steps on clips" if stage.get("clips") else ""
    return (
        f"| {stage['name']} | {TRAINS[stage['name']]}{half}{clips} | {steps} | {stage['batch']} "
        f"| {stage['questions'] or 'none'} | {stage['learning_rate']:g} |"
    )


def _started_from(log: dict[str, Any]) -> list[str]:
    if "parent" not in log:
        return []
    parent = log["parent"]
    return [
        f"Training started from the weights of `{parent['model']}` (SHA-256 "
        f"{parent['weights'][:16]}...).",
        "",
    ]


def machines(sessions: list[dict[str, Any]]) -> str:
    """On what a training ran, for a sentence."""
    seen = dict.fromkeys(map(_machine, sessions))  # in order, once each
    return "on " + " and ".join(seen) if seen else "on a machine that was not recorded"


def _machine(session: dict[str, Any]) -> str:
    machine = session["machine"]
    precision = "bfloat16" if session["bfloat16"] else "float32"
    if machine["gpu"]:
        return f"one {machine['gpu']['name']} ({precision})"
    return f"{machine['threads']} thread(s) of {machine['cpu']['model']} ({precision})"


def energy(sessions: list[dict[str, Any]], seconds: float) -> str:
    """A sentence on the energy of training: measured, or modelled and marked as such.

    Args:
        sessions: entries of `sessions.jsonl`.
        seconds: training steps of all sessions, recorded or not.
    """
    read = [s for s in sessions if any(j is not None for j in s["joules"].values())]
    if read:
        joules = sum(j for s in read for j in s["joules"].values() if j is not None)
        how = {f"{c}: {m}" for s in read for c, m in s["methods"].items()}
        covered = sum(s["seconds"] for s in read)
        return (
            f"Energy, measured by hardware counters ({', '.join(sorted(how))}) over "
            f"{covered / 60:.0f} minutes, pauses between steps included: {joules / 1e3:.1f} kJ, "
            f"{_grams(joules)}. What has no counter is not in it."
        )
    threads = {s["machine"]["threads"] for s in sessions if s["device"] == "cpu"}
    if len(threads) != 1 or any(s["device"] != "cpu" for s in sessions):
        return "Energy was not measured: the machine has no readable counter."
    joules = seconds * threads.pop() * WATTS_PER_THREAD
    return (
        f"Energy was not measured (the machine has no readable counter). *Modelled*, not to be "
        f"compared with anything: {WATTS_PER_THREAD:g} W per busy thread, memory and the rest of "
        f"the machine left out, make about {joules / 1e3:.0f} kJ, {_grams(joules, 1)}. Estimators "
        "of this kind differ by a factor of six on the same work."
    )


def _grams(joules: float, digits: int = 3) -> str:
    return f"{carbon_g(joules):.{digits}g} g CO2e at {GRID_FACTOR_G_PER_KWH:.0f} g/kWh"


def _weak(scores: dict[str, dict[str, Any]]) -> str:
    weak = [
        benchmark
        for benchmark, s in scores.items()
        if min(s["seeing_accuracy"], 100 * s["seeing"]["value"] / s["max"]) < GOAL
        or s["seeing_accuracy"] - s["blank_accuracy"] < MARGIN
    ]
    if not weak:
        return f"- Every benchmark is above {GOAL} % and {MARGIN} points above its blank score."
    return (
        f"- Under {GOAL} %, or less than {MARGIN} points above a blank picture: "
        f"{', '.join(weak)}. What a method keeps there says little."
    )
