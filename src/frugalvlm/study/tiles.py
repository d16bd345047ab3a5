"""A paper's table about pictures in tiles, with the embedded model that sees five crops.

A table holds records of one model, so these lie in a folder of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from frugalvlm.benchmarks import load_benchmark
from frugalvlm.hosts import host_for
from frugalvlm.loading import load_vlm, model_hash, models_dir
from frugalvlm.study.papers import KEYS, load_paper
from frugalvlm.study.records import Record
from frugalvlm.study.runs import Batches, Reporter, Setting, Silent, accuracy_run

if TYPE_CHECKING:
    from frugalvlm.study.reproduce import Options

MODEL, LAYOUT = "pocket-llava-hd", "tiles"


def tiled_runs(key: str, options: Options, reporter: Reporter | None = None) -> list[Record]:
    """Run, or find, the accuracy of every cell of a paper's layout "tiles".

    Prompts are five times as long as in the main table; half as many questions are asked.

    Args:
        key: the paper.
        options: as for the paper's main table; benchmarks by their ids there (without "-hd").
        reporter: told of progress.

    Returns:
        The records, in the order of the table; none beside another than the default model, or where
        the model of this table is not installed.
    """
    from frugalvlm.study import reproduce  # it calls the analyses, which call this

    if options.model != reproduce.POCKET_MODEL or not (models_dir() / MODEL).is_dir():
        return []
    table, reporter = load_paper(key).table(LAYOUT), reporter or Silent()
    model, processor = load_vlm(MODEL, device=options.device)
    setting = Setting(
        scale="pocket",
        model_name=MODEL,
        model_hash=model_hash(MODEL),
        folder=reproduce.folder_of(key, "pocket") / MODEL / "records",
        n=-(-options.n // 2),
        device=options.device,
        force=options.force,
        since=options.since,
        others=tuple(
            reproduce.folder_of(other, "pocket") / MODEL / "records"
            for other in KEYS
            if other != key
        ),
    )
    shape, made = host_for(model).shape, []
    rows = reproduce.rows_of(table, options)
    plan = [(reproduce.planned(table, name, budget, shape), budget) for name, budget in rows]
    for column in table.columns:
        if options.benchmarks and column.id.removesuffix("-hd") not in options.benchmarks:
            continue
        benchmark = load_benchmark(column.id)
        batches = Batches(benchmark, processor, setting.split, setting.n, setting.device)
        made += [
            accuracy_run(setting, model, benchmark, batches, method, budget, reporter)
            for method, budget in plan
        ]
    return made
