"""Every run that a paper's tables need, at each scale: made, or found among the records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm import measure
from frugalvlm.hosts import host_for
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.methods import Method, method_class
from frugalvlm.papers import Table, load_paper
from frugalvlm.reproduce.beside import beside_runs, tables_beside
from frugalvlm.runs import records
from frugalvlm.runs.accuracy import answer_cells
from frugalvlm.runs.attention import attention_run
from frugalvlm.runs.blueprint import blueprint, count
from frugalvlm.runs.efficiency import efficiency_run
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.layout import ScaleError, check_methods, plan_of, planned, pocket_table
from frugalvlm.runs.options import Options, folders_of, pocket_setting
from frugalvlm.runs.setting import Reporter, Setting, Silent
from frugalvlm.studies import study_of

__all__ = ["RUNNERS", "Bench", "run_blueprint", "run_pocket"]


@dataclass(frozen=True)
class Bench:
    """All that a paper's pocket runs need.

    Attributes:
        key: the paper.
        options: sizes and device.
        table: the one to rebuild; None for a paper that is its analysis alone.
        plan: methods and budgets of its rows.
        setting: what all runs share.
        model: the untouched model.
        processor: of the model.
    """

    key: str
    options: Options
    table: Table | None
    plan: list[tuple[Method, int]]
    setting: Setting
    model: PreTrainedModel
    processor: ProcessorMixin

    @staticmethod
    def of(key: str, options: Options, timed: bool = True) -> Bench:
        """Load what is needed; what is missing is said before anything starts.

        Args:
            key: the paper.
            options: sizes and device.
            timed: whether times may be measured (`Setting.timed`).
        """
        paper = load_paper(key)
        table = None if study_of(key).analysis and not paper.tables else pocket_table(paper)
        weights = model_hash(options.model, options.revision)
        model, processor = _loaded(options.model, options.revision, options.device, weights)
        setting = replace(pocket_setting(key, options, weights), timed=timed)
        plan = [] if table is None else plan_of(table, options, model, processor)
        return Bench(key, options, table, plan, setting, model, processor)

    def answers(self, reporter: Reporter) -> list[records.Record]:
        """Accuracy of every cell of the table."""
        if self.table is None:
            return []
        names = self.options.benchmarks or [column.id for column in self.table.columns]
        opened = self.setting, self.model, self.processor
        return answer_cells(*opened, names, self.plan, reporter)

    def analysis(self, reporter: Reporter) -> list[records.Record]:
        """What the paper's study measures beside the table."""
        analysis = study_of(self.key).analysis
        if analysis is None:
            return []
        return analysis(self.setting, self.model, self.processor, self.options, reporter)

    def costs(self, analysed: list[records.Record], reporter: Reporter) -> list[records.Record]:
        """The cost of the table's rows and of what is beside them, and the tower's attention."""
        if self.table is None:
            return []
        opened, options, costed = (
            (self.setting, self.model, self.processor),
            self.options,
            [*self.plan],
        )
        more = study_of(self.key).more_costs
        if more is not None:
            costed += [run for run in more(analysed, self.model) if run not in costed]
        return [
            efficiency_run(
                *opened, costed, reporter,
                repeats=options.repeats, energy_window_s=options.energy_window_s,
            ),
            attention_run(*opened, reporter, images=min(100, options.n)),
        ]  # fmt: skip


@lru_cache(maxsize=1)
def _loaded(
    name: str, revision: str | None, device: str, weights: str
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model, loaded once for all papers; `weights` (their hash) tells when they have changed."""
    return load_vlm(name, revision=revision, device=device)


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
    bench = Bench.of(key, options)
    made = bench.answers(reporter)
    analysed = bench.analysis(reporter)
    made += bench.costs(analysed, reporter) + analysed
    for table in tables_beside(load_paper(key), options):  # another model's; kept apart
        beside_runs(key, table.id, options, reporter)
    return made


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
    check_methods(table)
    places = [place / "records" for place in folders_of(key, "blueprint")]
    folder = places[0]
    records.clear_left_over(folder)
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
    kinds = (method_class(method) for _, method, *_ in cells)
    code = code_hash(
        "methods.schedules", "measure", "runs.costs", "runs.blueprint", "runs.layout", *kinds
    )
    more = study_of(key).blueprint
    beside = [] if more is None else more(folder)
    reporter.start("blueprint", len(cells))
    stem = records.record_name(request, code, measure.machine_id())
    for place in [] if options.force else places:
        found = records.find(place, "blueprint", request, code)
        if found is not None:
            if place != folder:
                records.write(folder / f"{stem}.json", found)
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
    records.write(folder / f"{stem}.json", record)
    return [record, *beside]


Runner = Callable[[str, Options | None, Reporter | None], list[records.Record]]
RUNNERS: Mapping[str, Runner] = {"pocket": run_pocket, "blueprint": run_blueprint}
