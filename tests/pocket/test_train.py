"""`invoke train` installs what it trained, checks it, goes on from it; refusals are a sentence."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from frugalvlm import load_vlm
from frugalvlm.checks import OptionError
from frugalvlm.errors import FrugalError
from frugalvlm.pocket import recipe
from frugalvlm.pocket.installed import WeightsError, models_dir, verify, write_hashes
from frugalvlm.pocket.recipe import STAGES, Stage
from frugalvlm.probes import training as train
from frugalvlm.probes.model_card import _weak as weak
from frugalvlm.probes.model_card import card, energy
from frugalvlm.probes.training import TrainingError

NAME = "pocket-llava-tiny"
PLAN = (
    Stage("language", 2, 2, 3e-3, 1, 3, half_depth=True),
    Stage("tower", 2, 2, 3e-3, 1),
    Stage("align", 2, 2, 3e-3, 1, half_depth=True),
    Stage("instruct", 2, 2, 3e-3, 1, 3),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tiny recipe, one benchmark, and a data folder of its own."""
    data = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRUGALVLM_DATA", str(data))
        patch.setitem(STAGES, NAME, PLAN)
        patch.setattr(train, "CHECK_STEPS", 2)
        patch.setattr(train, "CARD_QUESTIONS", 6)
        patch.setattr(train, "BENCHMARKS", {"pocket-gqa": train.BENCHMARKS["pocket-gqa"]})
        patch.setattr(train, "LONG_BENCHMARKS", {})
        yield data


@pytest.fixture(scope="module")
def installed(small, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    return train.train_and_install(NAME, str(run), seed=3), run


def test_what_is_installed_is_what_was_trained(installed):
    folder, run = installed
    assert folder == models_dir() / NAME
    assert {"check.json", "scores.json", "training_log.json"} <= set(verify(folder))
    whole = load_file(run / json.loads((run / "progress.json").read_text())["model"])
    model, _ = load_vlm(NAME)
    for key, value in model.state_dict().items():
        assert torch.equal(value, whole[f"model.{key}"].half().float()), key
    words = load_file(folder / train.WORDS)
    assert set(words) == {"row.weight", "col.weight"}
    assert torch.equal(words["row.weight"], whole["scaffold.words.row.weight"])


def test_the_card_and_the_log_tell_the_run(installed):
    folder, _ = installed
    text = (folder / "README.md").read_text()
    log = json.loads((folder / "training_log.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())
    for stage in PLAN:
        assert f"| {stage.name} |" in text
    gqa = scores["pocket-gqa"]
    assert f"{gqa['seeing']['value']:.1f} [{gqa['seeing']['low']:.1f}" in text
    assert f"{gqa['blank_accuracy']:.1f} %" in text
    assert "seed 3" in text
    assert "**pocket-gqa" not in text
    assert "Under 75 %" in text, "two steps make no good model, and the card says so"
    assert [s["done"] for s in log["stages"]] == [2, 2, 2, 2]
    assert [e["stage"] for e in log["curve"]] == [s.name for s in PLAN for _ in range(2)]
    assert len(log["sessions"]) == 1
    assert log["sessions"][0]["seconds"] >= log["seconds"] > 0


def test_the_card_says_where_a_run_began_and_where_it_left_the_recipe(installed):
    folder, _ = installed
    model, _ = load_vlm(NAME)
    log = json.loads((folder / "training_log.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())
    plain = card(NAME, model, scores, log)
    assert "Training started from" not in plain
    parent = {"model": "pocket-llava-base", "weights": "0123456789abcdefgh"}
    told = card(NAME, model, scores, {**log, "parent": parent, "notes": ["It rained."]})
    assert "weights of `pocket-llava-base` (SHA-256 0123456789abcdef...)" in told
    assert "\nIt rained.\n" in told
    assert "<!-- generated: phenomena model=pocket-llava-tiny -->" in told


def test_check_passes_on_the_same_recipe(installed):
    sentence = train.check(NAME)
    assert "8 losses agree within 0.00%" in sentence


def test_check_notices_another_learning_rate(installed, monkeypatch):
    warmer = tuple(replace(s, learning_rate=1.25 * s.learning_rate) for s in PLAN)
    monkeypatch.setitem(STAGES, NAME, warmer)
    with pytest.raises(TrainingError, match=r"does not reproduce: at step \d of stage"):
        train.check(NAME)


def test_check_notices_another_seed(installed, monkeypatch):
    folder, _ = installed
    path = folder / "check.json"
    recorded = path.read_text()
    monkeypatch.setattr(train, "verify", lambda folder: {})  # the hash would tell first
    try:
        path.write_text(recorded.replace('"seed": 3', '"seed": 4'))
        with pytest.raises(TrainingError, match="does not reproduce: at step 0"):
            train.check(NAME)
    finally:
        path.write_text(recorded)


def test_check_notices_another_optimiser_and_other_stages(installed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(recipe.MuonAdamW, "step", lambda self: None)
        with pytest.raises(TrainingError, match="at step 1 of stage 'language'"):
            train.check(NAME)
    monkeypatch.setitem(STAGES, NAME, PLAN[:3])
    with pytest.raises(TrainingError, match="other stages or steps"):
        train.check(NAME)


def test_more_goes_on_from_the_installed_weights(installed, tmp_path, monkeypatch):
    folder, _ = installed
    before = load_vlm(NAME)[0].state_dict()
    told = json.loads((folder / "training_log.json").read_text())
    told |= {"parent": {"model": "another", "weights": "0" * 64}, "notes": ["It rained."]}
    (folder / "training_log.json").write_text(json.dumps(told))
    write_hashes(folder)
    words, log = load_file(folder / train.WORDS), (folder / "training_log.json").read_text()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train_more(NAME, 2, str(tmp_path))
    progress = json.loads((tmp_path / "progress.json").read_text())
    start = load_file(tmp_path / progress["model"])
    assert progress["progress"]["stage"] == len(PLAN)
    for key, value in before.items():
        assert torch.equal(start[f"model.{key}"], value), key
    for key, value in words.items():
        assert torch.equal(start[f"scaffold.words.{key}"], value)

    with pytest.raises(TrainingError, match="another model, seed or recipe"):
        train.train_more(NAME, 3, str(tmp_path))
    train.train_more(NAME, 2, str(tmp_path))  # the same command goes on
    after = load_vlm(NAME)[0].state_dict()
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert moved
    assert all("vision_tower" not in k for k in moved)
    longer = json.loads((folder / "training_log.json").read_text())
    assert [s["done"] for s in longer["stages"]] == [2, 2, 2, 2, 2]
    assert longer["curve"][: len(PLAN) * 2] == json.loads(log)["curve"]
    assert len(longer["curve"]) == len(PLAN) * 2 + 2
    assert longer["seconds"] > json.loads(log)["seconds"]
    # A continuation starts from the model's own weights; where these came from stays true.
    assert longer["parent"] == told["parent"]
    assert longer["notes"] == told["notes"]
    assert "reproduce" in train.check(NAME)


def test_bad_input_is_refused_in_a_sentence(small, tmp_path, monkeypatch):
    assert issubclass(TrainingError, FrugalError)
    with pytest.raises(TrainingError, match=r"no recipe for 'pocket-none'. Known: pocket-llava"):
        train.train_and_install("pocket-none")
    with pytest.raises(OptionError, match="Unknown device 'tpu': cpu, cuda"):
        train.train_and_install(NAME, str(tmp_path / "run"), device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="No GPU was found"):
        train.check(NAME, device="cuda")
    with pytest.raises(OptionError, match="at least 1; got -2"):
        train.train_more(NAME, -2)
    monkeypatch.setenv("FRUGALVLM_DATA", str(tmp_path))
    for command in (lambda: train.train_more(NAME, 5), lambda: train.check(NAME)):
        with pytest.raises(WeightsError, match="invoke train --model"):
            command()
    assert not (tmp_path / "run").exists()


def test_weights_of_an_older_version_cannot_be_continued(small, tmp_path, monkeypatch):
    monkeypatch.setenv("FRUGALVLM_DATA", str(tmp_path))
    monkeypatch.setattr(train, "verify", lambda folder: {"model.safetensors": "0" * 64})
    with pytest.raises(TrainingError, match="installed by an older version"):
        train.train_more(NAME, 5)
    with pytest.raises(TrainingError, match=r"check\.json is missing"):
        train.check(NAME)


def test_the_card_names_benchmarks_that_say_little():
    def scored(accuracy, blank, value):
        return {"seeing_accuracy": accuracy, "blank_accuracy": blank, "max": 100.0,
                "seeing": {"value": value}}  # fmt: skip

    good = scored(90.0, 50.0, 88.0)
    assert "Every benchmark" in weak({"a": good})
    for bad in (scored(74.0, 20.0, 90.0), scored(90.0, 61.0, 90.0), scored(90.0, 20.0, 69.4)):
        assert "blank picture: b. " in weak({"a": good, "b": bad})


def _session(joules, device="cpu", threads=2, seconds=600.0):
    methods = {c: "rapl" if j is not None else "none" for c, j in joules.items()}
    return {"seconds": seconds, "device": device, "joules": joules, "methods": methods,
            "machine": {"threads": threads}}  # fmt: skip


def test_the_card_says_what_was_measured_and_what_was_modelled():
    measured = energy([_session({"cpu": 5e3, "ram": None}), _session({"cpu": 7e3})], 1200.0)
    assert "measured by hardware counters" in measured
    assert "over 20 minutes" in measured
    assert "12.0 kJ, 1.58 g" in measured
    modelled = energy([_session({"cpu": None})], 1000.0)
    assert "not measured" in modelled
    assert "*Modelled*" in modelled
    assert "about 8 kJ, 1 g" in modelled, "1000 s of two threads at 4 W"
    for nothing in ([], [_session({"gpu": None}, device="cuda")]):
        assert energy(nothing, 1000.0).startswith("Energy was not measured")
        assert "kJ" not in energy(nothing, 1000.0)
