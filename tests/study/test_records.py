"""Records: never half a file, never a wrong one, and a killed run goes on."""

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from frugalvlm.runs import records
from frugalvlm.runs.records import AnswerLog, MixedSettingError, RecordError

REQUEST = {"model": "m", "n": 3, "device": "cpu"}


def changed(record: dict, **provenance) -> dict:
    return {**record, "provenance": {**record["provenance"], **provenance}}


# --- writing and reading -------------------------------------------------------------------


def test_round_trip_and_no_leftovers(make, tmp_path: Path) -> None:
    record = make.accuracy("visionzip", 16)
    path = records.write(tmp_path / "deep" / "a.json", record)
    assert records.read_record(path) == record | {"schema": 2}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_nan_becomes_null_and_the_file_is_strict_json(make, tmp_path: Path) -> None:
    record = make.accuracy("visionzip", 16) | {"metrics": {"low": float("nan")}}
    path = records.write(tmp_path / "a.json", record)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(path.read_text(), parse_constant=refuse)["metrics"] == {"low": None}


def test_a_full_disk_leaves_the_old_record_and_one_sentence(make, tmp_path, monkeypatch) -> None:
    path = records.write(tmp_path / "a.json", make.accuracy("visionzip", 16))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(RecordError, match=r"No space left for .*free some space"):
        records.write(path, make.accuracy("visionzip", 32))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_in_mid_write_leaves_the_old_record(make, tmp_path: Path) -> None:
    path = records.write(tmp_path / "a.json", make.accuracy("visionzip", 16))
    child = os.fork()
    if child == 0:  # the text is in the temporary file, the renaming is still to come
        records.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        records.write(path, make.accuracy("visionzip", 32))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the kill really came in the middle
    assert [r["request"]["budget"] for r in records.read_records(tmp_path)] == [16]


def test_a_damaged_file_is_named_with_a_remedy(make, tmp_path: Path) -> None:
    path = records.write(tmp_path / "a.json", make.accuracy("visionzip", 16))
    path.write_text(path.read_text()[:-40])
    with pytest.raises(RecordError, match=r"a\.json is damaged .*delete it and run again"):
        records.read_record(path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"schema": 3}, "schema 3"),
        ({"kind": "gossip"}, "kind: input should be 'accuracy', "),
        ({"status": "nearly"}, "status: input should be 'complete', "),
        ({"provenance": {}}, r"provenance\.created: field required"),
        ({"request": None}, "request: input should be "),
        ({"answers": [["q", "a"], ["q", "b"]]}, "1 question ids occur twice"),
        ({"counts": {"asked": 40, "answered": 40, "failed": 1}}, "counts say"),
        ({"counts": {"asked": 39, "answered": 39, "failed": 0}}, "counts say"),
    ],
)
def test_what_is_no_record_is_refused_by_reader_and_writer(make, tmp_path, change, fault) -> None:
    record = make.accuracy("visionzip", 16) | change
    path = tmp_path / "a.json"
    with pytest.raises(RecordError, match=fault):
        records.write(path, record)
    assert not path.exists()
    path.write_text(json.dumps(record))
    with pytest.raises(RecordError, match=fault):
        records.read_record(path)


def test_answers_that_never_came_must_be_counted_as_failed(make, tmp_path: Path) -> None:
    record = make.accuracy("visionzip", 16, failed=2)
    assert record["counts"] == {"asked": 40, "answered": 38, "failed": 2}
    records.write(tmp_path / "a.json", record)
    record["counts"] = {"asked": 38, "answered": 38, "failed": 0}  # failures out of the sum
    with pytest.raises(RecordError, match="counts say"):
        records.write(tmp_path / "b.json", record)


# --- choosing ------------------------------------------------------------------------------


def test_read_records_filters_and_sorts(make, tmp_path: Path) -> None:
    old = changed(make.efficiency(), created="2025-01-01T00:00:00+00:00")
    records.write(tmp_path / "b.json", make.accuracy("vanilla", 144))
    records.write(tmp_path / "c.json", old)
    records.write(tmp_path / "d.json", changed(make.attention([0.1, 0.2]), machine="other"))
    kinds = [r["kind"] for r in records.read_records(tmp_path)]
    assert kinds == ["efficiency", *sorted(kinds[1:], key=kinds.index)]
    assert len(kinds) == 3
    assert [r["kind"] for r in records.read_records(tmp_path, "accuracy")] == ["accuracy"]
    assert [r["kind"] for r in records.read_records(tmp_path, machine="other")] == ["attention"]
    assert records.read_records(tmp_path / "absent") == []
    with pytest.raises(RecordError, match="Unknown kind"):
        records.read_records(tmp_path, "acuracy")


def test_latest_takes_the_newest_complete_one_of_a_request(make) -> None:
    first = make.accuracy("visionzip", 16, right=0.2)
    second = changed(make.accuracy("visionzip", 16, right=0.4), created="2026-02-01T00:00:00+00:00")
    half = changed(
        make.accuracy("visionzip", 16, status="partial"), created="2026-03-01T00:00:00+00:00"
    )
    other = changed(make.accuracy("visionzip", 16), machine="other")
    found = records.latest([half, second, other, first])
    assert found == [other, second]


def test_times_with_and_without_a_zone_can_be_compared(make) -> None:
    naive = changed(make.accuracy("visionzip", 16, right=0.2), created="2026-05-01T00:00:00")
    zoned = make.accuracy("visionzip", 16, right=0.4)
    assert records.latest([naive, zoned]) == [naive]


@pytest.mark.parametrize(
    ("request_change", "provenance_change", "named"),
    [
        ({"n": 20}, {}, "n: 20, 40"),
        ({"model": "other"}, {}, "model: other, pocket-llava-base"),
        ({"split": "dev"}, {}, "split: dev, test"),
        ({"dtype": "bfloat16"}, {}, "dtype: bfloat16, float32"),
        ({"device": "cuda"}, {}, "device: cpu, cuda"),
        ({}, {"machine": "other"}, "machine: 0123456789ab, other"),
        ({}, {"model_hash": "retrained"}, "model_hash: retrained, weights"),
    ],
)
def test_mixed_settings_are_refused_by_name(make, request_change, provenance_change, named) -> None:
    one, two = make.accuracy("vanilla", 144), make.accuracy("visionzip", 16)
    assert records.one_setting([one, two])["n"] == 40
    two["request"] |= request_change
    two["provenance"] |= provenance_change
    with pytest.raises(MixedSettingError, match=named):
        records.one_setting([one, two])


def test_newest_setting_leaves_one_setting_per_kind(make) -> None:
    old = [make.accuracy("vanilla", 144), make.efficiency()]
    new = changed(make.accuracy("vanilla", 144, n=20), created="2026-02-01T00:00:00+00:00")
    chosen = records.newest_setting([*old, new])
    assert chosen == [new, old[1]]


def test_find_wants_the_same_request_code_weights_and_machine(make, tmp_path: Path) -> None:
    record = make.accuracy("visionzip", 16)
    records.write(tmp_path / "a.json", record)
    record = records.read_record(tmp_path / "a.json")

    def found(request=record["request"], code="code", machine=make.machine, **more):
        return records.find(tmp_path, "accuracy", request, code, machine=machine, **more)

    assert found() == record
    assert found(request=dict(reversed(record["request"].items()))) == record
    assert found(model_hash="weights") == record
    assert found(request=record["request"] | {"n": 41}) is None
    assert found(code="new code") is None
    assert found(machine="elsewhere") is None
    assert found(model_hash="retrained") is None
    assert found(data_hash="other questions") is None
    records.write(tmp_path / "a.json", record | {"status": "partial"})
    assert found() is None


# --- hashes and provenance -----------------------------------------------------------------


def test_request_hash_is_canonical() -> None:
    base = records.request_hash({"a": 1, "b": [1, 2]})
    assert base == records.request_hash({"b": (1, 2), "a": 1})
    assert len(base) == 16
    others = [{"a": 1, "b": [2, 1]}, {"a": "1", "b": [1, 2]}, {"a": 1}, {"a": None, "b": [1, 2]}]
    assert base not in map(records.request_hash, others)


def test_record_names_are_readable_and_differ(make) -> None:
    request = make.accuracy("visionzip", 16)["request"]
    name = records.record_name(request, "code", "machine")
    assert name.startswith("visionzip--16--pocket-gqa--")
    assert name == records.record_name(request, "code", "machine")
    others = [
        records.record_name(request | {"n": 41}, "code", "machine"),
        records.record_name(request, "other", "machine"),
        records.record_name(request, "code", "other"),
    ]
    assert len({name, *others}) == 4
    hub = records.record_name({"model": "llava-hf/llava-1.5-7b-hf"}, "code", "machine")
    assert "/" not in hub


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    monkeypatch.setattr(records, "project_root", lambda: tmp_path.resolve())
    return tmp_path


def test_dirty_means_source_or_data_and_not_results(repository: Path) -> None:
    made = records.provenance(code="c", device="cpu")
    assert (made["commit"], made["dirty"]) == (git(repository, "rev-parse", "HEAD"), False)
    (repository / "results").mkdir()
    (repository / "results" / "r.json").write_text("{}")
    assert records.provenance(code="c", device="cpu")["dirty"] is False
    (repository / "src" / "a.py").write_text("x = 2\n")
    assert records.provenance(code="c", device="cpu")["dirty"] is True


def test_provenance_without_git_or_inside_another_repository(repository, monkeypatch) -> None:
    nested = repository / "nested"
    nested.mkdir()
    monkeypatch.setattr(records, "project_root", lambda: nested.resolve())
    made = records.provenance(code="c", device="cpu")
    assert (made["commit"], made["dirty"]) == (None, None)
    monkeypatch.setattr(records, "project_root", lambda: repository.resolve())
    monkeypatch.setenv("PATH", "")
    made = records.provenance(code="c", device="cpu", seconds=1.23456)
    assert (made["commit"], made["dirty"], made["seconds"]) == (None, None, 1.2)
    assert len(made["machine"]) == 12
    assert made["versions"]["torch"]


# --- the log of a run under way --------------------------------------------------------------


def test_a_log_gives_back_what_was_answered(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "deep" / "a.jsonl", REQUEST, "code")
    assert log.read() == {}
    log.append([("q1", "yes"), ("q2", None)])
    log.append([("q3", "zwölf\n")])
    assert AnswerLog(log.path, REQUEST, "code").read() == {"q1": "yes", "q2": None, "q3": "zwölf\n"}
    log.clear()
    log.clear()
    assert log.read() == {}


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_half_a_line_is_dropped_and_never_glued_to_the_next(tmp_path: Path, cut: int) -> None:
    log = AnswerLog(tmp_path / "a.jsonl", REQUEST, "code")
    log.append([("q1", "yes"), ("q2", "no")])
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    assert log.read() == {"q1": "yes"}
    log.append([("q2", "no"), ("q3", "one")])
    assert log.read() == {"q1": "yes", "q2": "no", "q3": "one"}


def test_half_a_line_longer_than_what_follows_leaves_nothing_behind(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "a.jsonl", REQUEST, "code")
    log.append([("q1", "yes"), ("q2", "a long story " * 20)])
    log.path.write_bytes(log.path.read_bytes()[:-2])
    log.append([("q2", "no")])
    assert log.read() == {"q1": "yes", "q2": "no"}
    assert log.path.read_text().endswith('["q2", "no"]\n')


def test_half_a_header_starts_afresh(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "a.jsonl", REQUEST, "code")
    log.path.write_text('{"request": "12')
    assert log.read() == {}
    log.append([("q1", "yes")])
    assert log.read() == {"q1": "yes"}


def test_a_repeated_question_counts_once_with_its_last_answer(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "a.jsonl", REQUEST, "code")
    log.append([("q1", "yes"), ("q1", "no")])
    assert log.read() == {"q1": "no"}


@pytest.mark.parametrize(
    ("request_", "code", "weights"),
    [(REQUEST | {"n": 4}, "code", "w"), (REQUEST, "new", "w"), (REQUEST, "code", "retrained")],
)
def test_the_log_of_another_run_is_refused(tmp_path: Path, request_, code, weights) -> None:
    AnswerLog(tmp_path / "a.jsonl", REQUEST, "code", "w").append([("q1", "yes")])
    other = AnswerLog(tmp_path / "a.jsonl", request_, code, weights)
    for use in (other.read, lambda: other.append([("q1", "no")])):
        with pytest.raises(RecordError, match="another request, other code or other weights"):
            use()
    assert AnswerLog(tmp_path / "a.jsonl", REQUEST, "code", "w").read() == {"q1": "yes"}


def test_damage_before_the_last_line_is_not_taken_for_a_kill(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "a.jsonl", REQUEST, "code")
    log.append([("q1", "yes"), ("q2", "no")])
    lines = log.path.read_text().splitlines()
    log.path.write_text("\n".join([lines[0], lines[1][:4], lines[2], ""]))
    with pytest.raises(RecordError, match="damaged: delete it"):
        log.read()


def test_a_full_disk_is_one_sentence_for_the_log_too(tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(RecordError, match="No space left for"):
        AnswerLog(tmp_path / "a.jsonl", REQUEST, "code").append([("q1", "yes")])
