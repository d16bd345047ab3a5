"""`invoke train --method` installs what a method learnt, with card, scores and hashes."""

from __future__ import annotations

import json

import pytest
import torch

from frugalvlm import load_vlm, methods
from frugalvlm.benchmarks import BENCHMARKS
from frugalvlm.cli import main
from frugalvlm.methods.trained import methods_dir
from frugalvlm.pocket.installed import models_dir, save_vlm
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.probes import methods as installing
from frugalvlm.training import Recipe
from frugalvlm.training.dyvte import LESSON

NAME = "pocket-llava-tiny"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A data folder with a model that knows nothing, and gates for it."""
    data = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRUGALVLM_DATA", str(data))
        patch.setattr(installing, "DEV_QUESTIONS", 6)
        patch.setattr(installing, "BENCHMARKS", {"pocket-gqa": BENCHMARKS["pocket-gqa"]})
        patch.setitem(LESSON.recipes, NAME, (Recipe(3, 4, 1e-3),))
        torch.manual_seed(0)
        save_vlm(build_model(NAME), build_processor(NAME), models_dir() / NAME)
        run = tmp_path_factory.mktemp("run")
        arguments = ["train", "--method", "dyvte", "--model", NAME, "--folder", str(run)]
        assert main([*arguments, "--seed", "5"]) == 0
        yield methods_dir() / "dyvte" / NAME, run


def test_the_method_runs_with_what_is_installed(installed):
    model, processor = load_vlm(NAME)
    method = methods.DyVTE.load(NAME)
    inputs = processor(
        images=BENCHMARKS["pocket-gqa"].dataset("dev", 1)[0]["image"],
        text="USER: <image>\nwhat is this? ASSISTANT:", return_tensors="pt",
    )  # fmt: skip
    with method.on(model) as trace:
        model.generate(**inputs, max_new_tokens=2)
    assert trace.tokens_per_layer[0] == 144


def test_weights_are_those_of_the_run_in_half_precision(installed):
    from safetensors.torch import load_file

    folder, run = installed
    trained = load_file(run / "stage-0.safetensors")
    stored = load_file(folder / "method.safetensors")
    assert {k for k in stored if k != "sample"} == set(trained)
    for key, value in trained.items():
        assert torch.equal(stored[key], value.half()), key
    assert (folder / "method.safetensors").stat().st_size < 2 * sum(
        v.numel() for v in trained.values()
    ) + 10_000


def test_the_card_tells_data_recipe_compute_energy_and_scores(installed):
    folder, _ = installed
    text, scores = (
        (folder / "README.md").read_text(),
        json.loads((folder / "scores.json").read_text()),
    )
    log = json.loads((folder / "training_log.json").read_text())
    gqa = scores["pocket-gqa"]
    for part in ("untouched", "method"):
        assert f"{gqa[part]['value']:.1f} [{gqa[part]['low']:.1f}" in text
    assert gqa["untouched"]["tokens"] == 144 >= gqa["method"]["tokens"] >= 144 / 8
    assert "| 1 | own. | 3 | 4 | 0.001 |" in text
    assert "Seed 5" in text
    assert "generation 1" in text
    assert "Energy" in text
    assert log["sessions"][0]["seconds"] > 0
    assert log["curve"][0]["step"] == 0
    assert f'methods.DyVTE.load("{NAME}")' in text
