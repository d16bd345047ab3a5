"""What the training notebook shows is what the public interface would give."""

import numpy as np
import pytest
import torch

from frugalvlm.benchmarks import prompt
from frugalvlm.pocket import watch
from frugalvlm.pocket.models import build_processor
from frugalvlm.pocket.objectives import patch_labels
from frugalvlm.pocket.recipe import Stage
from frugalvlm.pocket.scenes import KINDS, make_scene

NAME = "pocket-llava-tiny"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return watch.checkpoint(NAME, tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize("eyes", ["picture", "grey"])
def test_answers_are_those_of_the_processor_and_generate(whole, eyes):
    items, processor = watch.exam(3, 2), build_processor()
    expected = []
    for scene, question in items:
        inputs = processor(images=scene.image(), text=prompt(question.text), return_tensors="pt")
        if eyes == "grey":
            inputs["pixel_values"].zero_()
        with torch.inference_mode():
            ids = whole.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(new, skip_special_tokens=True).strip())
    assert watch.answers(whole, items, eyes) == expected


def test_the_exam_has_development_scenes_and_no_more_things_than_asked():
    items = watch.exam(8, 2)
    assert {scene.split for scene, _ in items} == {"dev"}
    assert max(len(scene.things) for scene, _ in items) == 2
    assert {question.family for _, question in items} == set(watch.FAMILIES_ASKED)


def test_patches_that_say_their_own_words_are_read_right(whole, monkeypatch):
    scene = make_scene("dev", 4)
    symbols = watch.visual_tokens(whole, [scene], "symbols")
    monkeypatch.setattr(watch, "visual_tokens", lambda *_: symbols)
    kinds, colors = watch.read_patches(whole, scene)
    assert len(set(kinds)) > 2
    np.testing.assert_array_equal(kinds, patch_labels(scene)[0])
    # Ground and "no colour" have no word: only there may the colour be another one.
    covered = kinds < len(KINDS)
    np.testing.assert_array_equal(colors[covered], patch_labels(scene)[1][covered])


def test_the_report_counts_right_answers():
    items = watch.exam(2, 2)
    truth = [question.answer for _, question in items]
    wrong = ["?"] * len(truth)
    diary = {
        "before": {"picture": wrong, "grey": wrong},
        "after": {"picture": truth, "grey": wrong},
    }
    table = watch.report(items, diary)
    assert table.to_dict() == {
        "picture": {"before": 0, "after": 100}, "grey": {"before": 0, "after": 0},
    }  # fmt: skip
    shown = watch.transcript(items, diary, "picture", count=2)
    assert list(shown["after"]) == list(shown["truth"]) == truth[:2]


def test_training_goes_to_the_end_of_a_stage_and_not_back(tmp_path):
    plan = (Stage("align", 2, 1, 1e-3, 1), Stage("instruct", 1, 1, 1e-3, 1, 2))
    before = watch.checkpoint(NAME, tmp_path).state_dict()
    aligned = watch.train_until(NAME, tmp_path, plan, "align").state_dict()
    moved = {k.split(".")[2] for k in before if not torch.equal(before[k], aligned[k])}
    assert moved == {"multi_modal_projector"}
    again = watch.train_until(NAME, tmp_path, plan, "align").state_dict()
    assert all(torch.equal(aligned[k], again[k]) for k in aligned), "a cell may be run twice"
    watch.train_until(NAME, tmp_path, plan, "instruct")
    with pytest.raises(ValueError, match="past the stage 'align'"):
        watch.train_until(NAME, tmp_path, plan, "align")
