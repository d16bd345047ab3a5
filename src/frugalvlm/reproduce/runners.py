"""Every run that a paper's tables need, at each scale: made, or found among the records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from frugalvlm import measure
from frugalvlm.door.papers import Bench, run_pocket
from frugalvlm.hosts import host_for
from frugalvlm.methods import method_class
from frugalvlm.papers import Budget, LayoutModel, Row, load_paper
from frugalvlm.paths import command
from frugalvlm.runs import records
from frugalvlm.runs.blueprint import blueprint, count
from frugalvlm.runs.identity import code_hash
from frugalvlm.runs.layout import ScaleError, check_methods, planned
from frugalvlm.runs.options import Options, folders_of
from frugalvlm.runs.setting import Reporter, Silent
from frugalvlm.studies import study_of

__all__ = ["RUNNERS", "Bench", "run_blueprint", "run_pocket"]


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
            f"`{command('papers')}` shows which papers are."
        )
    check_methods(table)
    places = [place / "records" for place in folders_of(key, "blueprint")]
    folder = places[0]
    records.clear_left_over(folder)
    rows_at = [(layout, *line) for layout in table.models for line in table.lines(layout)]
    cells = [(layout.name, row.method, *_tokens(layout, row, budget))
             for layout, row, budget in rows_at]  # fmt: skip
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
    for (layout, row, budget), (_, _, tokens, per_crop) in zip(rows_at, cells, strict=True):
        if model is None or layout.name != name:
            model, name = blueprint(layout.name).build(), layout.name
        own = planned(table, row, budget, per_crop, host_for(model).shape)
        rows.append(count(model, name, own, tokens))
        reporter.advance(1)
    record = {
        "kind": "blueprint", "status": "complete", "request": request, "rows": rows,
        "provenance": records.provenance(code=code, seconds=time.monotonic() - started),
    }  # fmt: skip
    records.write(folder / f"{stem}.json", record)
    return [record, *beside]


def _tokens(model: LayoutModel, row: Row, budget: Budget | None) -> tuple[int, int]:
    """Visual tokens that a row asks for: as the paper counts them, and per crop."""
    if budget is not None:
        return budget.paper_tokens, budget.per_crop or budget.paper_tokens
    return (0, 0) if row.once == "none" else (model.tokens, model.tokens // model.crops)


Runner = Callable[[str, Options | None, Reporter | None], list[records.Record]]
RUNNERS: Mapping[str, Runner] = {"pocket": run_pocket, "blueprint": run_blueprint}
