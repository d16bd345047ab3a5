"""What is asked for is understood, and what makes no sense ends in one sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest

import frugalvlm
from frugalvlm import methods
from frugalvlm.door import RequestError, request
from frugalvlm.errors import FrugalError
from frugalvlm.methods import EncoderReducer, FastV, Uniform, VisionZip
from frugalvlm.paths import work_dir
from frugalvlm.pocket.installed import WeightsError
from frugalvlm.views import UnsupportedError


@pytest.mark.parametrize(
    ("asked", "patches", "kept"),
    [
        (16, 144, [16]),
        ([24, 16], 144, [24, 16]),
        ([16, 24, 16], 144, [24, 16]),
        ("48,24", 144, [48, 24]),
        (" 48 , 25% ", 144, [48, 36]),
        (0.25, 576, [144]),
        (["25%"], 729, [182]),
        ("1/9", 576, [64]),
        ("1/9", 729, [81]),
        (Fraction(1, 3), 144, [48]),
        ("12.5 %", 64, [8]),
        (np.int64(7), 64, [7]),
        (np.float64(0.5), 64, [32]),
        (1.0, 64, [64]),
        (1, 64, [1]),
        ("0.001", 64, [1]),
        (range(1, 4), 64, [3, 2, 1]),
        ((), 64, []),
    ],
)
def test_budgets(asked, patches, kept):
    assert request.budgets_of(asked, patches) == kept


@pytest.mark.parametrize(
    "wrong",
    [0, -3, True, "many", "0%", "120%", 1.5, -0.2, "1/0", None, [None], float("nan"), [[16]],
     "16.5", {"a": 1}, float("inf"), object()],
)  # fmt: skip
def test_wrong_budgets(wrong):
    with pytest.raises(RequestError, match=r"is no budget: give a whole number.*25%"):
        request.budgets_of(wrong, 144)


@dataclass(frozen=True)
class NoKey(EncoderReducer):
    @classmethod
    def for_budget(cls, kept_tokens, total_tokens=576):
        return cls()

    def reduce(self, view):
        raise NotImplementedError


@dataclass(frozen=True)
class Stolen(Uniform):
    key: ClassVar[str] = "fastv"


class NoDataclass(Uniform):
    key: ClassVar[str] = "plain"


@dataclass(frozen=True)
class Unfinished(EncoderReducer):
    key: ClassVar[str] = "unfinished"


@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        ("fastv", ["fastv"]),
        ("fastv, visionzip", ["fastv", "visionzip"]),
        (["vanilla", Uniform, FastV(4)], ["vanilla", "uniform", "fastv"]),
        (Uniform, ["uniform"]),
        (Uniform(4), ["uniform"]),
        ([Uniform, "uniform", Uniform], ["uniform"]),
        ([FastV(4), FastV(4), FastV(8)], ["fastv", "fastv"]),
        ([VisionZip(8, 2) | FastV(4)], ["visionzip+fastv"]),
        ("aim_merge", ["aim_merge"]),
    ],
)
def test_methods(asked, keys):
    assert [kind.key for kind in request.kinds_of(asked)] == keys


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("fastvv", "Unknown method 'fastvv' .did you mean 'fastv'"),
        ("visionzip+fastv", "compose method objects"),
        ([], "No method"),
        ("", "No method"),
        (None, "no list of methods"),
        ([3], "3 is no method"),
        ([dict], "is no method"),
        ([methods], "is no method"),
        ([NoKey], "needs a name for tables"),
        ([Stolen, "fastv"], "both called 'fastv'"),
        ([Stolen(4)], "both called 'fastv'"),
        ([Uniform(4) | Stolen(4)], "both called 'fastv'"),
        ([NoDataclass], "must be a dataclass"),
        ([Unfinished], "Unfinished cannot be used yet: it lacks for_budget, reduce"),
        ([Uniform | FastV], "is no method"),
    ],
)
def test_wrong_methods(wrong, sentence):
    with pytest.raises(RequestError, match=sentence):
        request.kinds_of(wrong)


@pytest.mark.parametrize("asked", ["pocket-gqa", "pocket-gqa,pocket-pope", ["pocket-pope"]])
def test_benchmark_ids(asked):
    names = asked.split(",") if isinstance(asked, str) else asked
    assert list(request.benchmarks_of(asked)) == names


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("pocket-gqq", "Unknown benchmark 'pocket-gqq' .did you mean 'pocket-gqa'"),
        ("", "No data"),
        (["pocket-gqa", "pocket-gqa"], "Two data sets are called 'pocket-gqa'"),
        (3, "int is no data"),
        ([], "There is no question"),
        ([("a.png", "q", "a"), "pocket-gqa"], "the picture a.png does not exist|question 2"),
        ({}, "No data"),
        ({"mine": "no/such/folder"}, "Unknown benchmark 'no/such/folder'"),
    ],
)
def test_wrong_data(wrong, sentence):
    with pytest.raises(FrugalError, match=sentence):
        request.benchmarks_of(wrong)


def test_own_data_may_not_take_a_benchmarks_name(own):
    with pytest.raises(RequestError, match="'pocket-gqa' is a benchmark of the kit"):
        request.benchmarks_of({"pocket-gqa": own})


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        ("pocket-nothing", WeightsError, "Unknown embedded model"),
        ("nothing at all", WeightsError, "is no embedded model"),
        (3, RequestError, "model='3' is no model"),
        (None, RequestError, "is no model"),
        (("a", "b"), RequestError, "as load_vlm returns it"),
        ([], RequestError, "is no model"),
    ],
)
def test_wrong_models(wrong, error, sentence):
    with pytest.raises(error, match=sentence):
        request.opened(wrong)


def test_models_in_training_and_unknown_families_and_devices(tiny, folder_of_64):
    model, processor = tiny
    model.train()
    try:
        with pytest.raises(RequestError, match=r"call model.eval\(\) first"):
            request.opened((model, processor))
    finally:
        model.eval()
    with pytest.raises(UnsupportedError, match="No host knows"):
        request.opened((model.get_decoder(), processor))
    with pytest.raises(RequestError, match="Unknown device 'gpu'"):
        request.opened(folder_of_64, device="gpu")


def test_a_pair_is_known_by_weights_configuration_and_processing(tiny):
    model, processor = tiny
    once = request.opened((model, processor)).weights
    assert request.opened((model, processor)).weights == once
    with_change = type(model)(model.config).eval()
    with_change.load_state_dict(model.state_dict())
    assert request.opened((with_change, processor)).weights == once, "the same, another object"
    with_change.lm_head.weight.data[0, 0] += 1
    assert request.opened((with_change, processor)).weights != once
    picture = processor.image_processor
    picture.image_mean = [0.4] * 3
    try:
        assert request.opened((model, processor)).weights != once
    finally:
        picture.image_mean = [0.5] * 3


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"n": 0}, "n is a whole number from 1"),
        ({"n": "30"}, "n is a whole number from 1, not '30'"),
        ({"n": True}, "n is a whole number"),
        ({"n": 10**6}, "n must be 1 to 100000"),
        ({"split": "train"}, "Unknown split 'train'"),
        ({"batch": 0}, "batch is a whole number"),
        ({"repeats": 0}, "repeats is a whole number from 2"),
        ({"repeats": 1}, "repeats is a whole number from 2, not 1"),
        ({"energy_window_s": -1}, "energy_window_s is a number above 0"),
        ({"energy_window_s": "1"}, "energy_window_s is a number above 0"),
        ({"force": "no"}, "force is True or False, not 'no'"),
        ({"costs": 0}, "costs is True or False, not 0"),
        ({"progress": "yes"}, "progress is True, False, None or a reporter"),
        ({"revision": "main"}, "loaded model has no revision"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"data": "pocket-gqa", "max_new_tokens": 3}, "a benchmark brings its own"),
        ({"data": ["pocket-gqa"], "score": "yes_no"}, "a benchmark brings its own"),
        ({"budgets": []}, "No budgets: give some"),
        ({"table": "table1"}, "name it with paper=KEY"),
        ({"score": "bleu"}, "Unknown score 'bleu'"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1"),
    ],
)
def test_wrong_numbers_before_anything_is_loaded(wrong, sentence, tiny, own):
    arguments = {"model": tiny, "methods": "uniform", "data": own, "budgets": [16]}
    with pytest.raises(FrugalError, match=sentence):
        frugalvlm.compare(**{**arguments, "costs": False, "progress": False, **wrong})
    assert not work_dir().exists(), "nothing is computed"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"paper": "visionzap"}, "did you mean 'visionzip'"),
        ({"paper": "nvila"}, "has no table that can be rebuilt"),
        ({"table": "table9"}, "no table 'table9' that can be rebuilt here: table1"),
        ({"table": "blueprint"}, "no table 'blueprint'"),
        ({"methods": "fastv"}, "are the paper's"),
        ({"budgets": [16]}, "scaled to the model"),
        ({"budgets": 0}, "scaled to the model"),
        ({"data": "pocket-nothing"}, "has no column pocket-nothing: pocket-gqa"),
        ({"model": ("a", "b")}, "by name, folder or Hub id"),
    ],
)
def test_wrong_questions_about_a_paper(wrong, sentence):
    with pytest.raises(FrugalError, match=sentence):
        frugalvlm.compare(**{"paper": "visionzip", **wrong}, progress=False)


def test_a_guide_with_another_tokenizer_makes_an_impossible_row(tiny, own):
    class Tokenizer:
        def get_vocab(self):
            return {"x": 0}

    class Processor:
        tokenizer = Tokenizer()
        image_processor = None

    small = type(tiny[0])(tiny[0].config).eval(), Processor()
    result = frugalvlm.compare(
        tiny, ["sgl", "uniform"], own, [16], 6, guide=small, costs=False, progress=False
    )
    (line,) = result.skipped
    assert line.key == "sgl"
    assert "another tokenizer" in line.reason


def test_objects_of_one_class_are_told_apart_by_their_labels(tiny):
    subject = request.opened(tiny)
    kinds = [VisionZip(10, 2), replace(VisionZip(10, 2), merge="mean"), VisionZip]
    lines = request.lines_of(kinds, [12], subject, example=None)
    labels = [line.label for line in lines]
    assert len(set(labels)) == len(labels) == 4
    assert "VisionZip (dominant=10, contextual=2, merge=mean)" in labels


def test_numpy_numbers_and_long_names_are_taken(tiny, picture):
    """Names of data sets stand in names of files, which may have 255 bytes."""
    data = {"猫" * 200: [(picture(1), "what is it?", "a cat")]}
    asked = {"n": np.int64(4), "batch": np.int32(8), "costs": False, "progress": False}
    result = frugalvlm.compare(tiny, "uniform", data, [16], **asked)
    assert len(result.records) == 2
    assert type(result.records[0]["request"]["n"]) is int
