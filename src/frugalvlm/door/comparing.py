"""`frugalvlm.compare`: methods at budgets on data, one call, one result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from frugalvlm.benchmarks.asking import Batches, prepare
from frugalvlm.benchmarks.own import Score
from frugalvlm.checks import check_number
from frugalvlm.door import request
from frugalvlm.door.beside import beside_runs, tables_beside
from frugalvlm.door.papers import Bench
from frugalvlm.door.progress import progress_over
from frugalvlm.door.request import BASELINE, Line, Opened, RequestError
from frugalvlm.door.result import ComparisonResult
from frugalvlm.door.rows import Answered, Questions
from frugalvlm.door.show import reasons
from frugalvlm.methods import Method
from frugalvlm.papers import KEYS, Paper, Table, load_paper
from frugalvlm.paths import check_writable, command, work_dir
from frugalvlm.pocket.models import SPECS
from frugalvlm.report.tables import accuracy_table
from frugalvlm.runs.accuracy import accuracy_run
from frugalvlm.runs.efficiency import efficiency_run
from frugalvlm.runs.options import GUIDE_MODEL, POCKET_MODEL, Options, folder_of
from frugalvlm.runs.records import Record
from frugalvlm.runs.setting import Reporter, Setting
from frugalvlm.views import BudgetError, UnsupportedError

__all__ = ["compare", "evaluate"]

# From so many questions on: rounds of the latency measurement, seconds of a modelled energy window.
MEASURED = ((200, 9, 1.0), (100, 5, 0.5), (0, 3, 0.2))


def compare(
    model: Any = POCKET_MODEL,
    methods: Any = None,
    data: Any = None,
    budgets: Any = None,
    n: int = 100,
    *,
    split: str = "test",
    device: str = "cpu",
    costs: bool = True,
    repeats: int | None = None,
    energy_window_s: float | None = None,
    batch: int = 8,
    force: bool = False,
    folder: str | Path | None = None,
    progress: bool | Reporter | None = None,
    guide: Any = None,
    paper: str | None = None,
    table: str | None = None,
    revision: str | None = None,
    score: str | Score = "exact_match",
    max_new_tokens: int | None = None,
) -> ComparisonResult:
    """Compare methods at token budgets on data: accuracy, retention, intervals and costs.

    A whole program:

        import frugalvlm
        print(frugalvlm.compare(methods=["uniform", "visionzip"], budgets=[48, 16], n=30))

    Every run leaves a record. The same call again runs nothing; one that was interrupted goes on
    where it stopped.

    Args:
        model: an embedded model's name, a folder, a Hub id, or a loaded pair (model, processor).
        methods: keys ("fastv"), classes, made for each budget by their `for_budget`, and ready
            objects, which run as they are, `A | B` among them; your own, too, from a script or a
            notebook cell. One or several, in a list or separated by commas. The untouched model is
            added: retention refers to it.
        data: a benchmark id; several; a list of (picture, question, answers); a folder with
            pictures and `questions.jsonl`; a `datasets.Dataset` with the columns image, question
            and answer(s); a Benchmark object; or a mapping of names to these. See
            docs/own_benchmark.md.
        budgets: whole numbers of visual tokens per crop, or shares (0.25, "25%", "1/4") of the
            model's own patches.
        n: questions per benchmark, the first ones.
        split: "test" to report, "dev" to choose anything with; your own data has one split.
        device: where a named model goes: "cpu" or "cuda".
        costs: whether FLOPs, times, memory and energy are measured.
        repeats: rounds of the time measurement; default: by n (3, 5 or 9).
        energy_window_s: seconds per method where energy is modelled; default: by n.
        batch: prompts that are timed at once.
        force: run again although there are records.
        folder: where records go; default: the work folder, by model.
        progress: True, False, a reporter of your own, or None: in terminals and notebooks.
        guide: small model of the methods that need one (SGL), like `model`.
        paper: key of a paper, to rebuild a table in its own layout: its methods, columns and
            budgets, scaled by share to the model's patches; its own numbers stand beside.
        table: which of the paper's tables; default: its main one.
        revision: of a Hub model.
        score: of your own data: "exact_match", "vqa_accuracy", "option_letter", "yes_no", or a
            function `(answer, answers) -> 0..1`.
        max_new_tokens: of your own data: enough for the longest answer; default 16.

    Raises:
        RequestError: for an argument that makes no sense; says what would.
        OwnDataError: your data cannot be asked; says where.
        WeightsError, UnsupportedError: the model is missing or of an unknown family.
    """
    whole = {"batch": batch} | ({} if repeats is None else {"repeats": repeats})
    request.check_sizes(n, split, **whole)
    request.check_switches(progress, force=force, costs=costs)
    if energy_window_s is not None:
        energy_window_s = check_number("energy_window_s", energy_window_s)
    n, batch = int(n), int(batch)
    rounds, window = next((r, w) for least, r, w in MEASURED if n >= least)
    measured: dict[str, Any] = {
        "repeats": rounds if repeats is None else repeats,
        "energy_window_s": window if energy_window_s is None else energy_window_s,
        "batch": batch,
    }
    if paper is not None:
        asked = Options(
            n=n, model=_name_of(model), revision=revision, device=device, force=force,
            repeats=measured["repeats"], energy_window_s=measured["energy_window_s"],
            guide=_name_of(guide or GUIDE_MODEL),
        )  # fmt: skip
        if methods is not None:
            raise RequestError(f"The methods of a table of '{paper}' are the paper's: leave them.")
        return _paper_table(paper, table, asked, data, budgets, split, costs, folder, progress)
    if table is not None:
        raise RequestError(f"table='{table}' is one of a paper's: name it with paper=KEY.")
    kinds = request.kinds_of(request.DEFAULT_METHODS if methods is None else methods)
    benchmarks = request.benchmarks_of(
        request.DEFAULT_DATA if data is None else data, score, max_new_tokens
    )
    subject = request.opened(model, revision, device)
    kept = request.budgets_of(
        request.DEFAULT_BUDGETS if budgets is None else budgets, subject.patches
    )
    if not kept and any(not isinstance(k, Method) and k.key != BASELINE for k in kinds):
        raise RequestError("No budgets: give some, for example budgets=[48, 16] or ['25%'].")
    setting = _setting(subject, benchmarks, n, split, force, folder)
    check_writable(setting.folder)
    notes = [] if any(k.key == BASELINE for k in kinds) else [_ADDED]
    with _left_padding(subject.processor):
        batches = {
            name: Batches(benchmark, subject.processor, split, n, subject.device)
            for name, benchmark in benchmarks.items()
        }
        lines = request.lines_of(
            kinds, kept, subject, guide, lambda: _example(benchmarks, split, subject)
        )
        steps = sum(len(b.rows) for b in batches.values()) * sum(bool(x.method) for x in lines)
        with progress_over(steps, progress) as reporter:
            answered = _answers(setting, subject, benchmarks, batches, lines, reporter)
        records = [record for a in answered for record in a.records.values()]
        if costs:
            with progress_over(None, progress) as reporter:
                answered, cost = _costs(setting, subject, benchmarks, answered, reporter, measured)
            records.append(cost)
    asked_rows = {name: Questions(b, batches[name].rows) for name, b in benchmarks.items()}
    return ComparisonResult(answered, records, setting.folder, asked_rows, notes)


_ADDED = "The untouched model was added: retention refers to it."


def evaluate(method: Any, model: Any = POCKET_MODEL, **arguments: Any) -> ComparisonResult:
    """One method, and the untouched model for retention; see `compare`.

    Args:
        method: a key, a class or an object.
        model: as for `compare`.
        arguments: all others of `compare`.
    """
    return compare(model, [method], **arguments)


# -- runs -----------------------------------------------------------------------------------------


def _setting(
    subject: Opened, benchmarks: Mapping[str, Any], n: int, split: str, force: bool,
    folder: str | Path | None,
) -> Setting:  # fmt: skip
    """What all runs share; records that papers left of the same requests are used, too."""
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(subject.name).name)
    place = work_dir() / "compare" / f"{slug}-{subject.weights[-8:].replace('/', '-')}"
    return Setting(
        scale="pocket" if subject.name in SPECS else "own",
        model_name=subject.name,
        model_hash=subject.weights,
        folder=(place if folder is None else Path(folder).expanduser()) / "records",
        split=split,
        n=n,
        device=subject.device,
        force=force,
        others=tuple(folder_of(key, "pocket") / "records" for key in KEYS),
    )


def _answers(
    setting: Setting, subject: Opened, benchmarks: Mapping[str, Any],
    batches: Mapping[str, Batches], lines: list[Line], reporter: Reporter,
) -> list[Answered]:  # fmt: skip
    """Accuracy of every row; one that turns out impossible on the way becomes such a row."""
    found: list[dict[str, Record]] = [{} for _ in lines]
    for name, benchmark in benchmarks.items():
        for i, line in enumerate(lines):
            if line.method is None:
                continue
            try:
                found[i][name] = accuracy_run(
                    setting, subject.model, benchmark, batches[name], line.method, line.budget,
                    reporter,
                )  # fmt: skip
            except (BudgetError, UnsupportedError) as error:
                if line.key == BASELINE:
                    raise
                lines[i] = replace(line, method=None, reason=str(error))
    return [Answered(line, {} if line.method is None else records)
            for line, records in zip(lines, found, strict=True)]  # fmt: skip


def _costs(
    setting: Setting, subject: Opened, benchmarks: Mapping[str, Any], answered: list[Answered],
    reporter: Reporter, measured: Mapping[str, Any],
) -> tuple[list[Answered], Record]:  # fmt: skip
    """The cost of every row that ran, measured side by side on the first data's pictures."""
    runs = [a for a in answered if a.line.method is not None]
    plan = [(a.line.method, a.line.budget) for a in runs if a.line.method is not None]
    first = next(iter(benchmarks.values()))
    record = efficiency_run(
        setting, subject.model, subject.processor, plan, reporter, benchmark=first, **measured
    )
    costs = {id(a): row for a, row in zip(runs, record["rows"], strict=True)}
    return [replace(a, cost=costs.get(id(a))) for a in answered], record


def _example(benchmarks: Mapping[str, Any], split: str, subject: Opened) -> dict[str, Any]:
    """The first prompt of the data."""
    row = next(iter(benchmarks.values())).dataset(split, 1)[0]
    shown = row["frames"] if "frames" in row else row["image"]
    return prepare(subject.processor, [shown], [row["question"]], subject.device)


@contextmanager
def _left_padding(processor: Any) -> Iterator[None]:
    """Answers begin at the last position of every prompt; a tokenizer in use stays what it was."""
    before = processor.tokenizer.padding_side
    processor.tokenizer.padding_side = "left"
    try:
        yield
    finally:
        processor.tokenizer.padding_side = before


# -- a paper's table ------------------------------------------------------------------------------


def _name_of(model: Any) -> str:
    if not isinstance(model, str | Path):
        raise RequestError(
            "A paper's table needs its models by name, folder or Hub id: records must tell others "
            "which weights they are about."
        )
    return str(model)


def _paper_table(
    key: str, table_id: str | None, options: Options, data: Any, budgets: Any, split: str,
    costs: bool, folder: str | Path | None, progress: bool | Reporter | None,
) -> ComparisonResult:  # fmt: skip
    """The runs of a paper's table, and the table."""
    source = load_paper(key)
    layout = _layout(source, table_id)
    options = replace(
        options, benchmarks=_columns(source, layout, data), budgets=_first_budgets(layout, budgets)
    )
    if layout.pocket_model is not None:
        return _beside(source, layout, options, progress)
    bench = Bench.of(key, options)
    place = bench.setting.folder if folder is None else Path(folder).expanduser() / "records"
    bench = replace(
        bench, setting=replace(bench.setting, split=split, folder=check_writable(place))
    )
    with progress_over(None, progress) as reporter:
        made = bench.answers(reporter)
        analysed = bench.analysis(reporter)
        made += (bench.costs(analysed, reporter) if costs else []) + analysed
    rows = _cost_rows(made)
    labels = {row.method: row.label for row in layout.rows}
    answered = [
        Answered(Line(m.key, labels.get(m.key, m.key), b, m), {}, rows.get((m.key, b)))
        for m, b in bench.plan
    ]
    answered += [
        Answered(Line(s.method, labels.get(s.method, s.method), s.budget, None, s.reason))
        for s in bench.skipped
    ]
    return _paper_result(source, layout, made, answered, place)


def _paper_result(
    source: Paper, layout: Table, made: list[Record], answered: list[Answered], place: Path,
    notes: tuple[str, ...] = (),
) -> ComparisonResult:  # fmt: skip
    shown = accuracy_table(source, layout.id, made)
    result = ComparisonResult(answered, made, place, {}, notes, shown, source.key)
    said = replace(shown, caption=(*shown.caption, *notes, *reasons(result)))
    return replace(result, paper_table=said)


def _cost_rows(made: list[Record]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """By method and budget, the rows of the efficiency record; those of the layout come first."""
    rows: dict[tuple[str, int], Mapping[str, Any]] = {}
    for record in made:
        if record["kind"] == "efficiency":
            for row in record["rows"]:
                rows.setdefault((row["method"], row["budget"]), row)
    return rows


def _beside(
    source: Paper, layout: Table, options: Options, progress: bool | Reporter | None
) -> ComparisonResult:
    """A table that another embedded model answers; its costs are not measured."""
    why: tuple[str, ...] = ()
    if layout.id not in [t.id for t in tables_beside(source, options)]:
        why = (
            f"Nothing was run: this table is about {layout.pocket_model}, which must be "
            f"installed (`{command(f'train --model {layout.pocket_model}')}`), and goes with "
            f"{POCKET_MODEL} only.",
        )
    with progress_over(None, progress) as reporter:
        made = beside_runs(source.key, layout.id, options, reporter)
    place = folder_of(source.key, "pocket") / str(layout.pocket_model) / "records"
    return _paper_result(source, layout, made, [], place, why)


def _layout(source: Paper, table_id: str | None) -> Table:
    here = [t for t in source.tables if "pocket" in t.scales]
    if not here:
        raise RequestError(
            f"'{source.key}' has no table that can be rebuilt here; `{command('papers')}` shows "
            "which papers have."
        )
    found = here[0] if table_id is None else next((t for t in here if t.id == table_id), None)
    if found is None:
        raise RequestError(
            f"'{source.key}' has no table '{table_id}' that can be rebuilt here: "
            f"{', '.join(t.id for t in here)}."
        )
    return found


def _columns(source: Paper, layout: Table, data: Any) -> tuple[str, ...] | None:
    """The columns that are asked for, by their ids here or in the main table; None: all."""
    if data is None:
        return None
    names = data.split(",") if isinstance(data, str) else list(data)
    names = [str(name).strip() for name in names]
    known = [column.id for column in layout.columns]
    main = source.pocket_table
    elsewhere = [c.id for c in main.columns] if main and layout.pocket_model else []
    wrong = [name for name in names if name not in (*known, *elsewhere)]
    if wrong:
        raise RequestError(
            f"Table '{layout.id}' has no column {', '.join(wrong)}: {', '.join(known)}."
        )
    return tuple(names) or None


def _first_budgets(layout: Table, budgets: Any) -> int | None:
    """How many of the paper's budgets; None: all."""
    if budgets is None:
        return None
    if isinstance(budgets, bool) or not isinstance(budgets, int) or budgets < 1:
        raise RequestError(
            "A paper's table has its own budgets, scaled to the model: leave budgets out, or say "
            f"how many of its {len(layout.budgets)}, the first ones, as in budgets=1."
        )
    return budgets
