"""A stage trains what it should, and an interrupted run is the uninterrupted one."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from frugalvlm.benchmarks import BENCHMARKS
from frugalvlm.benchmarks.base import MAX_QUESTIONS, SEEDS_PER_SPLIT
from frugalvlm.pocket import recipe
from frugalvlm.pocket.models import build_model, build_tokenizer
from frugalvlm.pocket.objectives import Scaffold
from frugalvlm.pocket.recipe import STAGES, MuonAdamW, Stage, Whole, read_log, seed_of, train
from frugalvlm.pocket.scenes import SPLITS, make_scene, scan_split

NAME = "pocket-llava-tiny"
PLAN = (
    Stage("language", 2, 2, 2e-3, 1, 3, half_depth=True),
    Stage("tower", 2, 2, 2e-3, 1),
    Stage("align", 2, 2, 2e-3, 1, half_depth=True),
    Stage("instruct", 2, 2, 2e-3, 1, 3),
)


def _checkpoint(folder):
    return load_file(folder / json.loads((folder / "progress.json").read_text())["model"])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The log and final checkpoint of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    model = train(NAME, folder, stages=PLAN, quiet=True)
    return model, _checkpoint(folder), list(read_log(folder))


@pytest.fixture(scope="module")
def stepwise_run(tmp_path_factory):
    """The same run, interrupted after every single step; its checkpoint after each."""
    folder = tmp_path_factory.mktemp("stepwise")
    states = []
    for _ in range(sum(s.steps for s in PLAN)):
        train(NAME, folder, stages=PLAN, quiet=True, stop_after=1)
        states.append(_checkpoint(folder))
    return train(NAME, folder, stages=PLAN, quiet=True), states, list(read_log(folder))


def test_an_interrupted_run_equals_an_uninterrupted_one(whole_run, stepwise_run):
    model, final, log = whole_run
    stepped, states, stepped_log = stepwise_run
    assert stepped_log == log
    assert [e["stage"] for e in log] == [s.name for s in PLAN for _ in range(2)]
    for key, value in model.state_dict().items():
        assert torch.equal(value, stepped.state_dict()[key]), key
    for key, value in final.items():
        assert torch.equal(value, states[-1][key]), key


@pytest.mark.parametrize("stage", range(len(PLAN)), ids=[s.name for s in PLAN])
def test_a_run_that_forgets_the_optimiser_is_another_run(stage, tmp_path, monkeypatch):
    """So the comparison above can fail, in every stage."""
    plan = [PLAN[stage]]
    train(NAME, tmp_path / "whole", stages=plan, quiet=True)
    train(NAME, tmp_path / "torn", stages=plan, quiet=True, stop_after=1)
    monkeypatch.setattr(recipe.RunFiles, "restore_optimizer", lambda *_: None)
    train(NAME, tmp_path / "torn", stages=plan, quiet=True)
    whole, torn = _checkpoint(tmp_path / "whole"), _checkpoint(tmp_path / "torn")
    assert any(not torch.equal(whole[k], torn[k]) for k in whole)


def test_a_stage_trains_its_modules_only(stepwise_run):
    _, states, _ = stepwise_run
    torch.manual_seed(0)
    model = build_model(NAME)
    before = Whole(model, Scaffold(model, build_tokenizer())).state_dict()
    parts = (
        "model.model.language_model", "model.lm_head", "scaffold.words",
        "model.model.vision_tower", "scaffold.heads", "scaffold.captions",
        "model.model.multi_modal_projector",
    )  # fmt: skip
    expected = {
        "language": set(parts[:3]), "tower": set(parts[3:6]), "align": {parts[6]},
        "instruct": {*parts[:3], parts[6]},
    }  # fmt: skip
    for stage, after in zip(PLAN, states[1::2], strict=True):
        changed = {k for k in after if not torch.equal(after[k], before[k])}
        found = {part for part in parts if any(k.startswith(part) for k in changed)}
        assert found == expected[stage.name], stage.name
        assert all(k.startswith(parts) for k in changed), stage.name
        before = after


def _layers(state, odd):
    number = re.compile(r"model\.model\.language_model\.layers\.(\d+)\.")
    return {k: v for k, v in state.items() if (m := number.match(k)) and int(m[1]) % 2 == odd}


def test_half_depth_leaves_every_second_layer_untouched(stepwise_run):
    _, states, _ = stepwise_run
    torch.manual_seed(0)
    fresh = {f"model.{k}": v for k, v in build_model(NAME).state_dict().items()}
    trained = states[5]  # the last step of the last stage of half depth
    assert len(_layers(trained, odd=1)) == len(_layers(trained, odd=0)) > 0
    for key, value in _layers(trained, odd=1).items():
        assert torch.equal(value, fresh[key]), key
    matrices = {k: v for k, v in _layers(trained, odd=0).items() if v.ndim == 2}
    assert all(not torch.equal(value, fresh[key]) for key, value in matrices.items())


def test_waking_bystanders_leaves_the_decoders_function_as_it_was():
    torch.manual_seed(0)
    model = build_model(NAME).eval()
    ids = torch.arange(2, 20)[None]
    layers = model.model.language_model.layers
    with torch.no_grad():
        with recipe._depth(model, half=True):
            half = model(input_ids=ids).logits
        assert (model(input_ids=ids).logits - half).abs().max() > 1e-4, "they were not silent"
        recipe._wake_bystanders(model)
        assert torch.equal(model(input_ids=ids).logits, half)
    for before, layer in zip(layers[::2], layers[1::2], strict=True):
        assert torch.equal(before.self_attn.q_proj.weight, layer.self_attn.q_proj.weight)
    # Awake means: training moves them from here.
    model(input_ids=ids).logits.logsumexp(-1).sum().backward()
    assert all(layer.self_attn.o_proj.weight.grad.abs().max() > 0 for layer in layers[1::2])


def test_muon_gets_the_matrices_of_layers_and_adamw_the_rest():
    model = build_model(NAME)
    optimizer = MuonAdamW(model, 1e-3)
    names = {n for n, p in model.named_parameters() if id(p) in optimizer.in_muon}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in names
    assert all(".layers." in n for n in names)
    held = [p for part in optimizer.parts for g in part.param_groups for p in g["params"]]
    assert len(held) == len(set(map(id, held))) == len(list(model.parameters()))
    optimizer.set_learning_rate(0.5)
    assert {g["lr"] for part in optimizer.parts for g in part.param_groups} == {0.5}


def test_the_learning_rate_warms_up_and_comes_down():
    stage = replace(PLAN[0], steps=100, warmup=10)
    rates = [recipe._schedule(step, stage) for step in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0.05 < rates[-1] < 0.06


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(NAME, tmp_path, stages=PLAN, quiet=True, stop_after=1)
    for other in ({"seed": 1}, {"stages": PLAN[:2]}):
        with pytest.raises(ValueError, match="another model, seed or recipe"):
            train(NAME, tmp_path, **{"stages": PLAN, "quiet": True, **other})
    assert (tmp_path / "progress.json").exists(), "what was there is still there"


def test_splits_share_no_scan_and_training_shares_no_seed():
    scans = {s: {i for part in scan_split()[s].values() for i in part.tolist()} for s in SPLITS}
    for a in SPLITS:
        assert all(a == b or not scans[a] & scans[b] for b in SPLITS)
        for seed in range(40):
            scene = make_scene(a, seed)
            used = {t.scan for t in scene.things if t.is_digit}
            used |= set(scene.plate.scans if scene.plate else ())
            assert used <= scans[a]
    last = max(b.first_seed for b in BENCHMARKS.values()) + 2 * SEEDS_PER_SPLIT + MAX_QUESTIONS
    assert last < seed_of(0, 0, 1, 0)


@pytest.mark.parametrize("name", STAGES)
def test_no_two_pictures_of_a_recipe_share_a_seed(name):
    spans = []
    for number, stage in enumerate(STAGES[name]):
        assert seed_of(number, 1, stage.batch, 0) == seed_of(number, 0, stage.batch, stage.batch)
        final = seed_of(number, stage.steps - 1, stage.batch, stage.batch - 1)
        spans.append((seed_of(number, 0, stage.batch, 0), final))
    assert all(a[1] < b[0] for a, b in pairwise(spans))
