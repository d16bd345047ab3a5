"""Parts of a reproduction side by side: one process per core, each on one thread.

On small models two processes of one thread do about twice the work of one process of two. Nothing
that measures time belongs here, for a second process disturbs the clock.

Why not a pool of joblib, loky or concurrent.futures: parts wait for each other (a run that two
papers need is made once), every process tells its own bar of single questions, and when the first
process is killed the others notice at their pipe and end, so that none goes on writing records.
A pool hands out what is submitted, in any order, and its workers outlive a killed parent while they
hold a part. `multiprocessing` is all that is needed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from frugalvlm.errors import FrugalError
from frugalvlm.runs.records import RecordWarning
from frugalvlm.runs.setting import Reporter, Silent

MOST = 4  # each holds a model, a benchmark's pictures and what the tower makes of them


class LostProcessError(FrugalError, RuntimeError):
    """A process ended in mid-work; the message says what to do."""


@dataclass(frozen=True)
class Part:
    """A piece of work that leaves files behind.

    Attributes:
        paper: its key.
        step: what of it, for example "answers".
        benchmark: of its answers; None: it is not about one benchmark. Parts of one step about the
            same benchmark wait for each other, so that a run that both need is made once.
        table: of the paper; None: its main one.
        last: begins when the other parts of this paper and step are over.
    """

    paper: str
    step: str
    benchmark: str | None = None
    table: str | None = None
    last: bool = False


def processes(device: str) -> int:
    """How many work side by side: one per usable core, `MOST` at most; one on a GPU."""
    if torch.device(device).type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(MOST, cores or 1))


def side_by_side(
    parts: Sequence[Part],
    work: Callable[[Part, Reporter], None],
    reporters: Sequence[Reporter],
    overall: Reporter | None = None,
) -> None:
    """Do all parts, in this order as far as possible, in as many processes as there are reporters.

    Args:
        parts: what to do.
        work: does one part; a function of a module (or a partial of one), for it is sent to other
            processes.
        reporters: each is told of what its process does.
        overall: told of the parts that are done.

    Raises:
        LostProcessError: a process was killed.
        Exception: what `work` raised; other processes are stopped then.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    workers: dict[Connection, Any] = {}
    told = {}
    try:
        for reporter in reporters[: len(parts)]:
            ours, theirs = context.Pipe()
            workers[ours] = context.Process(target=_worker, args=(theirs, work), daemon=True)
            workers[ours].start()
            theirs.close()  # or we would not notice when the process ends
            told[ours] = reporter
        _hand_out(list(parts), told, overall or Silent())
        for ours in workers:
            ours.send(None)
        for process in workers.values():
            process.join()
    finally:
        for process in workers.values():
            process.terminate()
            process.join()


def _hand_out(waiting: list[Part], told: dict[Connection, Reporter], overall: Reporter) -> None:
    """Give every idle process the first part that may begin, until all are done."""
    overall.start("all parts", len(waiting))
    running: dict[Connection, Part] = {}
    while waiting or running:
        for ours in told:
            part = None if ours in running else _ready(waiting, list(running.values()))
            if part is not None:
                waiting.remove(part)
                running[ours] = part
                ours.send(part)
        heard = set(wait(list(running)))
        for ours in [c for c in running if c in heard]:
            try:
                kind, what = ours.recv()
            except (EOFError, ConnectionError):
                part = running[ours]
                where = part.paper + (f", {part.benchmark}" if part.benchmark else "")
                raise LostProcessError(
                    f"A process was killed while it worked on {where} (out of memory?). Nothing "
                    "is lost: the same command continues where this one stopped."
                ) from None
            if kind == "done":
                del running[ours]
                overall.advance(1)
            elif kind == "failed":
                raise what
            else:
                getattr(told[ours], kind)(*what)


def _ready(waiting: Sequence[Part], running: Sequence[Part]) -> Part | None:
    def blocked(part: Part) -> bool:
        shared = part.benchmark is not None and any(
            (other.step, other.benchmark) == (part.step, part.benchmark) for other in running
        )
        return shared or (
            part.last
            and any(
                (other.paper, other.step) == (part.paper, part.step) and not other.last
                for other in (*waiting, *running)
            )
        )

    return next((part for part in waiting if not blocked(part)), None)


class _Told:
    """A reporter in another process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def start(self, description: str, total: int) -> None:
        """A run begins."""
        self._connection.send(("start", (description, total)))

    def advance(self, steps: int) -> None:
        """So many questions or rounds are done."""
        self._connection.send(("advance", (steps,)))


def _sendable(error: Exception) -> Exception:
    """A known problem as it is; of any other one its traceback, which would be lost."""
    if isinstance(error, FrugalError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))


def _keep_memory() -> None:
    """Tell glibc to keep freed blocks, which it hands back to the kernel after every step.

    Getting them back zeroed costs an eighth of the time here. Other C libraries are left alone.
    """
    trim_threshold, mmap_max = -1, -4  # names of glibc's malloc.h
    with suppress(AttributeError, OSError, TypeError):  # TypeError: no main program, on Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def _worker(connection: Connection, work: Callable[[Part, Reporter], None]) -> None:
    # Ctrl-C reaches all processes of a terminal; the first one decides and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that temporary files are removed
    warnings.simplefilter("ignore", RecordWarning)  # the first process has told of them
    torch.set_num_threads(1)
    _keep_memory()
    with suppress(EOFError, ConnectionError):  # the first process is gone
        while (part := connection.recv()) is not None:
            try:
                work(part, _Told(connection))
            except Exception as error:
                connection.send(("failed", _sendable(error)))
                return
            connection.send(("done", None))
