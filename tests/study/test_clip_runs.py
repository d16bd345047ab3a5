"""Questions about clips reach a model as videos, frame by frame, and blank ones as grey."""

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from frugalvlm.benchmarks import asking, load_benchmark
from frugalvlm.pocket.models import VIDEO_TOKEN, build_model, build_processor, build_tokenizer
from frugalvlm.views import UnsupportedError

VIDEO = load_benchmark("pocket-video")
TOKENS = 8 * 6 * 6 + 1  # pooled patches of eight frames, and a newline


class Processor:
    """What LLaVA-OneVision's processor does to 96-pixel clips, without torchvision."""

    video_processor = "this one"

    def __init__(self):
        self.tokenizer = build_tokenizer()
        self.batch_decode = self.tokenizer.batch_decode

    def __call__(self, *, videos, text, **options):
        pixels = np.stack([[np.asarray(frame) for frame in clip] for clip in videos])
        pixels = torch.from_numpy(pixels).permute(0, 1, 4, 2, 3) / 127.5 - 1
        text = [t.replace(VIDEO_TOKEN, VIDEO_TOKEN * TOKENS) for t in text]
        return BatchFeature({**self.tokenizer(text, **options), "pixel_values_videos": pixels})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("pocket-siglip-base").eval()


@pytest.fixture(scope="module")
def batches():
    return asking.Batches(VIDEO, Processor(), "test", 6, "cpu")


def test_the_frames_of_a_clip_arrive_in_order(batches):
    data = VIDEO.dataset("test", 6)
    place = {question: i for i, question in enumerate(data["question_id"])}
    seen = 0
    for ids, inputs in batches.batches:
        for question, pixels in zip(ids, inputs["pixel_values_videos"], strict=True):
            frames = data[place[question]]["frames"]
            back = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            assert all(np.array_equal(b, f) for b, f in zip(back, frames, strict=True))
            seen += 1
    assert seen == 6
    assert "frames" not in batches.rows[0]


def test_a_video_model_answers_with_and_without_pictures(model, batches, monkeypatch):
    answers = asking.answer_all(model, batches, VIDEO.max_new_tokens)
    assert len(answers) == 6
    assert all(isinstance(a, str) for a in answers)
    given = []
    monkeypatch.setattr(asking, "answer", lambda m, p, inputs, n: given.append(inputs) or [""] * 6)
    asking.answer_all(model, batches, VIDEO.max_new_tokens, blank=True)
    assert not given[0]["pixel_values_videos"].any()
    assert torch.equal(given[0]["input_ids"], batches.batches[0][1]["input_ids"])
    assert batches.batches[0][1]["pixel_values_videos"].any(), "the questions stay as they are"


def test_a_model_for_pictures_is_refused():
    with pytest.raises(UnsupportedError, match="LlavaProcessor takes no videos"):
        asking.Batches(VIDEO, build_processor(), "test", 3, "cpu")
