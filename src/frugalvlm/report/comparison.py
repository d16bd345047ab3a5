"""All recorded methods of all papers side by side, from records alone.

Only what belongs together is compared: one scale, model and weights, one split and number of
questions, one machine. What was left out, and which command would fill a gap, is said.

A *run* is a method with its hyper-parameters. Its place on the axis of tokens is the measured mean
over decoder layers, for papers mean different things by a budget. Differences are paired: the same
pictures are drawn for all runs. Within a block of a ranking (a paper's budget) the p-values of all
pairs are corrected by Holm's method; runs that share a letter cannot be told apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from frugalvlm.digest import request_hash
from frugalvlm.loading import model_hash
from frugalvlm.methods import CONTROLS
from frugalvlm.papers import all_papers
from frugalvlm.paths import command, notebooks_dir, result_file, results_places, work_dir
from frugalvlm.pocket.installed import WeightsError
from frugalvlm.report.comparison_runs import BASELINE, Run, family_of
from frugalvlm.report.display import facts_of, method_labels, setting_lines
from frugalvlm.report.notebooks import execute
from frugalvlm.report.pages import relink
from frugalvlm.runs import records as rec
from frugalvlm.runs.identity import other_code_line
from frugalvlm.runs.records import Record
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.ranking import SHOWN
from frugalvlm.verdicts.scored import Scored, SheetMaker

EQUAL_FLOPS = 1.01  # within one percent, FLOPs count as equal
NOTEBOOKS = ("accuracy", "efficiency", "emissions")

FRONT, CLOSE, DOMINATED = "on the front", "not told apart", "dominated"


class NothingRecordedError(rec.RecordError):
    """There is nothing to compare; the message names the command that makes records."""


class Comparison:
    """What is recorded of one setting, over all papers.

    Args:
        found: by paper its records, of any kind and setting.
        model: name of the model; "": decided as below.
        n: questions per benchmark; 0: decided as below.
        machine: id of the machine; "": decided as below.
        benchmarks: by id, for scoring; default: the kit's own.
        guard: which benchmarks may enter a mean; default: by the scores stored with the weights.

    Of the settings that are left, the one with the installed weights and the most accuracy records
    is taken, so that a small trial hides nothing.

    Attributes:
        setting: what all compared records share (`records.setting_of`).
        left_out: the other settings, and how many accuracy records have them.
        timed: paper and efficiency record, of those that share `clock`.
        clock: threads, batch size and rounds of most efficiency records.
        other_clocks: papers whose times were taken otherwise, and left out.
        guard: which benchmarks enter a mean.
        total: visual tokens of the untouched model.

    Raises:
        NothingRecordedError: no accuracy record of such a setting.
    """

    def __init__(
        self,
        found: Mapping[str, Sequence[Record]],
        *,
        model: str = "",
        n: int = 0,
        machine: str = "",
        benchmarks: Mapping[str, SheetMaker] | None = None,
        guard: Guard | None = None,
    ) -> None:
        known = [(p, r) for p, own in found.items() for r in rec.latest(own)]
        answered = [(p, r) for p, r in known if r["kind"] == "accuracy"]
        wanted = {"model": model, "n": n, "machine": machine}
        all_settings = [_frozen(rec.setting_of(r)) for _, r in answered]
        settings = Counter(
            s for s in all_settings if all(not v or dict(s)[k] == v for k, v in wanted.items())
        )
        if not settings:
            asked = ", ".join(f"{k} {v}" for k, v in wanted.items() if v)
            raise NothingRecordedError(
                f"Nothing is recorded{f' with {asked}' if asked else ' yet'}: run "
                f"`{command('reproduce --paper visionzip')}` or `{command('reproduce --all')}` "
                "first."
            )
        newest = {_frozen(rec.setting_of(r)): rec.created(r) for _, r in answered}
        chosen = max(settings, key=lambda s: (_installed(dict(s)), settings[s], newest[s]))
        self.setting = dict(chosen)
        self.left_out = {s: count for s, count in Counter(all_settings).items() if s != chosen}
        self._answered = [(p, r) for p, r in answered if _frozen(rec.setting_of(r)) == chosen]
        timed = [(p, r) for p, r in known if r["kind"] == "efficiency" and self._same(r)]
        clocks = Counter(_frozen(clock_of(r)) for _, r in timed)
        self.clock = dict(clocks.most_common(1)[0][0]) if clocks else {}
        self.timed = [(p, r) for p, r in timed if clock_of(r) == self.clock]
        self.other_clocks = [p for p, r in timed if clock_of(r) != self.clock]
        self._benchmarks = benchmarks
        baseline = [r for _, r in self._answered if rec.method_key(r) == BASELINE]
        scored = Scored(rec.latest(baseline), BASELINE, benchmarks, guard)
        self._baseline, self.guard, self.total = rec.latest(baseline), scored.guard, scored.total

    def _same(self, record: Record) -> bool:
        """Whether a cost record is of the compared model on the compared machine."""
        made, names = rec.setting_of(record), ("scale", "model", "model_hash", "machine", "dtype")
        return all(made[name] == self.setting[name] for name in names)

    # -- what there is ---------------------------------------------------------------------------

    @cached_property
    def benchmarks(self) -> list[str]:
        """The suite: benchmarks that the untouched model answered, in the order of the papers."""
        names = dict.fromkeys(
            column.id for paper in all_papers() for table in paper.tables
            if "pocket" in table.scales for column in table.columns
        )  # fmt: skip
        answered = {r["request"]["benchmark"] for r in self._baseline}
        return [name for name in names if name in answered]

    @cached_property
    def runs(self) -> list[Run]:
        """All runs but the untouched model, by tokens asked for, then by method."""
        grouped: dict[tuple[str, int], list[tuple[str, Record]]] = {}
        for paper, record in self._answered:
            request = record["request"]
            if rec.method_key(record) != BASELINE:
                key = request_hash(request["method"]), request["budget"]
                grouped.setdefault(key, []).append((paper, record))
        labels = method_labels()
        runs = []
        for (name, budget), own in grouped.items():
            method = own[-1][1]["request"]["method"]
            key = method["method"]
            records = [*self._baseline, *rec.latest(r for _, r in own)]
            runs.append(
                Run(
                    key, labels.get(key, key), family_of(key), budget, method,
                    tuple(dict.fromkeys(p for p, _ in own)),
                    Scored(records, BASELINE, self._benchmarks, self.guard),
                    self._costs.get(name),
                )
            )  # fmt: skip
        return sorted(runs, key=lambda run: (-run.budget, run.family, run.key))

    @property
    def whole(self) -> list[Run]:
        """The runs that answered the whole suite; only these have a mean over it."""
        return [run for run in self.runs if run.retention(self.benchmarks) is not None]

    @property
    def partial(self) -> list[Run]:
        """The others."""
        return [run for run in self.runs if run.retention(self.benchmarks) is None]

    @cached_property
    def untouched(self) -> Mapping[str, Any] | None:
        """Cost of the untouched model, from the newest efficiency record."""
        return self._costs.get(request_hash({"method": BASELINE}))

    @cached_property
    def _costs(self) -> dict[str, dict[str, Any]]:
        """By method description the newest row of an efficiency record, its paper and ratios."""
        rows = {}
        for paper, record in sorted(self.timed, key=lambda pair: rec.created(pair[1])):
            base = record["rows"][0]
            for asked, row in zip(record["request"]["methods"], record["rows"], strict=True):
                name = request_hash({k: v for k, v in asked.items() if k != "budget"})
                share = 100 * row["flops"] / base["flops"]
                rows[name] = {
                    **row, "paper": paper, "flops_share": share, "untouched": base,
                    "batch_size": record["request"]["batch_size"],
                }  # fmt: skip
        return rows

    def missing(self) -> pd.DataFrame:
        """Cells of the papers' pocket tables without a record here, with the command for them."""
        have = {(p, rec.method_key(r), r["request"]["budget"], r["request"]["benchmark"])
                for p, r in self._answered}  # fmt: skip
        timed = {p for p, _ in self.timed}
        lines = []
        for paper in all_papers():
            layout = paper.pocket_table
            if layout is None or paper.status["pocket"] == "planned":
                continue
            total = layout.model.pocket_tokens
            cells = {
                (paper.key, row.method, tokens, column.id)
                for row, budget in layout.lines() if row.method != layout.baseline
                for tokens in [budget.pocket_tokens if budget else total]
                for tokens in [0 if row.once == "none" else tokens]
                if tokens is not None
                for column in layout.columns
            }  # fmt: skip
            gaps = cells - have
            if gaps or paper.key not in timed:
                lines.append({
                    "paper": paper.key, "cells": len(cells), "missing": len(gaps),
                    "cost": "recorded" if paper.key in timed else "missing",
                    "command": command(f"reproduce --paper {paper.key}{self._arguments()}"),
                })  # fmt: skip
        return pd.DataFrame(lines, columns=["paper", "cells", "missing", "cost", "command"])

    def _arguments(self) -> str:
        n, model = self.setting["n"], self.setting["model"]
        return (f" -n {n}" if n != 300 else "") + (
            f" --model {model}" if model != "pocket-llava-base" else ""
        )

    # -- captions --------------------------------------------------------------------------------

    def caption(self) -> tuple[str, ...]:
        """What every table and figure here says first: setting, n, and what was left out."""
        newest = [r for _, r in self._answered][-1:]
        count = sum(len(r["answers"]) for r in self._baseline)
        return (
            *setting_lines(facts_of(newest, str(self.setting["scale"]), self.setting["n"])),
            f"n = {self.setting['n']} questions per benchmark, {count:,} on "
            f"{len(self.benchmarks)} benchmarks, the same for all runs; weights "
            f"{str(self.setting['model_hash'])[:12]}.",
            *self.guard.notes(self.benchmarks),
        )

    def title(self) -> str:
        """The same in a line, for figures."""
        s = self.setting
        return f"{s['scale']} scale, {s['model']}, n = {s['n']} questions per benchmark"

    def left_out_lines(self) -> list[str]:
        """Every setting whose records are not compared here, and in what it differs."""
        lines = []
        for frozen, count in self.left_out.items():
            own = dict(frozen)
            differs = {k: v for k, v in own.items() if v != self.setting[k]}
            what = ", ".join(f"{k} {str(v)[:12] if k == 'model_hash' else v}"
                             for k, v in differs.items())  # fmt: skip
            lines.append(f"{count} accuracy records with another setting ({what}).")
        if self.other_clocks:
            lines.append(f"Times of {', '.join(self.other_clocks)}: other threads or batches.")
        return lines

    def other_code_lines(self) -> list[str]:
        """One sentence if some of what is compared was made by other code than the kit has now."""
        known = [r for _, r in self._answered]
        line = other_code_line(known)
        return [line] if line else []

    # -- frames ----------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """One row per run: tokens, retention with interval (mean and per benchmark), costs."""
        return self._frame.copy()

    @cached_property
    def _frame(self) -> pd.DataFrame:
        return pd.DataFrame([run.numbers(self.benchmarks) for run in self.runs])

    def front(self) -> pd.DataFrame:
        """Runs with a mean and counted FLOPs, cheapest first, and their `state`.

        A run is on the front when no run of the same (within `EQUAL_FLOPS`) or less FLOPs scores
        higher. Others are
        dominated where such a run is better with its whole paired 95 % interval, and else cannot
        be told apart from the front. Intervals are not corrected for the number of pairs.
        """
        runs = [run for run in self.whole if run.cost is not None]
        lines = [run.numbers(self.benchmarks) for run in runs]
        draws = [run.draws(self.benchmarks) for run in runs]
        for i, line in enumerate(lines):
            cheaper = [j for j, other in enumerate(lines)
                       if j != i and other["flops"] <= EQUAL_FLOPS * line["flops"]]  # fmt: skip
            better = [j for j in cheaper if lines[j]["mean"] > line["mean"]]
            line["state"] = FRONT if not better else CLOSE
            for j in better:
                gap = np.subtract(draws[j], draws[i])[:SHOWN]  # type: ignore[arg-type]
                if np.quantile(gap, 0.025) > 0:
                    line["state"] = DOMINATED
        frame = pd.DataFrame(lines, columns=[*self.frame().columns, "state"])
        return frame.sort_values(["flops", "mean"], ascending=[True, False], ignore_index=True)

    def blocks(self) -> dict[tuple[str, int], list[Run]]:
        """By paper and its budget the runs on the whole suite, best first; one run is no block.

        Methods only: controls are no rivals in a ranking.
        """
        found: dict[tuple[str, int], list[Run]] = {}
        for run in self.whole:
            if run.key in CONTROLS:
                continue
            for paper in run.papers:
                found.setdefault((paper, run.budget), []).append(run)
        names = [paper.key for paper in all_papers()]
        order = sorted(found, key=lambda b: (names.index(b[0]), -b[1]))
        return {b: sorted(found[b], key=lambda r: -self.mean(r)) for b in order
                if len(found[b]) > 1}  # fmt: skip

    def mean(self, run: Run) -> float:
        """Mean retention of a run on the whole suite."""
        found = run.retention(self.benchmarks)
        assert found is not None
        return found.value


# -- helpers ---------------------------------------------------------------------------------------


def recorded(scale: str = "pocket", folder: Path | None = None) -> dict[str, list[Record]]:
    """By paper the records of a scale; studies of the benchmarks themselves are no methods.

    Args:
        scale: "pocket", "blueprint" or "full".
        folder: of results; default: the published ones and those of the work folder.
    """
    # The work folder's behind the published: of two that are alike the later one counts.
    places = [*reversed(results_places())] if folder is None else [folder]
    return {
        p.key: [r for place in places for r in rec.read_records(place / scale / p.key / "records")]
        for p in all_papers()
    }


def gather(model: str = "", n: int = 0, machine: str = "") -> Comparison:
    """The comparison of what was run here and of what is published; see `Comparison`."""
    return Comparison(recorded(), model=model, n=n, machine=machine)


def tax_rows(folder: Path | None = None) -> pd.DataFrame:
    """The methods' own tax on prefill, as `invoke bench` left it; empty without.

    Columns: model, method, kept, total, label, ratio, low, high, n.
    """
    file = "benchmark", "prefill_tax.json"
    path = result_file(*file) if folder is None else folder.joinpath(*file)
    if not path.is_file():
        return pd.DataFrame()
    labels = method_labels()
    return pd.DataFrame([
        {**{k: row[k] for k in ("model", "method", "kept", "total")},
         "label": labels.get(row["method"], row["method"]), "ratio": row["ratio"]["median"],
         "low": row["ratio"]["low"], "high": row["ratio"]["high"], "n": row["ratio"]["n"]}
        for row in rec.read_record(path)["rows"]
    ])  # fmt: skip


def build(parameters: Mapping[str, Any] | None = None) -> list[Path]:
    """Execute the comparison notebooks into compare/ of the work folder; returns their pages.

    Args:
        parameters: of the notebooks, which are those of `gather`: `model`, `n`, `machine`.

    Raises:
        NothingRecordedError: before anything is executed.
        NotebookError: a cell failed.
    """
    given = dict(parameters or {})
    gather(**given)
    source, target = notebooks_dir() / "compare", work_dir() / "compare"
    pages = [execute(source / f"{n}.ipynb", target / f"{n}.ipynb", given) for n in NOTEBOOKS]
    relink(work_dir())
    return pages


def _installed(setting: Mapping[str, Any]) -> bool:
    try:
        return model_hash(str(setting["model"])) == setting["model_hash"]
    except (WeightsError, OSError):
        return False


def _frozen(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


def clock_of(record: Record) -> dict[str, Any]:
    """How the times of an efficiency record were taken."""
    names = ("device", "threads", "batch_size", "repeats", "decode_steps")
    return {name: record["request"].get(name) for name in names}
