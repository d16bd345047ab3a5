"""Reproducing a paper: every run that its tables need, its verdicts, its notebook."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm import measure
from frugalvlm.hosts import host_for
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.methods import Method, method_class
from frugalvlm.methods.schedules import at_mean
from frugalvlm.paths import results_dir
from frugalvlm.study import records
from frugalvlm.study.analyses import ANALYSES, BLUEPRINT_ANALYSES, MORE_COSTS
from frugalvlm.study.analyses.sgl import with_guide
from frugalvlm.study.beside import beside_runs, columns_beside, tables_beside
from frugalvlm.study.blueprint import blueprint, count
from frugalvlm.study.cells import answer_cells
from frugalvlm.study.notebooks import execute_paper_notebook
from frugalvlm.study.papers import KEYS, Paper, Table, all_papers, load_paper
from frugalvlm.study.runs import (
    Reporter,
    Setting,
    Silent,
    attention_run,
    budgeted,
    code_hash,
    efficiency_run,
)
from frugalvlm.study.side_by_side import Part, processes, side_by_side
from frugalvlm.views import Shape

POCKET_MODEL = "pocket-llava-base"
GUIDE_MODEL = "pocket-llava-small"
QUESTIONS = 300  # per benchmark, at the pocket scale
# Where all papers run, within half an hour on two cores: fewer questions, shorter measurements.
QUICK: dict[str, Any] = {"n": 100, "repeats": 5, "energy_window_s": 0.5}


class ScaleError(ValueError):
    """A scale or a paper that cannot be reproduced here; the message says what can."""


@dataclass(frozen=True)
class Options:
    """What a reproduction may be told.

    Attributes:
        n: questions per benchmark.
        benchmarks: ids of the benchmarks to run; None: all of the table.
        budgets: how many of the table's budgets to run, the first ones; None: all.
        model: model name, folder or Hub id.
        revision: of a Hub model.
        device: "cpu" or "cuda".
        force: run again although complete records exist.
        repeats: rounds of the latency measurement.
        energy_window_s: length of a modelled energy window, per method.
        guide: small model of the methods that need one: name, folder or Hub id.
        since: with `force`, records made from this moment on count all the same.
    """

    n: int = QUESTIONS
    benchmarks: tuple[str, ...] | None = None
    budgets: int | None = None
    model: str = POCKET_MODEL
    revision: str | None = None
    device: str = "cpu"
    force: bool = False
    repeats: int = 9
    energy_window_s: float = 1.0
    guide: str = GUIDE_MODEL
    since: datetime | None = None


def folder_of(paper: str, scale: str) -> Path:
    """Where the results of a paper at a scale go."""
    return results_dir() / scale / paper


def pocket_setting(key: str, options: Options, weights: str, beside: str = "") -> Setting:
    """What all runs of a paper's pocket table share.

    Args:
        key: the paper.
        options: of this table: its model, its number of questions.
        weights: hash of the model's weights.
        beside: folder of another table than the main one, in the paper's own.
    """
    folders = {paper: folder_of(paper, "pocket") / beside / "records" for paper in KEYS}
    return Setting(
        scale="pocket",
        model_name=options.model,
        model_hash=weights,
        folder=folders.pop(key),
        n=options.n,
        device=options.device,
        force=options.force,
        since=options.since,
        others=tuple(folders.values()),
    )


def run_pocket(
    key: str, options: Options | None = None, reporter: Reporter | None = None
) -> list[records.Record]:
    """Run, or find, every record that a paper's pocket tables need.

    Args:
        key: the paper.
        options: sizes and device.
        reporter: told of progress.

    Returns:
        The records, in the order of the table.
    """
    options, reporter = options or Options(), reporter or Silent()
    bench = _bench(key, options)
    made, analysed, costed = _answers(bench, options, reporter), [], list(bench.plan)
    if key in ANALYSES:
        analysed = ANALYSES[key](bench.setting, bench.model, bench.processor, options, reporter)
    if key in MORE_COSTS:
        more = MORE_COSTS[key](analysed, bench.model)
        costed += [run for run in more if run not in costed]
    made += _costs(bench, costed, options, reporter) + analysed
    for table in tables_beside(load_paper(key), options):  # another model's; kept apart
        beside_runs(key, table.id, options, reporter)
    return made


@dataclass(frozen=True)
class _Bench:
    """All that a paper's pocket runs need.

    Attributes:
        table: the one to rebuild; None for a paper that is its analysis alone.
        plan: methods and budgets of its rows.
        setting: what all runs share.
        model: the untouched model.
        processor: of the model.
    """

    table: Table | None
    plan: list[tuple[Method, int]]
    setting: Setting
    model: PreTrainedModel
    processor: ProcessorMixin


def _bench(key: str, options: Options, timed: bool = True) -> _Bench:
    paper = load_paper(key)
    table = None if key in ANALYSES and not paper.tables else pocket_table(paper)
    weights = model_hash(options.model, options.revision)
    model, processor = _loaded(options.model, options.revision, options.device, weights)
    setting = replace(pocket_setting(key, options, weights), timed=timed)
    plan: list[tuple[Method, int]] = []
    if table is not None:
        plan = with_guide(plan_of(table, options, model), options, processor)
    return _Bench(table, plan, setting, model, processor)


@lru_cache(maxsize=1)
def _loaded(
    name: str, revision: str | None, device: str, weights: str
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model, loaded once for all papers; `weights` (their hash) tells when they have changed."""
    return load_vlm(name, revision=revision, device=device)


def _answers(bench: _Bench, options: Options, reporter: Reporter) -> list[records.Record]:
    """Accuracy of every cell of the table."""
    if bench.table is None:
        return []
    names = options.benchmarks or [column.id for column in bench.table.columns]
    opened = bench.setting, bench.model, bench.processor
    return answer_cells(*opened, names, bench.plan, reporter)


def _costs(
    bench: _Bench, costed: list[tuple[Method, int]], options: Options, reporter: Reporter
) -> list[records.Record]:
    """The cost of the table's rows and of what is beside them, and the tower's attention."""
    if bench.table is None:
        return []
    opened = bench.setting, bench.model, bench.processor
    return [
        efficiency_run(
            *opened, costed, reporter,
            repeats=options.repeats, energy_window_s=options.energy_window_s,
        ),
        attention_run(*opened, reporter, images=min(100, options.n)),
    ]  # fmt: skip


def pocket_table(paper: Paper) -> Table:
    """The paper's first table with a pocket counterpart.

    Raises:
        ScaleError: when there is none; the message lists the papers that have one.
    """
    if paper.pocket_table is not None:
        return paper.pocket_table
    raise ScaleError(
        f"The tables of '{paper.key}' are not reproduced at the pocket scale yet; "
        "`invoke papers` shows which papers are."
    )


def rows_of(table: Table, options: Options) -> list[tuple[str, int]]:
    """Method and budget of every row: the baseline first, then budget by budget."""
    tokens = table.model.pocket_tokens
    if tokens is None:
        raise ScaleError(f"Table '{table.id}' has no pocket budgets.")
    budgets = [b.pocket_tokens for b in table.budgets if b.pocket_tokens is not None]
    others = [row.method for row in table.rows if row.method != table.baseline]
    return [
        (table.baseline, tokens),
        *((method, budget) for budget in budgets[: options.budgets] for method in others),
    ]


def plan_of(table: Table, options: Options, model: PreTrainedModel) -> list[tuple[Method, int]]:
    """Method and budget of every row, for a model."""
    shape = host_for(model).shape
    return [(planned(table, key, b, shape), b) for key, b in rows_of(table, options)]


def planned(table: Table, key: str, budget: int, shape: Shape) -> Method:
    """A row's method at a budget of its table: the method's own, or a mean over decoder layers."""
    if table.mean_budgets:
        return at_mean(method_class(key), budget, shape.patches, shape.decoder_layers)
    return budgeted(key, budget, shape.patches)


def run_blueprint(
    key: str, options: Options | None = None, reporter: Reporter | None = None
) -> list[records.Record]:
    """Count, or find, a paper's costs on its own architectures; one record, and what is beside it.

    Raises:
        ScaleError: when the paper has no table of this scale yet.
    """
    options, reporter = options or Options(), reporter or Silent()
    table = next((t for t in load_paper(key).tables if t.id == "blueprint"), None)
    if table is None:
        raise ScaleError(
            f"The costs of '{key}' are not counted at the blueprint scale yet; "
            "`invoke papers` shows which papers are."
        )
    folder = folder_of(key, "blueprint") / "records"
    cells = [
        (layout.name, row.method, budget.paper_tokens if budget else layout.tokens,
         (budget.per_crop or budget.paper_tokens) if budget else layout.tokens // layout.crops)
        for layout in table.models
        for budget in (None, *layout.budgets)
        for row in table.rows
        if (row.method == table.baseline) == (budget is None)
    ]  # fmt: skip
    request: dict[str, Any] = {
        "scale": "blueprint",
        "model": "blueprint",
        "cells": cells,
        "dtype": "bfloat16",
    }
    if table.mean_budgets:
        request["mean_budgets"] = True
    code = code_hash("methods", "measure", "study/costs.py", "study/blueprint.py")
    beside = BLUEPRINT_ANALYSES[key](folder) if key in BLUEPRINT_ANALYSES else []
    reporter.start("blueprint", len(cells))
    found = None if options.force else records.find(folder, "blueprint", request, code)
    if found is not None:
        reporter.advance(len(cells))
        return [found, *beside]
    started, rows, model, name = time.monotonic(), [], None, ""
    for layout, method, tokens, per_crop in cells:
        if model is None or layout != name:
            model, name = blueprint(layout).build(), layout
        own = planned(table, method, per_crop, host_for(model).shape)
        rows.append(count(model, layout, own, tokens))
        reporter.advance(1)
    record = {
        "kind": "blueprint", "status": "complete", "request": request, "rows": rows,
        "provenance": records.provenance(code=code, seconds=time.monotonic() - started),
    }  # fmt: skip
    stem = records.record_name(request, code, measure.machine_id())
    records.write(folder / f"{stem}.json", record)
    return [record, *beside]


def reproduce(
    key: str, scale: str = "pocket", options: Options | None = None, console: Console | None = None
) -> Path:
    """Everything behind `invoke reproduce`: runs, tables, verdicts, notebook, page.

    At the pocket scale answers come first, benchmarks side by side, one process per core; what is
    measured runs alone on the machine.

    Args:
        key: the paper.
        scale: "pocket", "blueprint" or "full".
        options: sizes and device.
        console: where tables and progress go.

    Returns:
        The folder of the results.

    Raises:
        UnknownPaperError, ScaleError, WeightsError, LostProcessError: each with the remedy.
    """
    from frugalvlm.study.report import print_report

    options, console = options or Options(), console or Console()
    paper = load_paper(key)
    if scale == "full":
        _full(paper, options)
    if scale not in RUNNERS:
        raise ScaleError(f"Unknown scale '{scale}': pocket, blueprint or full.")
    if scale == "pocket":
        _bench(key, options)  # what is missing is said before anything starts
        options = _from_now_on(options)
        _side_by_side(answer_parts(key, options), options, console)
    with progress(console) as reporter:
        made = RUNNERS[scale](key, options, reporter)
    print_report(paper, scale, made, console)
    folder = folder_of(key, scale)
    if scale == "pocket":
        page = execute_paper_notebook(key, options, folder)
        console.print(f"Executed notebook: {page.with_suffix('.ipynb')}\nPage:              {page}")
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
    from frugalvlm.study.report import print_summary

    options, console = options or Options(), console or Console()
    options = _from_now_on(options)
    keys, made, started = runnable(scale), {}, time.monotonic()
    if scale == "pocket":
        parts = [part for key in keys for part in answer_parts(key, options)]
        _side_by_side(parts, options, console)
    with progress(console) as reporter:
        for key in keys:
            made[key] = RUNNERS[scale](key, options, reporter)
    if scale == "pocket":
        _side_by_side([Part(key, "page") for key in keys], options, console)
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
    return [*parts, Part(key, "answers", last=True)] if key in ANALYSES else parts


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
    bench = _bench(part.paper, options, timed=False)
    if part.benchmark is not None:
        _answers(bench, options, reporter)
    else:
        ANALYSES[part.paper](bench.setting, bench.model, bench.processor, options, reporter)


def _side_by_side(parts: Sequence[Part], options: Options, console: Console) -> None:
    with progress(console) as overall:
        reporters = [_Bars(overall.bar) for _ in range(processes(options.device))]
        side_by_side(parts, partial(do_part, options), reporters, overall)


RUNNERS = {"pocket": run_pocket, "blueprint": run_blueprint}


def _full(paper: Paper, options: Options) -> None:
    """The full scale: real checkpoints load by Hub id, folder or revision.

    Raises:
        WeightsError: weights are not here; says what to fetch and what they need.
        ScaleError: weights are here, but the official benchmarks are not part of this version.
    """
    hub = options.model
    if hub == POCKET_MODEL:
        alone = paper.key in ANALYSES and not paper.tables
        hub = "llava-hf/llava-1.5-7b-hf" if alone else pocket_table(paper).model.hub
    if options.device == "cpu" and torch.cuda.is_available():
        options = Options(**{**vars(options), "device": "cuda"})
    load_vlm(hub, revision=options.revision, device=options.device)
    raise ScaleError(
        f"{hub} loads, but the official benchmarks are not wired up yet; use the model with the "
        "methods directly (see README, 'Use a method'), or --scale pocket."
    )


@contextmanager
def progress(console: Console) -> Iterator[_Bars]:
    """Progress bars on a terminal: one for the whole, one for the run under way."""
    bar = Progress(
        TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    with bar:
        yield _Bars(bar)


class _Bars:
    """A `Reporter` over rich's progress display: the run under way, finished ones vanish."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.task: Any = None

    def start(self, description: str, total: int) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(description, total=total)

    def advance(self, steps: int) -> None:
        self.bar.advance(self.task, steps)
