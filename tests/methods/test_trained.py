"""What a method has learnt: written, read, refused on other models, and taken off again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_hosts import build, enliven, model_for, prompt, tiny_weights

from frugalvlm.methods import METHODS, DyVTE, DyVTERate, trained
from frugalvlm.methods.trained import (
    ABOUT,
    WEIGHTS,
    LearntError,
    TrainedMethod,
    sample_of,
    write_learnt,
    write_learnt_hashes,
)
from frugalvlm.runs.guides import with_learnt

HOST = "llava_clip"


def method(factor: float = 1.0) -> DyVTE:
    learnt = tiny_weights(DyVTE, model_for(HOST), factor)
    return replace(DyVTE(hidden=16), learnt=learnt)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with weights installed for a model called "tiny"."""
    monkeypatch.setenv("FRUGALVLM_DATA", str(tmp_path))
    folder = tmp_path / "methods" / "dyvte" / "tiny"
    write_learnt(folder, method(), {"seed": 0})
    write_learnt_hashes(folder)
    return folder


def logits(m: Any, model: Any = None) -> torch.Tensor:
    model = model or model_for(HOST)
    with m.on(model), torch.no_grad():
        return model(**prompt(HOST)).logits


def test_what_is_written_is_read(data):
    read = DyVTE.load("tiny")
    assert read.hidden == 16
    for name, value in method().learnt.own.state_dict().items():
        own = read.learnt.own.state_dict()[name]
        torch.testing.assert_close(own, value.float(), rtol=1e-3, atol=1e-3)
    assert not any(p.requires_grad for p in read.learnt.own.parameters())
    assert torch.equal(logits(read), logits(DyVTE.load(str(data))))
    assert read.describe()["learnt"] == f"tiny@{read.learnt.digest[:8]}"
    assert repr(read).endswith(f"learnt=<{read.learnt.name}>)")


def test_variants_take_the_same_weights(data):
    assert DyVTERate.load("tiny", threshold=0.9).threshold == 0.9
    rate = with_learnt(DyVTERate(threshold=0.2), "somewhere/models/tiny")
    assert (rate.threshold, rate.learnt.model) == (0.2, "tiny")
    own = method()
    assert with_learnt(own, "another").learnt is own.learnt
    assert with_learnt(METHODS["fastv"](6), "tiny") == METHODS["fastv"](6)


@pytest.mark.parametrize("key", [k for k, m in METHODS.items() if issubclass(m, TrainedMethod)])
def test_without_weights_the_command_is_named(key, tmp_path, monkeypatch):
    monkeypatch.setenv("FRUGALVLM_DATA", str(tmp_path))
    command = f"invoke train --method {key} --model"
    with pytest.raises(LearntError, match=f"no weights for pocket-x: .*{command} pocket-x`"):
        METHODS[key].load("pocket-x")
    with pytest.raises(LearntError, match=command), METHODS[key]().on(model_for(HOST)):
        pass


def test_weights_of_another_model_are_refused(data):
    other = build(HOST)
    enliven(other, 77)
    other = other.double().eval()
    with pytest.raises(LearntError, match=r"tiny's.* another model of the same sizes.*transfer"):
        logits(DyVTE.load("tiny"), other)
    assert logits(DyVTE.load("tiny", transfer=True), other).isfinite().all()
    config = build(HOST).config
    config.text_config.num_hidden_layers = 2
    small = type(other)(config)
    with pytest.raises(LearntError, match=r"whose decoder_layers is 4; this model's is 2"):
        logits(DyVTE.load("tiny", transfer=True), small)


def test_the_same_model_in_another_format_is_not_another(data):
    half = build(HOST)
    half.load_state_dict(model_for(HOST).state_dict())
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        method().learnt.check("dyvte", half.to(dtype))
    assert sample_of(half).shape == sample_of(model_for(HOST)).shape == (16, 16)


def test_damaged_files_are_refused(data):
    (data / ABOUT).write_text((data / ABOUT).read_text() + " ")
    with pytest.raises(LearntError, match="differ from their recorded hashes"):
        DyVTE.load("tiny")
    (data / trained.HASHES).unlink()
    with pytest.raises(LearntError, match="differ from their recorded hashes"):
        DyVTE.load("tiny")
    told = json.loads((data / ABOUT).read_text())
    (data / ABOUT).write_text(json.dumps({**told, "method": "another"}))
    write_learnt_hashes(data)
    with pytest.raises(LearntError, match="weights of another, not of dyvte"):
        DyVTE.load("tiny")
    (data / WEIGHTS).write_bytes(b"no")
    write_learnt_hashes(data)
    with pytest.raises(LearntError, match="cannot be read"):
        DyVTE.load("tiny")
    (data / WEIGHTS).unlink()
    with pytest.raises(LearntError, match=f"holds no {WEIGHTS}"):
        DyVTE.load(str(data))


def test_tuned_parameters_hold_inside_the_block_only(data):
    model = model_for(HOST)
    name = "model.multi_modal_projector.linear_1.weight"
    before = model.get_parameter(name)
    kept = before.detach().clone()
    tuned = {name: torch.zeros_like(before)}
    silent = method(0.0)
    with_tuned = replace(silent, learnt=replace(silent.learnt, tuned=tuned))
    plain = logits(silent)
    assert not torch.equal(logits(with_tuned), plain)
    with pytest.raises(RuntimeError, match="inside"), with_tuned.on(model):
        raise RuntimeError("inside" if not before.any() else "untouched")
    assert model.get_parameter(name) is before
    assert torch.equal(before, kept)
    assert torch.equal(logits(silent), plain)
    write_learnt(data, with_tuned, {})
    write_learnt_hashes(data)
    assert set(DyVTE.load("tiny").learnt.tuned) == {name}
