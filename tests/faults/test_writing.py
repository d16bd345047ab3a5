"""Full disks, folders in which nobody may write, two writers at once: a sentence, nothing lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small_run

from frugalvlm import cli
from frugalvlm.errors import FrugalError
from frugalvlm.paths import UnwritableError, check_writable
from frugalvlm.reproduce import command
from frugalvlm.runs import records

NAMES = [name for name in ("fork",) if name in multiprocessing.get_all_start_methods()]
pytestmark = pytest.mark.skipif(not NAMES, reason="needs fork")


def in_a_child(job, *arguments) -> tuple[str, str]:
    """What a job comes to in a process of its own: how it ended, and what it said."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)

    def work():
        try:
            its.send(("done", str(job(*arguments))))
        except FrugalError as error:
            its.send(("said", str(error)))
        except BaseException as error:
            its.send(("raw", f"{type(error).__name__}: {error}"))

    process = context.Process(target=work)
    process.start()
    its.close()
    try:
        return mine.recv()
    finally:
        process.join()


def full_from_now_on(size: int, job, *arguments):
    """A job whose disk, once answers are to be written, takes files of so many bytes only."""
    enter = records.AnswerLog.__enter__

    def fill(log):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return enter(log)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    records.AnswerLog.__enter__ = fill  # of this process, which ends with the job
    return job(*arguments)


# -- full disks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 200, 900])
def test_a_disk_that_is_full_in_mid_run_loses_nothing(room, tiny, work):
    """No byte; a lock and half of a log; a log and half of a record."""
    how, said = in_a_child(full_from_now_on, room, small_run.run, tiny, False)
    assert how == "said", said
    assert said.startswith(("No space left for ", "Cannot write "))
    assert said.endswith("run again.")
    assert "\n" not in said
    assert not list(work.rglob("*.json")), "no half record"
    assert not list(work.rglob("*.tmp"))
    resumed = small_run.run(tiny, beside=False)
    for path in work.rglob("*.json"):
        path.unlink()
    assert small_run.run(tiny, beside=False) == resumed


WRITES = """
import errno, os, pathlib, sys
from frugalvlm import cli, door
from frugalvlm.reproduce import printed
def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results/compare/a.png")
printed.compare = full
sys.exit(cli.main(["compare"]))
"""


def test_whatever_a_command_writes_ends_in_a_sentence(work):
    done = subprocess.run([sys.executable, "-c", WRITES], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "No space left for results/compare/a.png; nothing was written: free some space and run "
        "again.\n"
    )


def test_other_errors_of_the_system_are_not_taken_for_a_full_disk(monkeypatch):
    def lost(_):
        raise OSError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr(cli, "_papers", lost)
    with pytest.raises(ConnectionResetError):
        cli.main(["papers"])


# -- folders in which nobody may write -------------------------------------------------------------


def places(tmp_path: Path) -> dict[str, Path]:
    """Of them: two that even the administrator has no way into, and one by its permissions."""
    (tmp_path / "file").write_text("in the way")
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    found = {"a file": tmp_path / "file" / "results", "the kernel's": Path("/proc/results")}
    return found if os.geteuid() == 0 else {**found, "closed": closed / "results"}


def test_folders_are_tried_before_anything_is_computed(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(command, "side_by_side", None)  # nothing may be answered
    for name, place in places(tmp_path).items():
        with pytest.raises(UnwritableError, match="Cannot write"):
            check_writable(place)
        monkeypatch.setenv("FRUGALVLM_RESULTS", str(place))
        asked = ["--model", tiny, "-n", "20", "--benchmarks", "pocket-gqa", "--budgets", "1"]
        for arguments in (
            ["reproduce", "--paper", "visionzip", *asked],
            ["compare", "--methods", "uniform", "--model", tiny, "-n", "2"],
        ):
            assert cli.main(arguments) == 2, name
            said = capsys.readouterr().err.strip()
            assert said.startswith(f"Cannot write {place}"), name
            assert said.endswith("check the folder's permissions.")
            assert "\n" not in said
    assert check_writable(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir()), "nothing is left of the trial"


# -- two writers at once ---------------------------------------------------------------------------


def test_two_runs_at_once_end_in_one_table(tiny, work, tmp_path):
    """One of them may be told to wait; whoever ends has what a run alone has."""
    context = multiprocessing.get_context("fork")
    barrier, told = context.Barrier(2), context.Queue()

    def at_once():
        barrier.wait()
        try:
            told.put(("table", small_run.run(tiny, beside=False)))
        except FrugalError as error:
            told.put(("said", str(error)))

    pair = [context.Process(target=at_once) for _ in range(2)]
    for process in pair:
        process.start()
    results = [told.get(timeout=300) for _ in pair]
    for process in pair:
        process.join()
        assert process.exitcode == 0
    tables = [value for kind, value in results if kind == "table"]
    sentences = [value for kind, value in results if kind == "said"]
    assert tables
    assert all("answers the same questions" in said for said in sentences)
    assert all("wait until it is over, or end it, and run again" in said for said in sentences)
    left = [p.name for p in work.rglob("*") if p.suffix in (".tmp", ".lock", ".jsonl")]
    assert not left
    for path in work.rglob("*.json"):
        records.read_record(path)
        path.unlink()
    assert {small_run.run(tiny, beside=False)} == set(tables)


def test_records_of_one_name_written_by_two_are_one_of_both(tmp_path):
    """Each is whole, whoever comes last."""
    context = multiprocessing.get_context("fork")

    def write(content: bytes):
        for _ in range(50):
            records.write_bytes(tmp_path / "a.json", content)

    pair = [context.Process(target=write, args=(c * 200_000,)) for c in (b"a", b"b")]
    for process in pair:
        process.start()
    seen = set()
    while any(process.is_alive() for process in pair):
        if (tmp_path / "a.json").exists():
            seen.add((tmp_path / "a.json").read_bytes())
    for process in pair:
        process.join()
        assert process.exitcode == 0
    assert seen <= {b"a" * 200_000, b"b" * 200_000}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
