"""Official scores: right answers give the best score, and mixed ones what a hand counts."""

from __future__ import annotations

import pytest

from frugalvlm.benchmarks import stats
from frugalvlm.benchmarks.official import OFFICIAL
from frugalvlm.benchmarks.official.chartqa import relaxed
from frugalvlm.benchmarks.official.docvqa import anls
from frugalvlm.benchmarks.official.mmbench import letter_of
from frugalvlm.benchmarks.official.mme import COGNITION, PERCEPTION

PARTLY = {"textvqa": "go", "textvqa-plain": "go", "vqav2": "3", "vizwiz": "can"}  # of most people


def _right(name: str, rows: list[dict]) -> list[str]:
    return [PARTLY.get(name, row["answer"]) for row in rows]


@pytest.mark.parametrize("name", OFFICIAL)
def test_right_answers_score_best_and_none_scores_nothing(name, offline):
    benchmark = OFFICIAL[name]
    asked = benchmark.dataset("test", 0)
    sheet = benchmark.sheet(asked, _right(name, asked.texts))
    assert sheet.headline == pytest.approx(benchmark.headline_max)
    assert sheet.correct.tolist() == [1.0] * len(asked)
    nothing = benchmark.sheet(asked, [None] * len(asked))
    assert nothing.headline == 0.0
    assert nothing.details["failed"] == len(asked)
    assert stats.interval(sheet).n_questions == len(asked)
    with pytest.raises(ValueError, match="one answer per row"):
        benchmark.sheet(asked, ["yes"])


def test_pope_is_the_mean_of_three_f1_by_llavas_reading(offline):
    asked = OFFICIAL["pope"].dataset("test", 0)
    # Truth is yes, no, yes, no in every category.
    said = ["Yes, there is.", "no", "No", "no", "yes", "yes", "yes", "yes", "no", "no", "no", "no"]
    sheet = OFFICIAL["pope"].sheet(asked, said)
    each = [100 * 2 / 3, 100 * 4 / 6, 0.0]
    assert sheet.headline == pytest.approx(sum(each) / 3)
    assert [sheet.details[f"f1/{c}"] for c in ("random", "popular", "adversarial")] == (
        pytest.approx(each)
    )
    # "Yes, there is." is not yes and nothing else: all rows together have 2 right, 2 wrong yes and
    # 3 no on yes.
    assert sheet.details["lmms_eval"] == pytest.approx(100 * 4 / (4 + 2 + 3))
    assert sheet.details["rules_differ"] == 1


@pytest.mark.parametrize(
    ("name", "categories"), [("mme", (*PERCEPTION, *COGNITION)), ("mme-perception", PERCEPTION)]
)
def test_mme_sums_accuracy_and_accuracy_plus(name, categories, offline):
    asked = OFFICIAL[name].dataset("test", 0)
    # All yes: half of each pair, and never both.
    assert OFFICIAL[name].sheet(asked, ["Yes"] * len(asked)).headline == 50 * len(categories)
    said = [row["answer"] for row in asked.texts]
    said[0] = "other"  # existence: 3 of 4 right, 1 of 2 pairs
    sheet = OFFICIAL[name].sheet(asked, said)
    assert sheet.headline == pytest.approx(200 * len(categories) - 25 - 50)
    assert sheet.details["points/existence"] == pytest.approx(125)
    assert sheet.details["points/perception"] == pytest.approx(1925)
    with pytest.raises(ValueError, match="scored in pairs"):
        OFFICIAL[name].sheet(asked.texts[:1], ["yes"])


def test_mmbench_counts_a_question_only_if_every_order_is_right(offline):
    asked = OFFICIAL["mmbench"].dataset("test", 0)
    sheet = OFFICIAL["mmbench"].sheet(asked, ["A", "C", "A", "A"])
    assert sheet.headline == 50.0
    assert sheet.details["one_pass"] == 75.0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("B.", "B"), ("(B)", "B"), ("The answer is B.", "B"), ("b", None),
     ("A dog", "A"), ("A man rides a horse", None), ("it is a cow", "C"), ("A or B", None),
     ("", None), ("D", None)],
)  # fmt: skip
def test_letters_of_mmbench(answer, letter):
    assert letter_of(answer, ["the cat", "the dog", "a cow"]) == letter


def test_scienceqa_reads_sentences_that_lmms_eval_does_not(offline):
    asked = OFFICIAL["scienceqa"].dataset("test", 0)
    assert [row["answer"] for row in asked.texts] == ["A", "B", "C", "B"]
    sheet = OFFICIAL["scienceqa"].sheet(asked, ["The answer is A.", "B. two", "C.", "A"])
    assert sheet.correct.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert sheet.details["lmms_eval"] == 50.0
    assert sheet.details["rules_differ"] == 2


def test_people_who_agree_count(offline):
    asked = OFFICIAL["vqav2"].dataset("test", 1)
    # Five of ten say "2" or "two", which is the same after normalising.
    assert OFFICIAL["vqav2"].sheet(asked, ["Two."]).headline == 100.0
    few = OFFICIAL["vizwiz"].dataset("test", 1)
    assert OFFICIAL["vizwiz"].sheet(few, ["unanswerable"]).headline == pytest.approx(90.0)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [("104", "100", 1.0), ("106", "100", 0.0), ("12%", "12%", 1.0), ("0.12", "12%", 1.0),
     ("blue", "Blue", 1.0), ("0", "0", 1.0), ("bluish", "Blue", 0.0)],
)  # fmt: skip
def test_relaxed_accuracy(answer, truth, score):
    assert relaxed(answer, truth) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [("0.28", 1.0), (" ZERO ", 1.0), ("0.2", 0.75), ("1.99", 0.0), ("zer", 0.75)],
)
def test_anls_of_the_nearest_truth(answer, score):
    assert anls(answer, ["0.28", "zero"]) == pytest.approx(score)


def test_ocrbench_looks_inside(offline):
    asked = OFFICIAL["ocrbench"].dataset("test", 0)
    sheet = OFFICIAL["ocrbench"].sheet(asked, ["The word is centre", "x^2"])
    assert sheet.correct.tolist() == [1.0, 1.0]
    wrong = OFFICIAL["ocrbench"].sheet(asked, ["cent re", "X^2"])
    assert wrong.correct.tolist() == [0.0, 0.0]
