"""Records that were edited or damaged are named and left out; the others stand."""

import io
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from made_up_records import accuracy, efficiency
from rich.console import Console

from frugalvlm.reproduce.problems import tell_problems
from frugalvlm.runs import records
from frugalvlm.runs.records import AnswerLog, RecordError, RecordWarning, clear_left_over


def _set(place: str, value):
    """Changes a value of a record by its place; the value `del` takes it away."""

    def change(record: dict) -> None:
        *way, last = [int(p) if p.isdigit() else p for p in place.split(".")]
        for part in way:
            record = record[part]
        if value is del_:
            del record[last]
        else:
            record[last] = value

    return change


del_ = object()


def _forged(path: Path, change, *, digest: bool) -> None:
    """Edits a record in its file; with `digest` as if it had been written so."""
    record = json.loads(path.read_text())
    change(record)
    if digest:
        record["digest"] = records.request_hash({k: v for k, v in record.items() if k != "digest"})
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("answers.0.1", "no"), ("tokens.per_layer.0", 15.0), ("request.budget", 8),
        ("request.n", 3), ("request.benchmark", "pocket-pope"), ("provenance.code", "other"),
        ("provenance.created", "2026-01-01T00:00:00+00:00"), ("metrics.more", 1),
    ],
)  # fmt: skip
def test_an_edited_record_is_named_and_the_others_stand(tmp_path, put, place, value):
    path, other = put(tmp_path, accuracy()), put(tmp_path, accuracy("fastv"))
    _forged(path, _set(place, value), digest=False)
    with pytest.warns(RecordWarning, match=r"visionzip.* was edited after its run .*git checkout"):
        found = records.read_records(tmp_path)
    assert found == [records.read_record(other)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert records.read_records(tmp_path) == found, "said once"


@pytest.mark.parametrize("value", [1001, -1, math.nan, math.inf, "1000", None, True])
def test_edited_costs_are_refused(tmp_path, put, value):
    path = put(tmp_path, efficiency())
    _forged(path, _set("rows.0.flops", value), digest=False)
    with pytest.raises(RecordError, match=r"m--.*json"):
        records.read_record(path)


def test_a_digest_cannot_be_taken_away_but_old_records_have_none(tmp_path, put):
    path = put(tmp_path, accuracy())
    _forged(path, _set("digest", del_), digest=False)
    with pytest.raises(RecordError, match="has no digest"):
        records.read_record(path)
    _forged(path, _set("schema", 1), digest=False)
    assert records.read_record(path)["answers"] == accuracy()["answers"]


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        ("provenance.created", "yesterday", "'yesterday' is no time"),
        ("provenance.created", 5, r"provenance\.created: input should be a valid string"),
        ("provenance", [], "provenance: "),
        ("tokens", del_, "tokens: field required"),
        ("tokens.per_layer", del_, r"tokens\.per_layer: field required"),
        ("tokens.per_layer.1", "16", r"tokens\.per_layer\.1: input should be a valid number"),
        ("tokens.per_layer.1", -1.0, r"tokens\.per_layer\.1: .*greater than or equal to 0"),
        ("answers.0.1", 5, r"answers\.0\.1: input should be a valid string"),
        ("answers.0", ["q1", "yes", "no"], r"answers\.0: "),
        ("answers", {}, "answers: "),
        ("request.budget", "16", r"request\.budget: input should be a valid integer"),
        ("request.method", "visionzip", r"request\.method: "),
        ("counts.failed", 1, "the answers say otherwise"),
    ],
)
def test_accuracy_records_have_a_schema(tmp_path, put, place, value, fault):
    path = put(tmp_path, accuracy())
    _forged(path, _set(place, value), digest=True)
    with pytest.raises(RecordError, match=rf"visionzip.*json is not a usable record \(.*{fault}"):
        records.read_record(path)


@pytest.mark.parametrize(
    "part", ["rows", *(f"rows.0.{p}" for p in ("flops", "prefill_ms", "energy", "kv_bytes"))]
)
@pytest.mark.parametrize("value", [del_, "text", None])
def test_cost_records_have_a_schema(tmp_path, put, part, value):
    path = put(tmp_path, efficiency())
    _forged(path, _set(part, value), digest=True)
    with pytest.raises(RecordError, match=rf"not a usable record \({part}: "):
        records.read_record(path)


def test_files_that_hold_no_record_are_told_of_one_by_one(tmp_path, put):
    kept = records.read_record(put(tmp_path, accuracy()))
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.warns(RecordWarning) as told:
        assert records.read_records(tmp_path) == [kept]
    names = [
        str(w.message).split("/")[-1].split(" ")[0] for w in told if w.category is RecordWarning
    ]
    said = " ".join(str(w.message) for w in told)
    assert all(f"{name}.json" in said for name in ("folder", "empty", "bytes", "list", "deep"))
    assert len(names) == 5
    assert all(str(w.message).count("delete it and run again") == 1 for w in told)


def test_a_record_from_the_future_does_not_win(tmp_path, put):
    now = put(tmp_path, accuracy(hours=-2, answer="now", code="new"))
    late = put(tmp_path, accuracy(hours=+2, answer="late", code="new", machine="0123456789ab"))
    assert now == late, "the same run"
    put(tmp_path, accuracy(hours=-2, answer="now", code="new"))
    future = put(tmp_path / "x", accuracy(hours=+2, answer="late", code="later"))
    future.rename(tmp_path / future.name)
    with pytest.warns(RecordWarning, match=r"in the future, so it counts as the oldest"):
        found = records.read_records(tmp_path)
    assert [r["answers"][0][1] for r in found] == ["late", "now"]
    (latest,) = records.latest(found)
    assert latest["answers"][0][1] == "now"
    request = accuracy()["request"]
    known = {"machine": "0123456789ab"}
    assert records.find(tmp_path, "accuracy", request, "later", **known) is None, "not used again"
    assert records.find(tmp_path, "accuracy", request, "new", **known) is not None


# -- the log of a run under way --------------------------------------------------------------------

REQUEST = {"model": "m"}


def test_appending_does_not_read_the_log_again(tmp_path, monkeypatch):
    log, read = AnswerLog(tmp_path / "a.jsonl", REQUEST, "code"), []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
    for batch in range(200):
        log.append([(f"q{batch}-{i}", "yes") for i in range(32)])
    assert len(read) <= 2
    assert len(log.read()) == 200 * 32


def _second(path: str, told) -> None:
    try:
        AnswerLog(Path(path), REQUEST, "code").append([("q2", "no")])
    except RecordError as error:
        told.put(str(error))
    else:
        told.put("written")


def test_a_second_writer_gets_one_sentence(tmp_path):
    context = multiprocessing.get_context("fork")
    told = context.Queue()

    def other() -> str:
        process = context.Process(target=_second, args=(str(tmp_path / "a.jsonl"), told))
        process.start()
        process.join()
        return told.get(timeout=30)

    with AnswerLog(tmp_path / "a.jsonl", REQUEST, "code") as log:
        log.append([("q1", "yes")])
        assert other() == (
            f"Process {os.getpid()} answers the same questions and writes {log.path}: wait until "
            "it is over, or end it, and run again."
        )
    assert other() == "written"
    assert AnswerLog(tmp_path / "a.jsonl", REQUEST, "code").read() == {"q1": "yes", "q2": "no"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"], "no lock is left behind"


KILLED = """
import os, signal, sys
from pathlib import Path
from frugalvlm.reproduce.problems import tell_problems
from frugalvlm.runs import records
folder = Path(sys.argv[1])
log = records.AnswerLog(folder / "a.jsonl", {"model": "m"}, "code")
log.append([("q1", "yes")])
records.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
records.write_bytes(folder / "b.json", b"{}")
"""


def test_what_killed_runs_left_over_is_cleared(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    left = sorted(p.name.split(".")[-1] for p in tmp_path.iterdir())
    assert left == ["jsonl", "lock", "tmp"], "the kill came in the middle"
    mine = tmp_path / f".c.json.{os.getpid()}.tmp"
    mine.touch()
    clear_left_over(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, "a.jsonl"])


def test_the_lock_of_a_killed_run_does_not_stop_the_next(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    began = time.monotonic()
    log = AnswerLog(tmp_path / "a.jsonl", REQUEST, "code")
    log.append([("q2", "no")])
    assert log.read() == {"q1": "yes", "q2": "no"}
    assert time.monotonic() - began < 5


# -- said on the console ---------------------------------------------------------------------------


def test_a_run_begins_with_what_is_wrong_in_both_places(places, put):
    own = Path("pocket") / "visionzip"
    for place, part in zip(places, ("records", "model/records"), strict=True):
        path = put(place / own / part, accuracy(answer=place.name))
        path.write_text(path.read_text().replace(f'"{place.name}"', '"other"'))
    put(places[0] / own / "records", accuracy("[red]fastv[/red]"))
    console = Console(file=io.StringIO(), width=1000)
    tell_problems(["visionzip", "aim"], "pocket", console)
    said = console.file.getvalue().splitlines()
    assert len(said) == 2
    assert all("was edited after its run" in line for line in said)
    assert [str(place) in line for place, line in zip(places, said, strict=True)] == [True, True]
    tell_problems(["visionzip"], "pocket", console)
    assert len(console.file.getvalue().splitlines()) == 2, "once"
