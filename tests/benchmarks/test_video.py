"""pocket-video: eight frames a row, balanced questions, no answer without the pictures."""

import hashlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from frugalvlm.benchmarks import BENCHMARKS, load_benchmark, prompt
from frugalvlm.benchmarks.base import EVAL_SPLITS, FEATURES
from frugalvlm.pocket.clips import make_clip
from frugalvlm.pocket.models import build_tokenizer

VIDEO = load_benchmark("pocket-video")
DATA = {split: VIDEO.dataset(split, 240) for split in EVAL_SPLITS}
ROWS = {split: list(data.remove_columns("frames")) for split, data in DATA.items()}


def test_rows_hold_the_frames_of_their_clip():
    assert set(DATA["test"].features) == {"frames", *FEATURES} - {"image"}
    row = DATA["test"][4]
    clip = make_clip("test", row["scene_seed"])
    assert len(row["frames"]) == 8
    for frame, image in zip(clip.frames(), row["frames"], strict=True):
        assert np.array_equal(np.asarray(frame), np.asarray(image))
    assert len({r["question_id"] for r in ROWS["test"]}) == 240
    assert prompt("which?", "<video>") == "USER: <video>\nwhich? ASSISTANT:"


def test_a_small_set_is_the_beginning_of_a_large_one_and_the_same_for_ever():
    assert list(VIDEO.dataset("test", 7).remove_columns("frames")) == ROWS["test"][:9]
    text = repr([(r["question_id"], r["scene_seed"], r["question"], r["answer"], r["about"])
                 for split in EVAL_SPLITS for r in ROWS[split][:30]])  # fmt: skip
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "0d03cfcba24e1629"


@pytest.mark.parametrize("split", EVAL_SPLITS)
def test_balance(split):
    rows = ROWS[split]
    assert Counter(r["category"] for r in rows) == {"motion": 80, "order": 80, "place": 80}
    ways = Counter(r["answer"] for r in rows if r["category"] == "motion")
    assert ways == dict.fromkeys(("left", "right", "up", "down", "still"), 16)
    for category in ("order", "place"):
        asked = [r["question"] for r in rows if r["category"] == category]
        assert sum("first" in q for q in asked) == sum("last" in q for q in asked) == 40


def test_a_blank_clip_answers_next_to_nothing():
    """The most frequent answer to the same question on development clips."""
    known = defaultdict(Counter)
    for r in ROWS["dev"]:
        known[r["question"]][r["answer"]] += 1
    usual = [known[r["question"]].most_common(1) for r in ROWS["test"]]
    sheet = VIDEO.sheet(DATA["test"], [best[0][0] if best else "circle" for best in usual])
    assert sheet.details["accuracy/motion"] < 35
    assert sheet.details["accuracy/order"] < 20
    assert sheet.details["accuracy/place"] < 20


def test_scoring():
    truth = [r["answer"] for r in ROWS["test"]]
    assert VIDEO.sheet(DATA["test"], truth).headline == 100
    half = VIDEO.sheet(ROWS["test"], [*truth[:120], *[None] * 120])
    assert half.headline == half.accuracy == 50
    assert half.details["failed"] == 120
    assert len(half.image_ids) == 80
    still = VIDEO.sheet(ROWS["test"], ["still"] * 240)
    assert still.headline == pytest.approx(100 * 16 / 240)


def test_answers_fit_the_model_and_clips_stand_apart():
    tokenizer = build_tokenizer()
    for row in ROWS["test"]:
        answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
        assert len(answer) + 1 <= VIDEO.max_new_tokens
        assert tokenizer.unk_token_id not in answer + tokenizer(row["question"]).input_ids
    assert VIDEO.id not in BENCHMARKS
