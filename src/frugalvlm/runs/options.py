"""What a reproduction may be told, and where its records go."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from frugalvlm.benchmarks import ALL_BENCHMARKS
from frugalvlm.benchmarks.base import MAX_QUESTIONS, EvalSplit
from frugalvlm.checks import (
    OptionError,
    check_name,
    check_names,
    check_number,
    check_present,
    check_whole,
)
from frugalvlm.papers import keys
from frugalvlm.paths import results_places, work_dir
from frugalvlm.runs.records import clear_left_over
from frugalvlm.runs.setting import Setting

POCKET_MODEL = "pocket-llava-base"
GUIDE_MODEL = "pocket-llava-small"
QUESTIONS = 300  # per benchmark, at the pocket scale; what is published was asked as many
REPORTED: tuple[EvalSplit, ...] = ("test", "replication")  # dev is for choosing
ROUNDS, WINDOW_S = 9, 1.0  # of cost measurements that go with as many questions


def sizes_for(n: int) -> dict[str, Any]:
    """Options for so many questions: what is measured shrinks with them, so a trial stays short."""
    rounds, window = (ROUNDS, WINDOW_S) if n >= QUESTIONS else (5, 0.5) if n >= 100 else (3, 0.2)
    return {"n": n, "repeats": rounds, "energy_window_s": window}


# What the commands ask unless told otherwise: one paper within three minutes on two cores, all of
# them within half an hour.
ONE, QUICK = sizes_for(200), sizes_for(100)


@dataclass(frozen=True)
class Options:
    """What a reproduction may be told.

    Attributes:
        n: questions per benchmark, at most 100,000.
        benchmarks: ids of the benchmarks to run; None: all of the table.
        budgets: how many of the table's budgets to run, the first ones; None: all.
        model: model name, folder or Hub id.
        revision: of a Hub model.
        device: "cpu", "cuda", "cuda:1", ...
        force: run again although complete records exist.
        repeats: rounds of the latency measurement, at least 2: one round has no spread.
        energy_window_s: length of a modelled energy window in seconds, per method.
        guide: small model of the methods that need one: name, folder or Hub id.
        since: with `force`, records made from this moment on count all the same.
        split: which questions: "test", or "replication" for a second set of them, whose verdicts
            stand beside the others.

    Raises:
        OptionError: for a value that an option cannot have, before anything is computed.
    """

    n: int = QUESTIONS
    benchmarks: tuple[str, ...] | None = None
    budgets: int | None = None
    model: str = POCKET_MODEL
    revision: str | None = None
    device: str = "cpu"
    force: bool = False
    repeats: int = ROUNDS
    energy_window_s: float = WINDOW_S
    guide: str = GUIDE_MODEL
    since: datetime | None = None
    split: EvalSplit = "test"

    def __post_init__(self) -> None:
        for name, value in _checked(self).items():
            object.__setattr__(self, name, value)


def _checked(options: Options) -> dict[str, Any]:
    """The options as they are meant: lists as tuples, NumPy's numbers as Python's."""
    source = "a model's name, a folder or a Hub id"
    if not isinstance(options.force, bool):
        raise OptionError(f"force is True or False; got {options.force!r}.")
    checked: dict[str, Any] = {
        "n": check_whole("n", options.n, 1, MAX_QUESTIONS),
        "model": check_name("model", options.model, source),
        "guide": check_name("guide", options.guide, source),
        "device": check_present(options.device),
        "repeats": check_whole("repeats", options.repeats, 2),
        "energy_window_s": check_number("energy_window_s", options.energy_window_s),
    }
    if options.split not in REPORTED:
        raise OptionError(f"split is {' or '.join(REPORTED)}; got {options.split!r}.")
    if options.benchmarks is not None:
        checked["benchmarks"] = check_names("benchmarks", options.benchmarks, ALL_BENCHMARKS)
    if options.budgets is not None:
        checked["budgets"] = check_whole("budgets", options.budgets)
    if options.revision is not None:
        checked["revision"] = check_name("revision", options.revision, "a branch, tag or commit")
    return checked


def folder_of(paper: str, scale: str) -> Path:
    """Where the results of a paper at a scale go."""
    return work_dir() / scale / paper


def folders_of(paper: str, scale: str) -> list[Path]:
    """Where results of a paper at a scale are looked for: its work folder, then the published."""
    return [place / scale / paper for place in results_places()]


def pocket_setting(key: str, options: Options, weights: str, beside: str = "") -> Setting:
    """What all runs of a paper's pocket table share.

    Args:
        key: the paper.
        options: of this table: its model, its number of questions.
        weights: hash of the model's weights.
        beside: folder of another table than the main one, in the paper's own.
    """
    if options.split != "test":  # a second set of questions, of the main table as of others
        beside = f"{options.split}/{beside}" if beside else options.split
    own, *published = [folder / beside / "records" for folder in folders_of(key, "pocket")]
    clear_left_over(own)
    others = [
        folder / beside / "records"
        for paper in keys()
        if paper != key
        for folder in folders_of(paper, "pocket")
    ]
    return Setting(
        scale="pocket",
        model_name=options.model,
        model_hash=weights,
        folder=own,
        split=options.split,
        n=options.n,
        device=options.device,
        force=options.force,
        since=options.since,
        others=(*published, *others),
    )
