"""Reproducing a paper: every run that its tables need, its verdicts, its notebook."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from frugalvlm.benchmarks import load_benchmark
from frugalvlm.hosts import host_for
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.methods import Method, method_class
from frugalvlm.methods.schedules import at_mean
from frugalvlm.paths import results_dir
from frugalvlm.study import records
from frugalvlm.study.analyses import ANALYSES, BLUEPRINT_ANALYSES
from frugalvlm.study.analyses.sgl import with_guide
from frugalvlm.study.blueprint import blueprint, count
from frugalvlm.study.notebooks import execute_paper_notebook
from frugalvlm.study.papers import Paper, Table, load_paper
from frugalvlm.study.runs import (
    Batches,
    Reporter,
    Setting,
    Silent,
    accuracy_run,
    attention_run,
    budgeted,
    code_hash,
    efficiency_run,
)
from frugalvlm.views import Shape

POCKET_MODEL = "pocket-llava-base"
GUIDE_MODEL = "pocket-llava-small"
QUESTIONS = 300  # per benchmark, at the pocket scale


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
    """

    n: int = QUESTIONS
    benchmarks: tuple[str, ...] | None = None
    budgets: int | None = None
    model: str = POCKET_MODEL
    revision: str | None = None
    device: str = "cpu"
    force: bool = False
    repeats: int = 9
    energy_window_s: float = 2.0
    guide: str = GUIDE_MODEL


def folder_of(paper: str, scale: str) -> Path:
    """Where the results of a paper at a scale go."""
    return results_dir() / scale / paper


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
    paper = load_paper(key)
    # A paper without a table to rebuild is its analysis alone.
    table = None if key in ANALYSES and not paper.tables else pocket_table(paper)
    model, processor = load_vlm(options.model, revision=options.revision, device=options.device)
    setting = Setting(
        scale="pocket",
        model_name=options.model,
        model_hash=model_hash(options.model, options.revision),
        folder=folder_of(key, "pocket") / "records",
        n=options.n,
        device=options.device,
        force=options.force,
    )
    made = [] if table is None else _table_runs(table, setting, model, processor, options, reporter)
    if key in ANALYSES:
        made += ANALYSES[key](setting, model, processor, options, reporter)
    return made


def _table_runs(
    table: Table,
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    options: Options,
    reporter: Reporter,
) -> list[records.Record]:
    """Accuracy of every cell of a table, the cost of its rows, and the tower's attention."""
    shape = host_for(model).shape
    plan = [(planned(table, row, b, shape), b) for row, b in rows_of(table, options)]
    plan = with_guide(plan, options, processor)
    wanted = options.benchmarks or tuple(column.id for column in table.columns)
    made = []
    for name in wanted:
        benchmark = load_benchmark(name)
        batches = Batches(benchmark, processor, setting.split, setting.n, setting.device)
        for method, budget in plan:
            made.append(accuracy_run(setting, model, benchmark, batches, method, budget, reporter))
    made.append(
        efficiency_run(
            setting, model, processor, plan, reporter,
            repeats=options.repeats, energy_window_s=options.energy_window_s,
        )
    )  # fmt: skip
    made.append(attention_run(setting, model, processor, reporter, images=min(100, options.n)))
    return made


def pocket_table(paper: Paper) -> Table:
    """The paper's first table with a pocket counterpart.

    Raises:
        ScaleError: when there is none; the message lists the papers that have one.
    """
    for table in paper.tables:
        if "pocket" in table.scales:
            return table
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

    Args:
        key: the paper.
        scale: "pocket", "blueprint" or "full".
        options: sizes and device.
        console: where tables and progress go.

    Returns:
        The folder of the results.

    Raises:
        UnknownPaperError, ScaleError, WeightsError: each with the remedy.
    """
    from frugalvlm.study.report import print_report

    options, console = options or Options(), console or Console()
    paper = load_paper(key)
    if scale == "full":
        _full(paper, options)
    if scale not in RUNNERS:
        raise ScaleError(f"Unknown scale '{scale}': pocket, blueprint or full.")
    with progress(console) as reporter:
        made = RUNNERS[scale](key, options, reporter)
    print_report(paper, scale, made, console)
    folder = folder_of(key, scale)
    if scale == "pocket":
        page = execute_paper_notebook(key, options, folder)
        console.print(f"Executed notebook: {page.with_suffix('.ipynb')}\nPage:              {page}")
    return folder


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
def progress(console: Console) -> Iterator[Reporter]:
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
