"""The full scale from end to end: a tiny checkpoint in a folder, miniatures, and no network."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from frugalvlm.benchmarks.official import OFFICIAL, REFUSED
from frugalvlm.benchmarks.official.asking import (
    Store,
    Streamed,
    TooLittleMemoryError,
    batch_size_for,
)
from frugalvlm.benchmarks.official.frames import VICUNA, frame_of
from frugalvlm.cli import main
from frugalvlm.errors import FrugalError
from frugalvlm.loading import load_vlm
from frugalvlm.papers import load_paper
from frugalvlm.pocket.installed import save_vlm
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.reproduce.command import reproduce
from frugalvlm.runs import accuracy
from frugalvlm.runs.full import FullOptions, full_paper, full_tables
from frugalvlm.runs.layout import ScaleError
from frugalvlm.runs.records import read_records

SIX = ("gqa", "mmbench", "mme", "pope", "scienceqa", "textvqa")
METHODS = 6  # of VisionZip's table beside the untouched model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    save_vlm(build_model("pocket-llava-tiny"), build_processor(), folder)
    return folder


@pytest.fixture(scope="module")
def opened(checkpoint) -> tuple[Any, Any]:
    return load_vlm(str(checkpoint))


@pytest.fixture
def work(offline, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path / "work"))
    return tmp_path / "work"


def _run(options: FullOptions, plan: bool = False) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    reproduce("visionzip", "full", options, console, plan)
    return console.file.getvalue()


def test_plan_answers_table_and_the_same_again(checkpoint, work, monkeypatch):
    options = FullOptions(n=4, benchmarks=SIX, budgets=1, model=str(checkpoint))
    planned = _run(options, plan=True)
    assert "data set, testdev: lmms-lab/GQA @ a6e72d6e1b91: here" in planned
    assert f"gqa (testdev): 4 questions x {1 + METHODS} rows, 0 answered, 28 left." in planned
    assert f"mme (test): 4 questions x {1 + METHODS} rows" in planned
    assert "hours, by a trial of two batches" in planned
    assert "32 questions at once" in planned
    assert not list(work.rglob("*.json")), "a plan leaves no record"

    told = _run(options)
    made = read_records(work / "full" / "visionzip" / "records", "accuracy")
    assert len(made) == len(SIX) * (1 + METHODS)
    gqa = next(r for r in made if r["request"]["benchmark"] == "gqa")
    assert (
        gqa["request"]["data"] == "lmms-lab/GQA/testdev_balanced_instructions:testdev@a6e72d6e1b91"
    )
    assert gqa["request"]["prompt"] == "vicuna_v1, padded to a square"
    assert gqa["request"]["model"] == "tiny-llava"
    assert gqa["request"]["scale"] == "full"
    kept = {r["request"]["method"]["method"]: r["request"]["budget"] for r in made}
    assert kept["visionzip"] == round(kept["vanilla"] / 3), "192 of 576 is a third here, too"
    assert "Table 1 at the full scale" in told
    for printed in ("61.9", "1862", "85.9"):  # the paper's, of the untouched model
        assert printed in (work / "full" / "visionzip" / "visionzip.html").read_text()
    table = (work / "full" / "visionzip" / "visionzip.csv").read_text()
    assert "paper_score" in table
    assert ",59.3," in table

    monkeypatch.setattr(accuracy.asking, "answer", _never)
    again = _run(options)
    assert "0 left" in again
    assert "Nothing is left to ask." in again


def _never(*_: Any) -> None:
    raise AssertionError("this was answered before")


def test_a_killed_run_goes_on_where_it_stopped(checkpoint, work, monkeypatch):
    options = FullOptions(n=0, benchmarks=("pope",), budgets=1, model=str(checkpoint), batch=4)
    whole, asked = accuracy.asking.answer, []

    def dying(model: Any, processor: Any, inputs: Any, most: int) -> Any:
        if len(asked) == 8:  # trials of two rows took six
            raise KeyboardInterrupt
        asked.append(len(inputs["input_ids"]))
        return whole(model, processor, inputs, most)

    monkeypatch.setattr(accuracy.asking, "answer", dying)
    with pytest.raises(KeyboardInterrupt):
        _run(options)
    (log,) = work.rglob("*.answers.jsonl")
    assert len(log.read_text().splitlines()) == 1 + 8
    monkeypatch.setattr(accuracy.asking, "answer", whole)
    assert f"pope (test): 12 questions x {1 + METHODS} rows, 8 answered, 76 left." in _run(
        options, plan=True
    )
    _run(options)
    resumed = read_records(work / "full" / "visionzip" / "records", "accuracy")
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(work.with_name("other")))
    _run(options)
    straight = read_records(work.with_name("other") / "full" / "visionzip" / "records", "accuracy")
    assert _told(resumed) == _told(straight)
    assert all(len(r["answers"]) == 12 for r in resumed)


def _told(records: list[dict]) -> list[str]:
    return sorted(
        json.dumps([r["request"], r["answers"], r["tokens"]], sort_keys=True) for r in records
    )


def test_without_network_one_sentence_says_what_is_missing_where(
    checkpoint, work, tmp_path, monkeypatch, capsys
):
    empty = tmp_path / "empty"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(empty))
    given = ["reproduce", "--paper", "visionzip", "--scale", "full", "--model", str(checkpoint),
             "--benchmarks", "gqa,pope"]  # fmt: skip
    assert main(given) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    for part in (str(empty), "lmms-lab/GQA", "lmms-lab/POPE", "invoke fetch --paper"):
        assert part in said
    assert main([*given, "--plan"]) == 0
    assert "lmms-lab/POPE @ 4db1276663df: not here." in capsys.readouterr().out
    assert main(["fetch", "--paper", "visionzip", "--benchmarks", "pope"]) == 2
    assert "llava-hf/llava-1.5-7b-hf (checkpoint)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--paper", "visionzip", "--benchmarks", "gqo"), "Unknown in benchmarks: 'gqo'"),
        (("--paper", "visionzip", "--benchmarks", "docvqa"), "has no column docvqa"),
        (("--paper", "visionzip", "--benchmarks", "mmvet"), "MM-Vet needs a judge"),
        (("--paper", "visionzip", "--table", "table2"), "llava15-7b, llava15-13b, next-7b"),
        (("--paper", "sgl"), "InternVL2-26B"),
        (("--paper", "early_exit"), "no benchmark scores"),
        (("--all",), "one by one"),
        (("--paper", "visionzip", "--repeats", "3"), "measures no time"),
        (("--paper", "visionzip", "-n", "-1"), "at least 0"),
    ],
)
def test_wrong_requests_are_one_sentence(given, sentence, work, capsys):
    assert main(["reproduce", "--scale", "full", *given]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(work.rglob("*.json"))


def test_options_of_the_full_scale_are_refused_elsewhere(capsys):
    assert main(["reproduce", "--paper", "visionzip", "--plan"]) == 2
    assert "--scale full" in capsys.readouterr().err


PAPERS = {"visionzip": 3, "aim": 1, "fastervlm": 4, "gsearch": 1}


@pytest.mark.parametrize("key", PAPERS)
def test_layouts_name_checkpoint_benchmarks_and_splits(key):
    paper = load_paper(key)
    tables = full_tables(paper)
    assert len(tables) == PAPERS[key]
    assert tables[0].model.hub == "llava-hf/llava-1.5-7b-hf"
    assert len(tables[0].model.revision or "") == 40
    printed = 0
    for table in tables:
        told = FullOptions(table=table.id)
        if all(c.id in REFUSED for c in table.columns):  # clips; a closed model judged the answers
            with pytest.raises(ScaleError, match="needs a judge"):
                full_paper(paper, told)
            continue
        own, trimmed, out = full_paper(paper, told)
        assert {c.id for c in trimmed.columns} <= set(OFFICIAL)
        assert all(OFFICIAL[c.id].source.split in trimmed.note for c in trimmed.columns)
        assert all(why in trimmed.note for why in out.values())
        for row in trimmed.rows:
            for budget in trimmed.budgets:
                for column in trimmed.columns:
                    printed += own.printed(trimmed, row, column, budget) is not None
    assert printed > 4


def test_claims_speak_of_official_benchmarks():
    paper, _, _ = full_paper(load_paper("visionzip"), FullOptions())
    quantity = paper.claim("sqa-spared").quantity
    assert (quantity["a"]["over"], quantity["b"]["over"]) == ("scienceqa", "pope")


# -- batches, prompts, memory ---------------------------------------------------------------------


def _streamed(opened, size: int, ahead: int = 0, n: int = 0) -> Streamed:
    model, processor = opened
    frame = frame_of(model, processor)
    return Streamed(OFFICIAL["pope"], processor, n, "cpu", frame, size, ahead)


def test_a_frame_is_the_template_with_vicunas_sentence_and_square_pictures(opened, offline):
    frame = frame_of(*opened)
    assert frame.text("what?") == f"{VICUNA}USER: <image>\nwhat? ASSISTANT:"
    wide = OFFICIAL["pope"].dataset("test", 1).picture(0)
    square = frame.picture(wide)
    assert square.size == (48, 48)
    assert square.getpixel((0, 0)) == frame.ground == square.getpixel((47, 47))
    assert square.crop((0, 9, 48, 39)).tobytes() == wide.tobytes()
    assert frame.picture(square) is square


def test_a_checkpoint_without_a_template_is_refused(opened):
    model, processor = opened
    bare = type(processor)(processor.image_processor, processor.tokenizer)
    bare.chat_template = None
    with pytest.raises(FrugalError, match="has no chat template"):
        frame_of(model, bare)


def test_batches_stream_and_hold_nothing(opened, offline):
    asked = _streamed(opened, 5)
    first, second = iter(asked.batches), iter(asked.batches)
    ids, inputs = next(first)
    assert len(ids) == 5
    assert inputs["input_ids"].shape[0] == inputs["pixel_values"].shape[0] == 5
    same_ids, same = next(second)
    assert same_ids == ids
    assert same["pixel_values"] is not inputs["pixel_values"]
    assert torch.equal(same["pixel_values"], inputs["pixel_values"])
    every = [i for part, _ in asked.batches for i in part]
    assert sorted(every) == sorted(asked.ids)
    lengths = [len(asked.rows[asked.ids.index(i)]["question"]) for i in every]
    assert lengths == sorted(lengths, reverse=True), "the longest first"
    done = dict.fromkeys(every[:5], "yes")
    assert [ids for ids, _ in asked.pending(done)] == [every[5:10], every[10:]]


def test_batches_prepared_ahead_are_the_same(opened, offline):
    alone, ahead = _streamed(opened, 6), _streamed(opened, 6, ahead=1)
    for (ids, inputs), (same_ids, same) in zip(alone.batches, ahead.batches, strict=True):
        assert ids == same_ids
        assert all(torch.equal(inputs[name], same[name]) for name in inputs)


def test_a_store_keeps_what_came_first_within_its_bound():
    store = Store(100)
    for number in range(5):
        store[bytes([number])] = torch.full((10,), float(number))  # 40 bytes
        assert store[bytes([number])][0] == number
    assert list(store) == [b"\0", b"\1"]
    assert store.held <= 100


def test_the_batch_follows_free_memory(opened):
    model, _ = opened
    sizes = [batch_size_for(model, 100, free) for free in (2**22, 2**24, 2**40)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 32
    assert sizes[0] < 32
    assert all(size & (size - 1) == 0 for size in sizes)
    with pytest.raises(TooLittleMemoryError, match="One question of 100 tokens takes about"):
        batch_size_for(model, 100, 1000)
