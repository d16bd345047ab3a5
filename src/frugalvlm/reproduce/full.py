"""Reproducing a paper's own table: its checkpoint, official benchmarks, its numbers beside ours."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from frugalvlm.benchmarks.official import OFFICIAL
from frugalvlm.benchmarks.official.asking import STORE_BYTES, Streamed, batch_size_for
from frugalvlm.benchmarks.official.frames import Frame, frame_of
from frugalvlm.door.rows import Questions
from frugalvlm.loading import hub_answers, load_vlm
from frugalvlm.methods import Method
from frugalvlm.papers import Paper, Table, load_paper
from frugalvlm.report import tables
from frugalvlm.report.verdict_table import verdict_table
from frugalvlm.reproduce.fetch import Download, downloads_of, fetch, without_network
from frugalvlm.reproduce.preflight import Preflight, Work, free_memory, print_preflight, trial
from frugalvlm.reproduce.printed import print_closing
from frugalvlm.reproduce.progress import progress
from frugalvlm.runs.accuracy import accuracy_run, recorded
from frugalvlm.runs.full import (
    FullOptions,
    full_paper,
    full_rows,
    full_setting,
    full_tables,
    weights_of,
)
from frugalvlm.runs.layout import ScaleError, Skipped
from frugalvlm.runs.records import Record, clear_left_over, write_bytes
from frugalvlm.runs.setting import Setting
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.verdicts import verdicts

__all__ = ["FullBench", "reproduce_full"]

PROBE = 64  # questions that are looked at to know how long a prompt is


@dataclass(frozen=True)
class FullBench:
    """All that a table at the full scale needs.

    Attributes:
        paper: with this table alone.
        table: its columns and budgets that are run.
        setting: what all runs share.
        model: the untouched model.
        frame: how it is asked.
        questions: by benchmark.
        plan: methods and budgets, the rows.
        skipped: rows that the checkpoint cannot serve.
        batch: questions at once.
    """

    paper: Paper
    table: Table
    setting: Setting
    model: PreTrainedModel
    frame: Frame
    questions: dict[str, Streamed]
    plan: list[tuple[Method, int]]
    skipped: Sequence[Skipped]
    batch: int

    def work(self) -> dict[str, Work]:
        """How many answers of every benchmark are left."""
        found = {}
        for name, asked in self.questions.items():
            done = [
                recorded(self.setting, self.model, OFFICIAL[name], asked, method, budget)
                for method, budget in self.plan
            ]
            whole = len(asked.ids)
            found[name] = Work(whole, len(self.plan), sum(whole - d for d in done))
        return found


def reproduce_full(
    key: str, options: FullOptions, console: Console, plan_only: bool = False
) -> Path:
    """A paper's table at the full scale: plan, answers, table, verdicts and page.

    Args:
        key: the paper.
        options: which table, how many questions, on what.
        console: where the plan, progress and the tables go.
        plan_only: stop behind the plan; nothing is fetched then.

    Returns:
        The folder of the results.

    Raises:
        ScaleError: the paper has no such table.
        WeightsError, FetchError: something is not here and cannot be fetched.
        TooLittleMemoryError: not even one question fits.
    """
    if options.device == "cpu" and torch.cuda.is_available():
        options = replace(options, device="cuda")
    paper = load_paper(key)
    first = full_tables(paper)[0].id
    paper, table, out = full_paper(paper, options)
    downloads = downloads_of(table, options)
    missing = [d for d in downloads if not d.here]
    if missing and not plan_only:
        _get(key, options, table, missing, console)
        downloads = downloads_of(table, options)
    known = Preflight(paper, table, downloads, out, options.device)
    if known.missing:  # what is here can be told all the same
        print_preflight(known, console)
        return _folder(paper, table, first, options)
    bench = _open(paper, table, first, options)
    work = bench.work()
    seconds = None
    if any(w.left for w in work.values()):
        name = max(work, key=lambda n: work[n].left)
        methods = [method for method, _ in bench.plan]
        seconds = trial(bench.model, bench.questions[name], methods, OFFICIAL[name].max_new_tokens)
    print_preflight(
        replace(known, batch=bench.batch, work=work, skipped=bench.skipped, seconds=seconds,
                weights=bench.setting.model_hash),
        console,
    )  # fmt: skip
    if not plan_only:
        _show(bench, _answers(bench, console), console)
    return bench.setting.folder.parent


def _get(
    key: str, options: FullOptions, table: Table, missing: Sequence[Download], console: Console
) -> None:
    """Fetch what is not here; without a network say what that is."""
    if hub_answers():
        fetch(key, options, console)
        return
    name, revision = _checkpoint(table, options)
    if any(d.kind == "model" for d in missing):
        load_vlm(name, revision=revision, device=options.device)  # its own sentence, with sizes
    raise ScaleError(without_network([d for d in missing if d.kind == "dataset"]))


def _checkpoint(table: Table, options: FullOptions) -> tuple[str, str | None]:
    if options.model is not None:
        return options.model, options.revision
    return table.model.hub, options.revision or table.model.revision


def _folder(paper: Paper, table: Table, first: str, options: FullOptions) -> Path:
    name, _ = _checkpoint(table, options)
    return full_setting(paper, table, table.id == first, options, name, "").folder.parent


def _open(paper: Paper, table: Table, first: str, options: FullOptions) -> FullBench:
    """Load the checkpoint and the questions; nothing is asked."""
    name, revision = _checkpoint(table, options)
    model, processor = load_vlm(name, revision=revision, device=options.device)
    weights = weights_of(name, revision)
    setting = full_setting(paper, table, table.id == first, options, Path(name).name
                           if Path(name).is_dir() else name, weights)  # fmt: skip
    clear_left_over(setting.folder)
    frame = frame_of(model, processor)
    plan, skipped = full_rows(table, options, model, processor)
    on_gpu = torch.device(options.device).type == "cuda"
    ahead = max(1, min(8, (os.cpu_count() or 1) - 1)) if on_gpu else 0
    store = min(STORE_BYTES, free_memory(options.device) // 10)
    questions = {
        c.id: Streamed(
            OFFICIAL[c.id], processor, options.n, options.device, frame, ahead=ahead, store=store
        )
        for c in table.columns
    }
    batch = options.batch or _batch(model, questions, options.device)
    for asked in questions.values():
        asked.size = batch
    return FullBench(paper, table, setting, model, frame, questions, plan, skipped, batch)


def _batch(model: PreTrainedModel, questions: dict[str, Streamed], device: str) -> int:
    """The batch size of the whole table, from its longest prompt: part of the setting."""
    longest = 0
    for name, asked in questions.items():
        # The longest text comes first; where pictures differ in size, some more are looked at.
        parts = asked.parts[:1] if _fixed(model) else asked.parts[:PROBE]
        found = max(asked.prepared(part)[1]["input_ids"].shape[1] for part in parts)
        longest = max(longest, found + OFFICIAL[name].max_new_tokens)
    return batch_size_for(model, longest, free_memory(device))


def _fixed(model: PreTrainedModel) -> bool:
    """Whether all pictures take as many tokens."""
    return model.config.model_type == "llava"


def _answers(bench: FullBench, console: Console) -> list[Record]:
    """Every cell, benchmark by benchmark, so that pictures go through the tower once."""
    made = []
    with progress(console) as reporter:
        for name, asked in bench.questions.items():
            told = OFFICIAL[name], asked
            made += [
                accuracy_run(bench.setting, bench.model, *told, method, budget, reporter)
                for method, budget in bench.plan
            ]
            asked.forget()
    return made


def _show(bench: FullBench, made: Sequence[Record], console: Console) -> None:
    """The table with the paper's numbers, the verdicts, and both as files."""
    rows = {n: Questions(OFFICIAL[n], asked.rows) for n, asked in bench.questions.items()}
    guard = Guard()
    shown = tables.accuracy_table(
        bench.paper, bench.table.id, made, scale="full", benchmarks=rows, guard=guard
    )
    why = tuple(f"{s.method} at {s.budget} tokens: {s.reason}" for s in bench.skipped)
    how = f"Asked with {bench.frame.name}; {bench.batch} questions at once."
    shown = replace(shown, caption=(*shown.caption, how, *why))
    found = verdicts(bench.paper, made, "full", benchmarks=rows, guard=guard)
    judged = verdict_table(found)
    console.print(shown)
    console.print(judged)
    folder, key = bench.setting.folder.parent, bench.paper.key
    page = folder / f"{key}.html"
    write_bytes(page, _page(shown.title, shown.to_html(), judged.to_html()).encode())
    write_bytes(folder / f"{key}.csv", shown.to_frame().to_csv(index=False).encode())
    print_closing(bench.paper, "full", found, page, console)


def _page(title: str, *parts: str) -> str:
    """A page that needs no network."""
    told = html.escape(title)
    head = f'<head><meta charset="utf-8"><title>{told}</title></head>'
    body = f"<body><h1>{told}</h1>{''.join(parts)}</body>"
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'
