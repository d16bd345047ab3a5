"""Official data sets: read from a cache, one split alone, a fixed sample, prompts word for word."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from miniatures import MADE, NEWEST

from frugalvlm.benchmarks.official import OFFICIAL, REFUSED, DataError, RefusedError, official
from frugalvlm.benchmarks.official.base import sample
from frugalvlm.benchmarks.official.data import files_of, rows_of

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
PROMPTS = {  # of the first row
    "gqa": f"Is thing 0 red?{SHORT}",
    "pope": f"Is there a thing 0 in the image?{SHORT}",
    "mme": f"Is this Yes 0?{SHORT}",
    "mme-perception": f"Is this Yes 0?{SHORT}",
    "scienceqa": f"Which is 0?\nA. one\nB. two{LETTER}",
    "textvqa": f"what does sign 0 say?\nReference OCR token: STOP, 0{SHORT}",
    "textvqa-plain": f"what does sign 0 say?{SHORT}",
    "vqav2": f"How many things 0?{SHORT}",
    "mmbench": f"What is 241?\nA. a cat\nB. a dog\nC. a cow{LETTER}",
    "mmbench-cn": "What is 241?\nA. a cat\nB. a dog\nC. a cow\n请直接回答选项字母。",
    "vizwiz": "What Is this?\nWhen the provided information is insufficient, respond with "
    f"'Unanswerable'.{SHORT}",
    "seed": f"Which 0?\nA. a 0\nB. b 0\nC. c 0\nD. d 0{LETTER}",
    "chartqa": "How much 0?\nAnswer the question with a single word.",
    "docvqa": f"What is value 0?{SHORT}",
    "ocrbench": "what is written in the image?",
}
ROWS = {"mme": 56, "mme-perception": 40, "seed": 3}  # of the others, all that the miniature holds


@pytest.mark.parametrize("name", OFFICIAL)
def test_rows_carry_the_papers_prompt_and_a_picture(name, offline):
    benchmark = OFFICIAL[name]
    asked = benchmark.dataset("test", 0)
    assert asked[0]["question"] == PROMPTS[name]
    assert asked.picture(0).mode == "RGB"
    assert asked.picture(0).size == (48, 30)
    whole = len(MADE[benchmark.source.repo](benchmark.source.config)[0])
    assert len(asked) == ROWS.get(name, whole)
    ids = [row["question_id"] for row in asked.texts]
    assert len(set(ids)) == len(ids), "a record refuses an id that occurs twice"
    assert {"question_id", "image_id", "question", "answer", "category"} <= set(asked.texts[0])
    assert benchmark.source.revision != "main" or NEWEST[:12] in benchmark.data_name


def test_hints_stand_before_questions(offline):
    assert (
        OFFICIAL["scienceqa"]
        .dataset("test", 0)[1]["question"]
        .startswith("Context: Look at it.\nWhich is 1?\nA. one")
    )
    assert (
        OFFICIAL["mmbench"]
        .dataset("test", 0)[2]["question"]
        .startswith("Look at it.\nWhat is 252?\nA. a cat")
    )


def test_pictures_of_gqa_are_joined_by_their_id(offline):
    asked = OFFICIAL["gqa"].dataset("test", 0)
    there = {row["id"]: row["image"] for row in rows_of(OFFICIAL["gqa"].pictures)}
    for i, row in enumerate(asked.texts):
        assert asked.picture(i).tobytes() == there[row["image_id"]].convert("RGB").tobytes()


def test_other_splits_and_parts_are_not_opened(offline, tmp_path, monkeypatch):
    """A folder with half of a split is none; another split's files are never among them."""
    source = OFFICIAL["pope"].source
    assert [path.name for path in files_of(source)] == ["test-00000-of-00001.parquet"]
    home = tmp_path / "datasets--lmms-lab--POPE"
    shutil.copytree(offline / home.name, home)
    (whole,) = home.rglob("test-*.parquet")
    shutil.copy(whole, whole.with_name("other-00000-of-00001.parquet"))
    whole.rename(whole.with_name("test-00000-of-00002-abc.parquet"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="invoke fetch"):
        files_of(source)
    shutil.copy(home.rglob("test-*").__next__(), whole.with_name("test-00001-of-00002-def.parquet"))
    assert len(files_of(source)) == 2


def test_the_same_data_set_under_its_new_owner(offline, tmp_path, monkeypatch):
    shutil.copytree(offline / "datasets--lmms-lab--POPE",
                    tmp_path / "datasets--lmms-lab-encoder--POPE")  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert len(rows_of(OFFICIAL["pope"].source)) == 12


def test_other_columns_are_refused_by_name(offline):
    wrong = dataclasses.replace(OFFICIAL["pope"].source, columns=("question", "picture"))
    with pytest.raises(DataError, match="no column picture: it has id, question_id"):
        rows_of(wrong)


def test_what_is_not_here_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    rows_of.cache_clear()
    with pytest.raises(DataError, match=r"testdev split of lmms-lab/GQA .*a6e72d6e.*invoke fetch"):
        OFFICIAL["gqa"].dataset("test", 5)


def test_one_split_to_report(offline):
    with pytest.raises(RefusedError, match="pocket benchmarks' dev split"):
        OFFICIAL["gqa"].dataset("dev", 5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_judge_or_a_server_gives_no_number(name):
    with pytest.raises(RefusedError, match=r"needs|not wired"):
        official(name)
    assert name not in OFFICIAL


def test_an_unknown_benchmark_lists_the_known_ones():
    with pytest.raises(RefusedError, match="Known: gqa, mmbench"):
        official("gqo")


def _rows(pictures: int, each: int, categories: int = 1) -> list[dict]:
    return [
        {"question_id": f"{p}-{i}", "pair": f"{p}-{i // 2}", "image_id": str(p),
         "category": str(p % categories)}
        for p in range(pictures)
        for i in range(each)
    ]  # fmt: skip


def test_pictures_take_turns_in_a_sample():
    rows = _rows(10, 30)
    chosen = [rows[i] for i in sample(rows, 20)]
    assert [sum(r["image_id"] == str(p) for r in chosen) for p in range(10)] == [2] * 10
    assert chosen != rows[:20]


def test_a_smaller_sample_is_part_of_a_larger_one_and_order_does_not_matter():
    rows = _rows(7, 9)
    few, many = sample(rows, 10), sample(rows, 25)
    assert set(few) < set(many)
    assert many == sorted(many)
    turned = rows[::-1]
    ids = {rows[i]["question_id"] for i in many}
    assert {turned[i]["question_id"] for i in sample(turned, 25)} == ids
    assert sample(rows, 0) == sample(rows, 1000) == list(range(63))


def test_pairs_stay_together_and_categories_take_turns():
    rows = _rows(40, 2, categories=4)
    chosen = [rows[i] for i in sample(rows, 15, "pair", strata=True)]
    assert len(chosen) == 16
    assert all(sum(r["pair"] == s["pair"] for s in chosen) == 2 for r in chosen)
    assert [sum(r["category"] == str(c) for r in chosen) for c in range(4)] == [4] * 4
    assert len(sample(rows, 9, "pair")) == 10
