"""The trained model of the second generation is whole, and reads pictures as its card says."""

import json

import pytest

from frugalvlm import load_vlm
from frugalvlm.paths import data_dir
from frugalvlm.pocket.installed import verify
from frugalvlm.pocket.second.models import build_tokenizer
from frugalvlm.pocket.second.watch import Exam, removal_curve

FOLDER = data_dir() / "second" / "pocket-llava-base"


@pytest.fixture(scope="module")
def curve():
    model, processor = load_vlm(str(FOLDER))
    assert processor.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    return removal_curve(model, build_tokenizer(), Exam.of(20, first_seed=5000), "picture", [3, 9])


def test_its_files_are_whole_and_its_gate_is_passed() -> None:
    assert "model.safetensors" in verify(FOLDER)
    gate = json.loads((FOLDER / "gate.json").read_text())
    assert gate["split"] == "dev"
    assert gate["passed"]
    assert all(condition["passed"] for condition in gate["conditions"])


def test_it_answers_and_reads_late(curve) -> None:
    assert curve["accuracy"][12] > 78
    assert curve["accuracy"][12] - curve["accuracy"][0] > 25
    assert curve["gain"][3] < 100 / 3, "without the picture behind a quarter of the layers"
    assert curve["gain"][9] > 90, "without it behind three quarters"
