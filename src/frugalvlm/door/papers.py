"""A paper's own pocket table: every run that it needs, made or found among the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.door.beside import beside_runs, tables_beside
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.methods import Method
from frugalvlm.papers import Table, load_paper
from frugalvlm.runs import records
from frugalvlm.runs.accuracy import answer_cells
from frugalvlm.runs.attention import attention_run
from frugalvlm.runs.efficiency import efficiency_run
from frugalvlm.runs.layout import Skipped, pocket_table, possible_plan
from frugalvlm.runs.options import Options, pocket_setting
from frugalvlm.runs.setting import Reporter, Setting, Silent
from frugalvlm.studies import study_of

__all__ = ["Bench", "open_model", "run_pocket"]


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
        skipped: rows that the model cannot serve.
    """

    key: str
    options: Options
    table: Table | None
    plan: list[tuple[Method, int]]
    setting: Setting
    model: PreTrainedModel
    processor: ProcessorMixin
    skipped: Sequence[Skipped] = ()

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
        model, processor = open_model(options.model, options.revision, options.device, weights)
        setting = replace(pocket_setting(key, options, weights), timed=timed)
        plan, skipped = (
            ([], []) if table is None else possible_plan(table, options, model, processor)
        )
        return Bench(key, options, table, plan, setting, model, processor, skipped)

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
def open_model(
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
