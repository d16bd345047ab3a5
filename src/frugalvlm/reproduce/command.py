"""Reproducing a paper: every run that its tables need, its verdicts, its notebook."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

from frugalvlm.door.beside import beside_runs, columns_beside, tables_beside
from frugalvlm.loading import model_hash
from frugalvlm.papers import all_papers, load_paper
from frugalvlm.paths import check_writable, work_dir
from frugalvlm.report.notebooks import execute_paper_notebook
from frugalvlm.report.pages import relink
from frugalvlm.reproduce.full import reproduce_full
from frugalvlm.reproduce.printed import print_closing, print_report, print_summary
from frugalvlm.reproduce.problems import tell_problems
from frugalvlm.reproduce.progress import Bars, progress
from frugalvlm.reproduce.runners import RUNNERS, Bench
from frugalvlm.reproduce.side_by_side import Part, processes, side_by_side
from frugalvlm.runs.full import FullOptions
from frugalvlm.runs.layout import ScaleError
from frugalvlm.runs.options import Options, folder_of
from frugalvlm.runs.setting import Reporter
from frugalvlm.studies import study_of


def reproduce(
    key: str,
    scale: str = "pocket",
    options: Options | FullOptions | None = None,
    console: Console | None = None,
    plan: bool = False,
) -> Path:
    """Everything behind `invoke reproduce`: runs, tables, verdicts, notebook, page.

    At the pocket scale answers come first, benchmarks side by side, one process per core; what is
    measured runs alone on the machine.

    Args:
        key: the paper.
        scale: "pocket", "blueprint" or "full".
        options: sizes and device; FullOptions at the full scale.
        console: where tables and progress go.
        plan: at the full scale, only say what would be fetched and asked, and how long it takes.

    Returns:
        The folder of the results.

    Raises:
        UnknownPaperError, ScaleError, WeightsError, LostProcessError: each with the remedy.
    """
    console, paper = console or Console(), load_paper(key)
    if scale == "full":
        told = options if isinstance(options, FullOptions) else FullOptions()
        return reproduce_full(key, told, console, plan)
    options = options if isinstance(options, Options) else Options()
    if scale not in RUNNERS:
        raise ScaleError(f"Unknown scale '{scale}': pocket, blueprint or full.")
    tell_problems([key], scale, console)
    if scale == "pocket":
        Bench.of(key, options)  # what is missing is said before anything starts
        check_writable(folder_of(key, scale))
        options = _from_now_on(options)
        _side_by_side(answer_parts(key, options), options, console)
    with progress(console) as reporter:
        made = RUNNERS[scale](key, options, reporter)
    found, page = print_report(paper, scale, made, console), None
    folder = folder_of(key, scale)
    if scale == "pocket":
        page = execute_paper_notebook(key, options, folder)
    print_closing(paper, scale, found, page, console)
    return folder


def runnable(scale: str) -> list[str]:
    """Keys of the papers that can be reproduced at a scale.

    Raises:
        ScaleError: for a scale at which there is no running all of them.
    """
    if scale not in RUNNERS:
        raise ScaleError(
            f"All papers run at the scales pocket and blueprint, not '{scale}'; "
            "name one with --paper."
        )
    return [paper.key for paper in all_papers() if paper.status[scale] != "planned"]


def reproduce_all(
    scale: str = "pocket", options: Options | None = None, console: Console | None = None
) -> list[Path]:
    """Reproduce every runnable paper; an interrupted run continues where it stopped.

    At the pocket scale there are three steps. *Answers*: papers and benchmarks side by side, one
    process per core; a run that several papers need is made once and copied. *Measurements*: alone
    on the machine, one after the other. *Pages*: the executed notebooks, side by side again.

    Args:
        scale: "pocket" or "blueprint".
        options: sizes and device, the same for all papers.
        console: where progress and a summary go.

    Returns:
        The folders of the results.

    Raises:
        ScaleError, WeightsError, LostProcessError: each with the remedy.
    """
    options, console = options or Options(), console or Console()
    options = _from_now_on(options)
    keys, made, started = runnable(scale), {}, time.monotonic()
    tell_problems(keys, scale, console)
    if scale == "pocket":
        model_hash(
            options.model, options.revision
        )  # what is missing is said before anything starts
        check_writable(work_dir() / scale)
        parts = [part for key in keys for part in answer_parts(key, options)]
        _side_by_side(parts, options, console)
    with progress(console) as reporter:
        for key in keys:
            made[key] = RUNNERS[scale](key, options, reporter)
    if scale == "pocket":
        _side_by_side([Part(key, "page") for key in keys], options, console)
        relink(folder_of(keys[0], scale).parents[1])
    print_summary(made, scale, time.monotonic() - started, console)
    return [folder_of(key, scale) for key in keys]


def _from_now_on(options: Options) -> Options:
    """Forced runs, too, are shared, and made once by all steps together."""
    return replace(options, since=datetime.now(UTC).replace(microsecond=0))


def answer_parts(key: str, options: Options) -> list[Part]:
    """What of a paper can be done beside other work.

    By benchmark its tables, those of other models first (they take longest); then its analysis.
    """
    paper = load_paper(key)
    table = paper.pocket_table
    names = [] if table is None else options.benchmarks or [column.id for column in table.columns]
    parts = [
        Part(key, "answers", name, table.id)
        for table in tables_beside(paper, options)
        for name in columns_beside(table, options)
    ]
    parts += [Part(key, "answers", name) for name in names]
    return [*parts, Part(key, "answers", last=True)] if study_of(key).analysis else parts


def do_part(options: Options, part: Part, reporter: Reporter) -> None:
    """One part of `reproduce_all`, in a process of its own: nothing in it measures time."""
    if part.step == "page":
        reporter.start(f"{part.paper}: page", 1)
        execute_paper_notebook(part.paper, options, folder_of(part.paper, "pocket"))
        reporter.advance(1)
        return
    if part.benchmark is not None:
        options = replace(options, benchmarks=(part.benchmark,))
    if part.table is not None:
        beside_runs(part.paper, part.table, options, reporter)
        return
    bench = Bench.of(part.paper, options, timed=False)
    if part.benchmark is not None:
        bench.answers(reporter)
    else:
        bench.analysis(reporter)


def _side_by_side(parts: Sequence[Part], options: Options, console: Console) -> None:
    with progress(console) as overall:
        reporters = [Bars(overall.bar) for _ in range(processes(options.device))]
        side_by_side(parts, partial(do_part, options), reporters, overall)
