"""A paper's pocket tables about other pictures than the main one's: tiles, or clips.

Another embedded model answers them. A table holds records of one model, so these lie in a folder of
their own, `results/pocket/KEY/MODEL/records`.
"""

from __future__ import annotations

from dataclasses import replace

from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.papers import Paper, Table, load_paper
from frugalvlm.pocket.installed import models_dir
from frugalvlm.runs.accuracy import answer_cells
from frugalvlm.runs.layout import plan_of
from frugalvlm.runs.options import POCKET_MODEL, Options, pocket_setting
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Silent


def tables_beside(paper: Paper, options: Options) -> list[Table]:
    """The tables that another embedded model answers.

    None beside another than the default model, nor such whose model is not installed.
    """
    if options.model != POCKET_MODEL:
        return []
    return [t for t in paper.tables if t.pocket_model and (models_dir() / t.pocket_model).is_dir()]


def columns_beside(table: Table, options: Options) -> list[str]:
    """Ids of the benchmarks to run: those asked for, by their ids here or in the main table."""
    asked = set(options.benchmarks or ())
    return [
        column.id
        for column in table.columns
        if not asked or asked & {column.id, column.id.removesuffix("-hd")}
    ]


def beside_runs(
    key: str, table_id: str, options: Options, reporter: Reporter | None = None
) -> list[Record]:
    """Run, or find, the accuracy of every cell of such a table.

    Prompts are longer than in the main table; half as many questions are asked.

    Args:
        key: the paper.
        table_id: which of its layouts.
        options: as for the paper's main table; for its benchmarks see `columns_beside`.
        reporter: told of progress.

    Returns:
        The records, in the order of the table; none where `tables_beside` leaves it out.
    """
    paper = load_paper(key)
    table = next((t for t in tables_beside(paper, options) if t.id == table_id), None)
    if table is None or table.pocket_model is None:
        return []
    columns = columns_beside(table, options)
    if not columns:
        return []
    name, reporter = table.pocket_model, reporter or Silent()
    model, processor = load_vlm(name, device=options.device)
    own = replace(options, model=name, n=-(-options.n // 2))
    setting = pocket_setting(key, own, model_hash(name), beside=name)
    plan = plan_of(table, own, model, processor)
    return answer_cells(setting, model, processor, columns, plan, reporter)
