"""Runs that are killed at any moment lose nothing: resumed, they end in the same table."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small_run

Start = Callable[[], int]  # starts a run that leads a process group; gives its id
SEED = 11  # of the moments; what is under way at each depends on the machine


def left_over(work: Path) -> list[str]:
    """Half-written files, locks and logs."""
    return sorted(p.name for p in work.rglob("*") if p.suffix in (".tmp", ".lock", ".jsonl"))


def killed(start: Start, work: Path, longest: float, moment: random.Random) -> bool:
    """Starts a run and kills its whole group; False when it was over before."""
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    leader = start()
    while os.waitpid(leader, os.WNOHANG) == (0, 0):  # until it does something
        now = {path for path in work.rglob("*") if path.is_file()}
        if now - before.keys():
            time.sleep(moment.uniform(0, longest))
            break
        time.sleep(0.01)
    else:
        return False
    if os.waitpid(leader, os.WNOHANG) != (0, 0):
        return False
    os.killpg(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    return True


def survive(start: Start, table: Callable[[], str], work: Path, kills: int, longest: float) -> int:
    """Kills so many runs, each going on where the one before was killed.

    Returns:
        How often a run came to its end in between, with the same table.
    """
    whole, moment, over = table(), random.Random(SEED), 0
    _remove(work)
    for _ in range(kills):
        while not killed(start, work, longest, moment):
            assert table() == whole
            _remove(work)
            over += 1
    assert table() == whole
    assert not left_over(work)
    return over


def _remove(work: Path) -> None:
    for path in sorted(work.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_runs_of_one_process_survive_kills(tiny, work):
    def start() -> int:
        child = os.fork()
        if not child:
            os.setsid()
            small_run.run(tiny, beside=False)
            os._exit(0)
        return child

    began = time.monotonic()
    small_run.run(tiny, beside=False)
    survive(start, lambda: small_run.run(tiny, beside=False), work, 3, time.monotonic() - began)


@pytest.mark.faults
def test_runs_of_several_processes_survive_twenty_kills(tiny, work, tmp_path):
    path = tmp_path / "table.csv"
    command = [sys.executable, small_run.__file__, tiny, str(path)]

    def start() -> int:
        return subprocess.Popen(command, start_new_session=True).pid

    def table() -> str:
        path.unlink(missing_ok=True)
        subprocess.run(command, check=True)
        return path.read_text()

    began = time.monotonic()
    table()
    survive(start, table, work, 20, (time.monotonic() - began) / 2)
