"""pocket-caption: what a caption claims, scored against examples worked out by hand."""

import hashlib
from collections import Counter

import pytest

from frugalvlm.benchmarks import BENCHMARKS, load_benchmark
from frugalvlm.benchmarks.base import EVAL_SPLITS
from frugalvlm.benchmarks.pocket_caption import claims
from frugalvlm.pocket.models import build_tokenizer
from frugalvlm.pocket.scenes import PLACES, make_scene

CAPTION = load_benchmark("pocket-caption")
DATA = {split: CAPTION.dataset(split, 120) for split in EVAL_SPLITS}
ROWS = {split: list(data.remove_columns("image")) for split, data in DATA.items()}
TRUTH = "a red circle at the top left, an orange 3 at the center, the number 4056."


def sheet(*pairs):
    rows = [{"image_id": str(i), "answer": truth, "category": "all"}
            for i, (_, truth) in enumerate(pairs)]  # fmt: skip
    return CAPTION.sheet(rows, [said for said, _ in pairs])


def test_claims_by_hand():
    assert claims(TRUTH) == Counter(
        [("red", "circle", "top left"), ("orange", "3", "center"), ("number", "4056")]
    )
    assert claims("") == Counter()
    twice = claims("a red 3 at the center and a red 3 at the center .")
    assert twice == {("red", "3", "center"): 2}
    assert claims("A RED 3 at the  center") == {("red", "3", "center"): 1}
    # Without a place, with half a place, without a comma, and what cannot be read at all.
    assert claims("a red circle, a blue cross at the top") == {
        ("red", "circle", ""): 1,
        ("blue", "cross", ""): 1,
    }
    assert claims("a red 3 at the center a blue 4 at the top left").total() == 2
    assert claims("circle, the number, red") == {("circle",): 1, ("the number",): 1, ("red",): 1}


@pytest.mark.parametrize("split", EVAL_SPLITS)
def test_captions_claim_what_the_scene_holds(split):
    for row in ROWS[split]:
        scene = make_scene(split, row["scene_seed"])
        held = Counter((t.color, t.kind, PLACES[3 * t.row + t.col]) for t in scene.things)
        if scene.plate:
            held["number", scene.plate.number] += 1
        assert claims(row["answer"]) == held
        assert row["question"] == "describe the image."
        assert row["category"] == f"{len(scene.things)} things"


def test_the_headline_is_exact_and_pools_the_things_of_all_captions():
    near = TRUTH.replace("top left", "top right").replace("4056", "4058")  # one of three is right
    found = sheet((near, TRUTH), ("a red 4 at the center", "a red 4 at the center."))
    assert found.headline == pytest.approx(100 * 2 * 2 / (4 + 4))
    mean_of_captions = 100 * (1 / 3 + 1) / 2
    assert found.accuracy == pytest.approx(mean_of_captions)
    assert found.headline != pytest.approx(mean_of_captions)
    assert found.correct.tolist() == pytest.approx([1 / 3, 1])
    assert found.details["f1/color_and_kind"] == pytest.approx(75), "place forgiven, digits not"
    assert found.details["accuracy/number"] == 0
    assert found.value(found.stats).tolist() == pytest.approx([100 / 3, 100])


def test_too_much_and_too_little():
    one = "a red 3 at the center."
    found = sheet((one, TRUTH.replace("orange", "red")))
    assert found.details["precision"] == 100
    assert found.details["recall"] == found.headline - 50 / 3 == pytest.approx(100 / 3)
    babble = sheet((f"{one} {one} nothing, nothing, nothing", one))
    assert babble.details["precision"] == pytest.approx(20), "a repeat counts once, babble is wrong"
    assert babble.details["recall"] == 100
    assert babble.headline == pytest.approx(100 * 2 / (5 + 1))
    two = f"{one} {one}"
    assert sheet((two, two)).headline == 100, "what is there twice may be said twice"
    swapped = TRUTH.replace("red", "x").replace("orange", "red").replace("x", "orange")
    assert sheet((swapped, TRUTH)).headline == pytest.approx(100 / 3)


def test_silence_and_failure_miss_everything():
    found = sheet(("", TRUTH), (None, TRUTH))
    assert found.headline == found.accuracy == found.details["precision"] == 0
    assert (found.details["failed"], found.details["blank"]) == (1, 1)
    assert sheet(("a red 3.", "a red 3 at the center.")).details.get("accuracy/number") is None


def test_what_the_model_writes_for_a_right_answer_fits_and_is_right():
    tokenizer = build_tokenizer()
    rows = ROWS["test"]
    written = [tokenizer(row["answer"], add_special_tokens=False).input_ids for row in rows]
    assert all(tokenizer.unk_token_id not in ids for ids in written)
    decoded = tokenizer.batch_decode(written)
    assert CAPTION.sheet(DATA["test"], decoded).headline == 100
    longest = ", ".join(["an orange circle at the bottom middle"] * 5) + ", the number 12345."
    ids = tokenizer(longest, add_special_tokens=False).input_ids
    assert len(ids) + 1 <= CAPTION.max_new_tokens < len(ids) + 5, "room for it, and no waste"


def test_captions_stand_apart_from_the_suite_and_are_the_same_for_ever():
    assert CAPTION.id not in BENCHMARKS
    assert len(BENCHMARKS) == 6
    text = repr([(r["question_id"], r["scene_seed"], r["answer"])
                 for split in EVAL_SPLITS for r in ROWS[split][:30]])  # fmt: skip
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "c51560d7e9efa551"
