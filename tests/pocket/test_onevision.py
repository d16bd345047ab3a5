"""The pocket processor of LLaVA-OneVision: pictures, clips, saving, loading without torchvision."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from frugalvlm import loading
from frugalvlm.loading import load_vlm
from frugalvlm.pocket.clips import FRAMES, clip_questions, make_clip
from frugalvlm.pocket.installed import WeightsError, save_vlm
from frugalvlm.pocket.models import SPECS, build_model, build_processor, build_tokenizer
from frugalvlm.pocket.objectives import InstructObjective, Scaffold, clip_features
from frugalvlm.pocket.onevision import PocketOnevisionProcessor
from frugalvlm.pocket.scenes import make_scene

NAME = "pocket-siglip-base"
ASK = "USER: {}\nwhat is this? ASSISTANT:"


@pytest.fixture(scope="module")
def processor():
    return build_processor(NAME)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(NAME).eval()


def test_frames_arrive_as_they_were_drawn(processor):
    clips = [make_clip("dev", seed).frames() for seed in (1, 2)]
    inputs = processor(videos=clips, text=[ASK.format("<video>")] * 2, return_tensors="pt")
    pixels = inputs["pixel_values_videos"]
    assert pixels.shape == (2, FRAMES, 3, 96, 96)
    back = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
    assert all(
        np.array_equal(got, frame)
        for row, clip in zip(back, clips, strict=True)
        for got, frame in zip(row, clip, strict=True)
    )
    assert (inputs["input_ids"] == processor.video_token_id).sum(1).tolist() == [289, 289]


@torch.no_grad()
def test_training_shows_the_model_what_the_processor_would(processor, model):
    clips = [make_clip("train", seed) for seed in (1, 2)]
    texts = [ASK.format("<video>")] * 2
    inputs = processor(videos=[c.frames() for c in clips], text=texts, return_tensors="pt")
    expected = model.get_video_features(inputs["pixel_values_videos"]).pooler_output
    torch.testing.assert_close(clip_features(model, clips), expected)


def test_a_saved_processor_comes_back_the_same(processor, model, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "models_dir", lambda: tmp_path)
    save_vlm(model, processor, tmp_path / NAME)
    _, again = load_vlm(NAME)
    assert isinstance(again, PocketOnevisionProcessor)
    shown = {
        "images": {"images": [make_scene("dev", 1).image()], "text": [ASK.format("<image>")]},
        "videos": {"videos": [make_clip("dev", 1).frames()], "text": [ASK.format("<video>")]},
    }
    for inputs in shown.values():
        one, two = processor(**inputs, return_tensors="pt"), again(**inputs, return_tensors="pt")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_processor_that_needs_another_package_is_said_so(tmp_path, monkeypatch):
    name = "pocket-llava-tiny"
    monkeypatch.setattr(loading, "models_dir", lambda: tmp_path)
    torch.manual_seed(0)
    save_vlm(build_model(name), build_processor(name), tmp_path / name)

    def fails(*args, **kwargs):
        raise ImportError("LlavaOnevisionVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", fails)
    with pytest.raises(WeightsError, match="requires the Torchvision"):
        load_vlm(name)


def test_clips_are_asked_every_family_and_answers_are_true():
    rng = np.random.default_rng(0)
    for seed in range(20):
        clip = make_clip("train", seed)
        asked = clip_questions(clip, rng)
        families = [question.family for question in asked]
        assert families.count("motion") == families.count("order") == 2
        assert {q.text: q.answer for q in asked if q.family == "motion"} == {
            f"which way does the {a.thing.kind} move?": a.step for a in clip.actors[:2]
        }


def test_a_step_of_clips_learns_from_them(model):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    learns = InstructObjective(model, Scaffold(model, tokenizer), tokenizer, 4, clip_share=1.0)
    learns.text_share = 0.0
    scenes = [make_scene("train", seed) for seed in (1, 2)]
    loss, log = learns(scenes, np.random.default_rng(0))
    assert set(log) == {"clip_tokens_right"}
    loss.backward()
    newline = model.model.image_newline.grad
    assert newline is not None
    assert newline.abs().sum() > 0
    model.zero_grad()


def test_every_pocket_model_names_its_processor():
    assert [name for name in SPECS if SPECS[name].family == "llava_onevision"] == [NAME]
