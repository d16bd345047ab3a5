"""Do the pocket benchmarks tell methods apart?

A suite on which a random choice of visual tokens is as good as any is of no use. So four choices
are compared at the same budgets: random, a uniform grid, a downsampled image, and an oracle that
keeps the patches of the asked-for things; beside them the untouched model, with the picture and
with a blank one. The score is the mean score of the questions in percent (for yes-or-no questions:
chance is 50), so that one scale holds for all benchmarks. Intervals are paired, over pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks import BENCHMARKS, load_benchmark, stats
from frugalvlm.benchmarks.asking import Batches
from frugalvlm.benchmarks.base import Sheet, mean_sheet
from frugalvlm.checks import check_wholes
from frugalvlm.engine.tower_once import tower_once
from frugalvlm.formats import NONE_PRINTED, between, plus_minus
from frugalvlm.hosts import host_for
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.methods import Blank, Vanilla
from frugalvlm.probes.controls import oracle_for
from frugalvlm.report.display import Block, Cell, Table, facts_of, setting_lines
from frugalvlm.runs.accuracy import accuracy_run
from frugalvlm.runs.layout import budgeted
from frugalvlm.runs.options import POCKET_MODEL, QUESTIONS, Options, folders_of
from frugalvlm.runs.records import Record, RecordError, method_key, select
from frugalvlm.runs.setting import Reporter, Setting, Silent
from frugalvlm.verdicts.scored import question_rows

__all__ = ["BUDGETS", "GOALS", "LABELS", "Goal", "accuracies", "accuracy_sheet", "blank_table",
           "discrimination_table", "goals", "opened", "run"]  # fmt: skip

BUDGETS = (72, 48, 32, 16, 8)  # of 144 visual tokens
CHOICES = ("random", "uniform", "downsample")  # the oracle comes last
LABELS = {
    "vanilla": "untouched",
    "blank": "blank picture",
    "random": "random",
    "uniform": "uniform grid",
    "downsample": "downsampled image",
    "oracle": "oracle",
}


@dataclass(frozen=True)
class Goal:
    """What the suite is meant to reach: `better` beats random by `points` at `tokens`."""

    better: str
    points: float
    tokens: int = 16
    benchmarks: int = 4  # on at least so many


GOALS = (Goal("oracle", 20.0), Goal("vanilla", 15.0))


def run(
    model_name: str = POCKET_MODEL,
    n: int = QUESTIONS,
    device: str = "cpu",
    *,
    split: str = "test",
    benchmarks: Sequence[str] = (),
    budgets: Sequence[int] = BUDGETS,
    force: bool = False,
    reporter: Reporter | None = None,
) -> list[Record]:
    """Run, or find under results/pocket/benchmarks, all records of the comparison.

    Args:
        model_name: embedded model, or a folder with one.
        n: questions per benchmark.
        device: "cpu" or "cuda".
        split: "dev" or "test".
        benchmarks: ids; none: all.
        budgets: visual tokens kept.
        force: run again although complete records exist.
        reporter: told of progress.

    Raises:
        OptionError: for a value that an argument cannot have.
        BudgetError: for a budget that the model cannot keep.
        WeightsError: when there is no such model.
    """
    Options(n, tuple(benchmarks) or None, model=model_name, device=device, force=force)
    budgets = check_wholes("budgets", budgets)
    model, processor, setting = opened(model_name, n, device, split, force)
    shape, reporter = host_for(model).shape, reporter or Silent()
    made = []
    for name in benchmarks or BENCHMARKS:
        benchmark = load_benchmark(name)
        batches = Batches(benchmark, processor, split, n, device)
        go = partial(accuracy_run, setting, model, benchmark, reporter=reporter)
        with tower_once(model):
            made.append(go(batches=batches, method=Vanilla(), budget=shape.patches))
            made.append(go(batches=batches, method=Blank(), budget=shape.patches))
            for budget in budgets:
                for key in CHOICES:
                    method = budgeted(key, budget, shape.patches)
                    made.append(go(batches=batches, method=method, budget=budget))
                oracle = oracle_for(batches, split, shape.grid, budget)
                any_of_it = oracle(batches.batches[0][0])
                made.append(go(batches=batches, method=any_of_it, budget=budget, method_for=oracle))
    return made


def opened(
    model_name: str, n: int, device: str, split: str, force: bool
) -> tuple[PreTrainedModel, ProcessorMixin, Setting]:
    """A loaded model, and the setting of all runs about it and the benchmarks."""
    model, processor = load_vlm(model_name, device=device)
    own, *published = [folder / "records" for folder in folders_of("benchmarks", "pocket")]
    setting = Setting(
        scale="pocket",
        model_name=model_name,
        model_hash=model_hash(model_name),
        folder=own,
        split=split,
        n=n,
        device=device,
        force=force,
        others=tuple(published),
    )
    return model, processor, setting


def accuracy_sheet(record: Record) -> Sheet:
    """A record's answers by the mean score of the questions, in percent.

    Raises:
        RecordError: when the record is about other questions than the kit asks now.
    """
    request = record["request"]
    rows, data_hash = question_rows(request["benchmark"], request["split"], request["n"])
    if record["provenance"].get("data_hash") != data_hash:
        raise RecordError(
            f"The record of {method_key(record)} answers other questions than "
            f"{request['benchmark']} asks now: run it again."
        )
    sheet = load_benchmark(request["benchmark"]).sheet(rows, [a for _, a in record["answers"]])
    return mean_sheet(rows, sheet.correct.tolist())


def accuracies(records: Iterable[Record], sheet: Callable[[Record], Sheet] = accuracy_sheet
               ) -> pd.DataFrame:  # fmt: skip
    """Accuracy of every record, and what it has over random at the same budget (paired).

    Args:
        records: what `run` returned.
        sheet: how a record is scored.

    Returns:
        One row per benchmark, method and budget: `tokens` (mean over layers), `accuracy`, `low`,
        `high`, `n`, `images`; `over_random` with `over_low` and `over_high`, in points, where
        random was run. The untouched model and the blank picture have a row per budget.
    """
    records = [r for r in records if r["kind"] == "accuracy" and method_key(r) in LABELS]
    lines = []
    for name in dict.fromkeys(r["request"]["benchmark"] for r in records):
        own = select(records, benchmark=name)
        sheets = {(method_key(r), r["request"]["budget"]): sheet(r) for r in own}
        tokens = {(method_key(r), r["request"]["budget"]): r["tokens"]["per_layer"] for r in own}
        total = max(budget for _, budget in sheets)
        budgets = sorted({budget for _, budget in sheets}, reverse=True)
        for budget in budgets:
            for key in LABELS:
                at = (key, total if key in ("vanilla", "blank") else budget)
                if at not in sheets:
                    continue
                score, layers = stats.interval(sheets[at]), tokens[at]
                line = {
                    "benchmark": name, "method": key, "budget": budget,
                    "tokens": sum(layers) / len(layers), "accuracy": score.value,
                    "low": score.low, "high": score.high,
                    "n": score.n_questions, "images": score.n_images,
                }  # fmt: skip
                random = sheets.get(("random", budget))
                if random is not None and key != "random":
                    gap = stats.paired_difference(sheets[at], random)
                    line |= {"over_random": gap.value, "over_low": gap.low, "over_high": gap.high}
                lines.append(line)
    return pd.DataFrame(lines)


def discrimination_table(records: Sequence[Record], frame: pd.DataFrame | None = None) -> Table:
    """Accuracy by budget and choice, and what the oracle and the untouched model have over random.

    Args:
        records: what `run` returned.
        frame: what `accuracies` made of them.
    """
    frame = accuracies(records) if frame is None else frame
    names = list(dict.fromkeys(frame["benchmark"]))
    total = int(frame["budget"].max())
    blocks = []
    for budget in sorted(set(frame["budget"]) - {total}, reverse=True):
        at = frame[frame["budget"] == budget]
        rows = [
            _row(label, at[at["method"] == key], names, ("accuracy", "low", "high"))
            for key, label in LABELS.items()
            if key not in ("vanilla", "blank")
        ]
        rows += [
            _row(f"{LABELS[key]} − random", at[at["method"] == key], names,
                 ("over_random", "over_low", "over_high"))
            for key in ("oracle", "vanilla")
        ]  # fmt: skip
        heading = f"{budget} of {total} visual tokens ({100 * budget / total:.1f} %)"
        blocks.append(Block(heading, tuple(rows)))
    facts = facts_of(list(records), "pocket", int(frame["n"].max()))
    note = (
        "Mean score of the questions in percent, ± half its 95 % bootstrap interval over pictures; "
        "differences in points, on the same questions. The oracle knows which things are asked for."
    )
    spare = frame[(frame["tokens"] - frame["budget"]).abs().gt(0.01) & frame["over_random"].notna()
                  & ~frame["method"].isin(["vanilla", "blank"])]  # fmt: skip
    other = "; ".join(
        f"{LABELS[m]} keeps {t:g} at {b}"
        for m, b, t in spare[["method", "budget", "tokens"]].drop_duplicates().to_numpy()
    )
    return Table(
        title="Which patches are kept, and what it is worth",
        headers=("choice", *_headers(frame, names)),
        blocks=tuple(blocks),
        caption=(*setting_lines(facts), note, *([f"{other}."] if other else [])),
        data=frame,
        facts=facts,
    )


def blank_table(records: Sequence[Record], frame: pd.DataFrame | None = None) -> Table:
    """What the picture is worth: the untouched model with the pictures and with blank ones.

    Arguments as for `discrimination_table`.
    """
    frame = accuracies(records) if frame is None else frame
    names = list(dict.fromkeys(frame["benchmark"]))
    total = frame["budget"].max()
    whole = frame[frame["budget"] == total].set_index(["method", "benchmark"])
    rows = []
    for name in names:
        seen, blank = whole.loc[("vanilla", name)], whole.loc[("blank", name)]
        run = select(records, "accuracy", benchmark=name, method="vanilla")[-1]
        metric = run["metrics"]["headline"]
        rows.append((
            Cell(name),
            Cell(load_benchmark(name).stands_for),
            Cell(plus_minus(seen["accuracy"], seen["low"], seen["high"], 1)),
            Cell(plus_minus(blank["accuracy"], blank["low"], blank["high"], 1)),
            Cell(f"{seen['accuracy'] - blank['accuracy']:.1f}"),
            Cell(f"{metric['value']:.1f} of {metric['max']:g}"),
            Cell(f"{seen['n']:.0f} on {seen['images']:.0f}"),
        ))  # fmt: skip
    facts = facts_of(list(records), "pocket", int(frame["n"].max()))
    note = (
        "Mean score of the questions in percent, ± half its 95 % bootstrap interval over pictures. "
        "Blank: every picture replaced by one mid grey. Yes-or-no questions give 50 to a guess."
    )
    return Table(
        title="What the untouched model reads from the pictures",
        headers=("benchmark", "stands for", "accuracy", "blank", "difference", "its own metric",
                 "questions\non pictures"),
        blocks=(Block("", tuple(rows)),),
        caption=(*setting_lines(facts), note),
        data=frame[frame["budget"] == total],
        facts=facts,
    )  # fmt: skip


def goals(frame: pd.DataFrame, wanted: Sequence[Goal] = GOALS) -> list[str]:
    """A sentence for each goal: reached or not, and by how much, from the records alone.

    Args:
        frame: what `accuracies` returned.
        wanted: the goals.
    """
    return [_sentence(frame, goal) for goal in wanted]


def _sentence(frame: pd.DataFrame, goal: Goal) -> str:
    at = frame[(frame["method"] == goal.better) & (frame["budget"] == goal.tokens)]
    at = at.dropna(subset=["over_random"]) if "over_random" in at else at.head(0)
    who = "the oracle" if goal.better == "oracle" else "the untouched model"
    what = f"at {goal.tokens} tokens {who} beats random by at least {goal.points:g} points"
    if at.empty:
        return f"Not measured: whether {what}."
    enough = at[at["over_random"] >= goal.points]
    surely = int((at["over_low"] >= goal.points).sum())
    each = ", ".join(
        f"{name} {over:+.1f} {between(low, high, 1)}"
        for name, over, low, high in at[
            ["benchmark", "over_random", "over_low", "over_high"]
        ].itertuples(index=False)
    )
    state = "Reached" if len(enough) >= goal.benchmarks else "Not reached"
    return (
        f"{state}: {what} on {len(enough)} of {len(at)} benchmarks (goal: {goal.benchmarks}); with "
        f"its whole 95 % interval on {surely}. {each}."
    )


def _row(label: str, found: pd.DataFrame, names: list[str], columns: tuple[str, str, str]
         ) -> tuple[Cell, ...]:  # fmt: skip
    known = found.set_index("benchmark")
    cells = [Cell(label)]
    for name in names:
        if name not in known.index or columns[0] not in known:
            cells.append(Cell(NONE_PRINTED))
            continue
        value, low, high = known.loc[[name], list(columns)].to_numpy(float)[0].tolist()
        brief = plus_minus(value, low, high, 1)
        cells.append(Cell(brief, f"{value:.1f} {between(low, high, 1)}", brief))
    return tuple(cells)


def _headers(frame: pd.DataFrame, names: list[str]) -> list[str]:
    counts = frame.groupby("benchmark")["n"].max()
    return [f"{name.replace('-', '-' + chr(10), 1)}\nn={counts[name]}" for name in names]
