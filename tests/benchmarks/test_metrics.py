"""The official metrics against examples worked out by hand, each beside a plausible wrong one."""

import numpy as np
import pytest

from frugalvlm.benchmarks import load_benchmark
from frugalvlm.benchmarks.metrics import (
    evalai_normalise,
    exact_match,
    f1,
    mme_label,
    mme_score,
    option_letter,
    pope_label,
    vqa_accuracy,
)


def row(image, answer, category="", **more):
    return {"image_id": image, "answer": answer, "category": category, **more}


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("Red.", "red", 1), (" top  left ", "top left", 1), ("red circle", "red", 0),
        ("", "red", 0), ("T-shirt", "tshirt", 1), ("left top", "top left", 0),
    ],
)  # fmt: skip
def test_exact_match(answer, truth, score):
    assert exact_match(answer, truth) == score


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("no", "no"), ("No, there is none.", "no"), ("There is not a dog. Yes", "no"),
        ("yes", "yes"), ("Yes. There is no cat.", "yes"),  # only the first sentence counts
        ("nothing here", "yes"), ("NO", "yes"), ("", "yes"), ("no\n", "no"),  # whole words only
    ],
)  # fmt: skip
def test_pope_label(answer, label):
    assert pope_label(answer) == label


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Yes.", "yes"), ("no", "no"), ("y", "yes"), ("N", "no"), ("x", "other"), ("", "other"),
        ("not sure", "no"), ("I do not", "other"), ("well, yes", "other"), ("No, yes", "no"),
    ],
)  # fmt: skip
def test_mme_label(answer, label):
    assert mme_label(answer) == label


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), (" B\n", "B"), ("B. red circle", "B"), ("b", "B"), ("b. red", "B"),
        ("A\nbecause", "A"), ("I think: The answer is C.", "C"), ("The answer is D", "D"),
        ("The answer is Apt. The answer is B.", "B"),  # a letter with its period comes first
        ("E", None), ("a red circle", None), ("the answer is a circle", None), ("", None),
        ("B) red", None), ("Because", None),
    ],
)  # fmt: skip
def test_option_letter(answer, letter):
    assert option_letter(answer) == letter


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two  dogs", "2 dogs"), ("none", "0"), ("10,000", "10000"), ("3.5", "3.5"),
        ("end.", "end"), ("dont", "don't"), ("couldnt've", "couldn't've"), ("dog's", "dog 's"),
        ("black/white", "black white"), ("black /white", "black white"), ("(left)", "left"),
        ("a-b c- d", "ab c d"),  # one hyphen at an edge removes every hyphen
        ("is it?", "is it"), ("An orange\tcircle\n", "orange circle"), ("427", "427"),
    ],
)  # fmt: skip
def test_evalai_normalise(text, normal):
    assert evalai_normalise(text) == normal


def test_vqa_accuracy_leaves_each_reference_out_in_turn():
    references = ["red"] * 3 + ["blue"] * 7
    # Three matches: leaving one of them out gives 2/3 (three times), else 3/3 (seven times).
    by_hand = (3 * 2 / 3 + 7 * 1) / 10
    assert vqa_accuracy("Red", references) == pytest.approx(by_hand)
    without_leaving_out = min(1, 3 / 3)
    assert vqa_accuracy("red", references) != pytest.approx(without_leaving_out)
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx((9 * 1 / 3 + 0) / 10)
    assert vqa_accuracy("red", ["a red."] * 10) == 1
    assert vqa_accuracy("green", references) == 0
    assert vqa_accuracy("", references) == 0


def test_f1_by_hand():
    # precision 3/4, recall 3/5
    assert f1(np.array(3), np.array(1), np.array(2)) == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert f1(np.array(0), np.array(0), np.array(0)) == 0


def test_mme_accuracy_plus_needs_both_of_a_pair():
    assert mme_score(np.array(2), np.array(1), np.array(1)) == 200
    assert mme_score(np.array(1), np.array(0), np.array(1)) == 50
    # Two pairs with one right answer each are worth less than one right pair.
    assert mme_score(np.array(2), np.array(0), np.array(2)) == 50
    assert mme_score(np.array(2), np.array(1), np.array(2)) == 100


def test_pope_headline_is_the_mean_of_the_categories_not_the_pool():
    pope = load_benchmark("pocket-pope")
    truths = ["yes", "yes", "no", "no"]
    said = {  # f1: 1, 0.8, 0
        "random": ["yes", "yes", "no", "no"],
        "popular": ["yes", "yes", "yes", "no"],
        "adversarial": ["no", "no", "no", "no"],
    }
    rows = [row(c, t, c) for c in said for t in truths]
    sheet = pope.sheet(rows, [a for answers in said.values() for a in answers])
    assert sheet.headline == pytest.approx(100 * (1 + 0.8 + 0) / 3)
    pooled = 100 * 2 * 4 / (2 * 4 + 1 + 2)
    assert sheet.headline != pytest.approx(pooled, abs=10)
    assert sheet.accuracy == pytest.approx(100 * 9 / 12)
    assert sheet.details["yes_ratio"] == pytest.approx(100 * 5 / 12)
    assert sheet.details["f1/popular"] == pytest.approx(80)
    assert sheet.details["accuracy/adversarial"] == pytest.approx(50)


def test_pope_category_without_questions_is_left_out_of_the_mean():
    pope = load_benchmark("pocket-pope")
    rows = [row("i", "yes", "random"), row("i", "no", "random")]
    assert pope.sheet(rows, ["yes", "no"]).headline == 100


def test_pope_failures_are_wrong_on_both_sides():
    pope = load_benchmark("pocket-pope")
    rows = [row("i", t, "random") for t in ("yes", "no", "yes", "no")]
    sheet = pope.sheet(rows, ["yes", "no", None, None])
    assert sheet.headline == pytest.approx(100 * 2 * 1 / (2 * 1 + 1 + 1))
    assert sheet.accuracy == 50
    dropped = pope.sheet(rows[:2], ["yes", "no"]).headline
    assert sheet.headline < dropped
    assert sheet.details["yes_ratio"] == 25
    assert sheet.details["failed"] == 2


def test_mme_sheet_by_hand():
    mme = load_benchmark("pocket-mme")
    rows = [row(i, t, c) for i in "ab" for c in ("count", "color") for t in ("yes", "no")]
    #                      a count         a color        b count        b color
    answers = ["yes", "no", "yes", "Yes.", "no", None, "yes", "no"]
    sheet = mme.sheet(rows, answers)
    # count: 2 of 4 right, 1 of 2 pairs; color: 3 of 4 right, 1 of 2 pairs
    assert sheet.headline == pytest.approx((50 + 50) + (75 + 50))
    assert sheet.accuracy == pytest.approx(62.5)
    assert sheet.details["accuracy+/count"] == 50
    assert sheet.details["percent"] == pytest.approx(22.5)
    assert sheet.image_ids == ("a", "b")
    assert sheet.value(sheet.stats).tolist() == pytest.approx([200 + 50, 0 + 200])


def test_mme_sheet_wants_whole_pairs():
    rows = [row("a", "yes", "count"), row("a", "no", "count"), row("b", "yes", "count")]
    with pytest.raises(ValueError, match="pairs"):
        load_benchmark("pocket-mme").sheet(rows, ["yes"] * 3)


def test_vqa_sheet_uses_references_of_the_row_when_it_has_them():
    textvqa = load_benchmark("pocket-textvqa")
    rows = [row("a", "42"), row("b", "7", answers=["7"] * 3 + ["1"] * 7), row("c", "9")]
    sheet = textvqa.sheet(rows, ["forty", "7", "9."])
    assert sheet.correct.tolist() == pytest.approx([0, 0.9, 1])
    assert sheet.headline == pytest.approx(100 * 1.9 / 3)


def test_mean_benchmarks_count_failures_and_weight_questions():
    for id, answer in (("pocket-gqa", "red"), ("pocket-sqa", "A"), ("pocket-vqav2", "red")):
        rows = [
            row("a", answer, "x"),
            row("a", answer, "y"),
            row("a", answer, "y"),
            row("b", answer),
        ]
        sheet = load_benchmark(id).sheet(rows, [answer, None, "zzz", answer])
        assert sheet.headline == pytest.approx(50), id
        assert sheet.correct.tolist() == [1, 0, 0, 1]
        mean_of_pictures = 100 * (1 / 3 + 1) / 2
        assert sheet.headline != pytest.approx(mean_of_pictures)
        assert sheet.details["accuracy/y"] == 0
        assert sheet.details["failed"] == 1


def test_silence_is_counted_and_no_answer_is_not_silence():
    sheet = load_benchmark("pocket-pope").sheet([row("a", "yes", "random")] * 2, ["", None])
    assert sheet.details["blank"] == 1
    assert sheet.details["failed"] == 1
    assert sheet.correct.tolist() == [1, 0]  # the official rule reads silence as yes


@pytest.mark.parametrize("answers", [[], ["red", "red"]])
def test_one_answer_per_row(answers):
    with pytest.raises(ValueError, match="one answer per row"):
        load_benchmark("pocket-gqa").sheet([row("a", "red")], answers)
    with pytest.raises(ValueError, match="one answer per row"):
        load_benchmark("pocket-gqa").sheet([], [])
