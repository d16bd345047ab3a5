"""The cells of a table: every method of a plan on every benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import load_benchmark
from frugalvlm.methods import Method
from frugalvlm.study.records import Record
from frugalvlm.study.runs import Batches, Reporter, Setting, accuracy_run

__all__ = ["answer_cells"]


@lru_cache(maxsize=8)
def _batches(benchmark: str, processor: ProcessorMixin, split: str, n: int, device: str) -> Batches:
    """A benchmark's questions, prepared once for all papers."""
    return Batches(load_benchmark(benchmark), processor, split, n, device)


def answer_cells(
    setting: Setting,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    benchmarks: Sequence[str],
    plan: Sequence[tuple[Method, int]],
    reporter: Reporter,
) -> list[Record]:
    """Run, or find, the accuracy of every cell.

    Args:
        setting: what all runs of the table share.
        model: the untouched model.
        processor: of the model.
        benchmarks: ids, the columns.
        plan: methods and budgets, the rows.
        reporter: told of progress.

    Returns:
        The records, column by column.
    """
    made = []
    for name in benchmarks:
        batches = _batches(name, processor, setting.split, setting.n, setting.device)
        made += [
            accuracy_run(setting, model, load_benchmark(name), batches, method, budget, reporter)
            for method, budget in plan
        ]
    return made
