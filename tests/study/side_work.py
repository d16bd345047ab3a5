"""Work for the tests of side_by_side: other processes import it by this name."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch

from frugalvlm.papers import UnknownPaperError
from frugalvlm.reproduce.side_by_side import Part


def note(folder, part, reporter):
    """Leaves a file that says when it was done, by whom, on how many threads."""
    reporter.start(part.paper, 1)
    began = time.time()
    time.sleep(0.3)
    facts = f"{began} {time.time()} {os.getpid()} {torch.get_num_threads()}"
    (Path(folder) / f"{part.paper}-{part.benchmark}").write_text(facts)
    reporter.advance(1)


def fail(how, part, reporter):
    """A known problem, an unknown one, or the end of the process."""
    if how == "known":
        raise UnknownPaperError("no such paper")
    if how == "unknown":
        raise ZeroDivisionError("in the depth of the code")
    os.kill(os.getpid(), signal.SIGKILL)


def forever(folder, part, reporter):
    """Never ends; says who it is."""
    (Path(folder) / str(os.getpid())).touch()
    reporter.start(part.paper, 1)
    time.sleep(600)


def works(name, argument):
    """One of these with its first argument given."""
    return partial(globals()[name], argument)


def parts():
    """Two papers: one with two benchmarks and an analysis behind them, one with a benchmark."""
    return [
        Part("a", "answers", "x"), Part("a", "answers", last=True), Part("a", "answers", "y"),
        Part("b", "answers", "x"),
    ]  # fmt: skip
