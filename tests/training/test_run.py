"""A lesson trains what it should, from data by number, and a kill changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from frugalvlm.methods import DyVTE
from frugalvlm.methods.base import LayerReducer
from frugalvlm.methods.trained import TrainedMethod
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.pocket.recipe import read_log
from frugalvlm.pocket.second import models as second
from frugalvlm.training import Lesson, Objective, Recipe, TrainingError, lesson_of, run
from frugalvlm.training.data import Collator, DataError, LlavaExamples, PocketExamples
from frugalvlm.training.run import learn

NAME = "pocket-llava-tiny"
PLAN = (Recipe(5, 4, 1e-3), Recipe(3, 4, 1e-3, parts=2))


@pytest.fixture(scope="module")
def opened():
    torch.manual_seed(0)
    return build_model(NAME).eval(), build_processor(NAME)


def weights(method) -> dict[str, torch.Tensor]:
    return method.learnt.own.state_dict()


def taught(opened, folder, plan=PLAN, **more):
    return learn(DyVTE(), *opened, NAME, plan, folder, quiet=True, **more)


@pytest.fixture(scope="module")
def whole(opened, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return taught(opened, folder), folder


def test_an_interrupted_training_equals_an_uninterrupted_one(opened, whole, tmp_path):
    for _ in range(4):  # twice within a stage, at its end, in the next
        stepped = taught(opened, tmp_path, stop_after=2)
    for key, value in weights(whole[0]).items():
        assert torch.equal(value, weights(stepped)[key]), key
    assert next(iter(read_log(tmp_path))) == next(iter(read_log(whole[1])))
    assert len((tmp_path / "sessions.jsonl").read_text().splitlines()) == 4


def test_a_checkpoint_that_a_kill_left_half_written_is_not_used(opened, whole, tmp_path):
    taught(opened, tmp_path, stop_after=3)
    (checkpoint,) = (tmp_path / "checkpoints-0").iterdir()
    broken = checkpoint.with_name("checkpoint-4")
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    again = taught(opened, tmp_path)
    for key, value in weights(whole[0]).items():
        assert torch.equal(value, weights(again)[key]), key


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(opened, whole, tmp_path):
    code = f"""
import torch
from pathlib import Path
from frugalvlm.methods import DyVTE
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.training import Recipe
from frugalvlm.training.run import learn
torch.manual_seed(0)
model = build_model("{NAME}").eval()
learn(DyVTE(), model, build_processor("{NAME}"), "{NAME}",
      (Recipe(5, 4, 1e-3), Recipe(3, 4, 1e-3, parts=2)), Path({str(tmp_path)!r}),
      checkpoint_every_s=0.0, quiet=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("checkpoints-0/checkpoint-*/trainer_state.json")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    again = taught(opened, tmp_path)
    for key, value in weights(whole[0]).items():
        assert torch.equal(value, weights(again)[key]), key


def test_the_model_comes_back_as_it_was(opened, whole):
    torch.manual_seed(0)
    fresh = build_model(NAME)
    for (name, own), untouched in zip(
        opened[0].named_parameters(), fresh.parameters(), strict=True
    ):
        assert torch.equal(own, untouched), name
        assert own.requires_grad
        assert own.grad is None


def test_another_run_in_the_folder_is_refused(opened, whole):
    for change in ({"seed": 1}, {"plan": (Recipe(4, 4, 1e-3),)}):
        with pytest.raises(TrainingError, match="another folder or delete"):
            taught(opened, whole[1], **change)


def test_checkpoints_hold_what_is_trained_only(whole):
    _, folder = whole
    size = (folder / "stage-1.safetensors").stat().st_size
    gates = sum(p.numel() for p in weights(whole[0]).values())
    assert size < 4 * gates + 20_000


def test_the_loss_falls(opened, tmp_path):
    """Of the paper's own loss: the same data before and after."""
    taught(opened, tmp_path, (Recipe(60, 8, 3e-3),))
    losses = [entry["loss"] for entry in read_log(tmp_path)]
    assert sum(losses[-3:]) < sum(losses[:3])


# -- a method that trains the model, too ---------------------------------------------------------


@dataclass(frozen=True)
class Toy(TrainedMethod, LayerReducer):
    """Scales nothing; its loss pulls its module and the projector to zero."""

    key: ClassVar[str] = "dyvte"  # the lesson is patched

    @classmethod
    def for_budget(cls, kept_tokens, total_tokens=576):
        return cls()

    def build(self, sizes):
        return nn.ModuleDict({"a": nn.Linear(sizes.width, 2), "b": nn.Linear(sizes.width, 2)})

    def layers(self, decoder_layers):
        return (1,)

    def keep(self, view):
        raise NotImplementedError


class Pull(Objective):
    def __call__(self, batch, dice):
        own = self.method.own
        loss = own["a"].weight.square().sum() + own["b"].weight.square().sum()
        for p in self.model.model.multi_modal_projector.parameters():
            loss = loss + p.square().sum()
        return loss, {"number": float(batch["numbers"][0]), "dice": float(dice.random())}


@pytest.fixture
def toy_lesson(monkeypatch):
    monkeypatch.setattr(run, "lesson_of", lambda method: Lesson(Pull, {"": ()}))


TUNED = "tuned.model.multi_modal_projector.linear_1."


def test_stages_train_what_their_recipes_name(opened, tmp_path, toy_lesson):
    plan = (Recipe(2, 2, 1e-2, trains=("own.a",)), Recipe(2, 2, 1e-2, trains=("own.a", TUNED)))
    torch.manual_seed(0)
    sizes_model, processor = opened
    method = learn(Toy(), sizes_model, processor, NAME, plan, tmp_path, quiet=True)
    torch.manual_seed(0)
    fresh = Toy().build(method.learnt.sizes)
    own = method.learnt.own
    assert not torch.equal(own["a"].weight, fresh["a"].weight)
    assert torch.equal(own["b"].weight, fresh["b"].weight), "no recipe trains it"
    names = {"model.multi_modal_projector.linear_1." + n for n in ("weight", "bias")}
    assert set(method.learnt.tuned) == names
    name = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(method.learnt.tuned[name], sizes_model.get_parameter(name))


def test_data_and_dice_follow_from_the_step(opened, tmp_path, toy_lesson, monkeypatch):
    monkeypatch.setattr(run, "LOGGED", 1)
    monkeypatch.setattr(run._Watch, "on_step_end", _logging_all(run._Watch.on_step_end))
    logs = []
    for name, stops in (("one", [None]), ("two", [1, 2, None])):
        folder = tmp_path / name
        for stop in stops:
            learn(Toy(), *opened, NAME, (Recipe(4, 3, 1e-3), Recipe(2, 3, 1e-3)), folder,
                  quiet=True, stop_after=stop)  # fmt: skip
        logs.append([json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()])
    assert [entry["number"] for entry in logs[0]] == [0, 3, 6, 9, 12, 15]
    assert logs[0] == logs[1]
    assert len({entry["dice"] for entry in logs[0]}) == 6


def _logging_all(plain):
    def step(self, args, state, control, **more):
        with (self.files.folder / "all.jsonl").open("a") as file:
            told = {k: self.held.heard[k] for k in ("number", "dice", "loss")}
            file.write(json.dumps(told) + "\n")
        return plain(self, args, state, control, **more)

    return step


def test_a_recipe_that_trains_nothing_is_refused(opened, tmp_path, toy_lesson):
    with pytest.raises(TrainingError, match=r"begin with 'own\.'"):
        learn(Toy(), *opened, NAME, (Recipe(2, 2, 1e-3, trains=("gates",)),), tmp_path, quiet=True)
    with pytest.raises(TrainingError, match="cannot be cut into 3 parts"):
        Recipe(2, 4, 1e-3, parts=3)


def test_a_second_gpu_is_named_by_the_environment(opened, tmp_path):
    with pytest.raises(TrainingError, match="CUDA_VISIBLE_DEVICES=1 and name the device 'cuda'"):
        taught(opened, tmp_path, device="cuda:1")


def test_methods_without_a_lesson():
    from frugalvlm.methods import FastV

    with pytest.raises(TrainingError, match=r"Methods that learn: .*dyvte"):
        lesson_of(FastV)
    lesson = lesson_of(DyVTE)
    assert lesson.recipes_for(NAME)
    assert lesson.recipes_for("some/hub-model") == lesson.recipes[""]


# -- data ----------------------------------------------------------------------------------------


def test_examples_are_the_same_for_ever(opened):
    made, again = PocketExamples(), PocketExamples()
    for i in (0, 7, 1000):
        a, b = made[i], again[i]
        assert (a.question, a.answer) == (b.question, b.answer)
        assert a.picture.tobytes() == b.picture.tobytes()
    assert made[3].picture.tobytes() != PocketExamples(seed=1)[3].picture.tobytes()


def test_a_model_is_asked_about_scenes_of_its_own_generation(opened):
    assert not PocketExamples.for_processor(opened[1]).second
    processor = second.build_processor(NAME)
    examples = PocketExamples.for_processor(processor)
    assert examples.second
    unknown = processor.tokenizer.unk_token_id
    batch = Collator(processor)([(i, examples[i]) for i in range(24)])
    assert not (batch["inputs"]["input_ids"] == unknown).any()


def test_a_batch_is_prompts_with_their_answers(opened):
    model, processor = opened
    examples = PocketExamples()
    batch = Collator(processor)([(i, examples[i]) for i in range(6)])
    ids, labels = batch["inputs"]["input_ids"], batch["labels"]
    said = labels >= 0
    assert torch.equal(ids[said], labels[said])
    for i in range(6):
        answer = processor.tokenizer.decode(labels[i][said[i]], skip_special_tokens=True).strip()
        assert answer == processor.tokenizer.decode(
            processor.tokenizer(examples[i].answer, add_special_tokens=False).input_ids
        )
        assert int(labels[i][said[i]][-1]) == processor.tokenizer.eos_token_id
    with torch.no_grad():
        loss = model(**batch["inputs"], labels=labels).loss
        logits = model(**batch["inputs"]).logits[:, :-1]
    expected = F.cross_entropy(logits[said[:, 1:]], labels[:, 1:][said[:, 1:]])
    torch.testing.assert_close(loss, expected)


def test_data_in_llavas_format(tmp_path):
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "That."},
    ]
    sample = {"image": "a.png", "conversations": turns}
    PocketExamples()[0].picture.save(tmp_path / "a.png")
    longer = {**sample, "conversations": turns * 2}
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([sample, longer, {"conversations": turns}]))
    examples = LlavaExamples(file, tmp_path)
    assert len(examples.samples) == 1, "one picture, one turn"
    assert (examples[5].question, examples[5].answer) == ("What?", "That.")
    file.write_text("[]")
    with pytest.raises(DataError, match="no sample"):
        LlavaExamples(file, tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        LlavaExamples(Path(tmp_path / "none.json"), tmp_path)
