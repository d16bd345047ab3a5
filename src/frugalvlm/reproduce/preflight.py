"""What the full scale prints before it starts, and alone with `--plan`.

What is to be fetched, whether disk and GPU have room for it, how many answers are left, how long
they take, which revisions are used, and what is left out and why.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from rich.console import Console
from transformers import PreTrainedModel

from frugalvlm.benchmarks import asking
from frugalvlm.benchmarks.official import OFFICIAL
from frugalvlm.benchmarks.official.asking import Streamed
from frugalvlm.methods import Method
from frugalvlm.papers import Paper, Table
from frugalvlm.reproduce.fetch import GB, Download, folder, free_bytes
from frugalvlm.runs.layout import Skipped

__all__ = ["Preflight", "Work", "free_memory", "print_preflight", "trial"]

TRIAL = 2  # batches that are timed


@dataclass(frozen=True)
class Work:
    """Answers of one benchmark: questions, rows, and how many of their answers are left."""

    questions: int
    rows: int
    left: int


@dataclass(frozen=True)
class Preflight:
    """All that is known before the first answer.

    Attributes:
        paper: whose table it is.
        table: of it, as it is run.
        downloads: the checkpoint and the data sets.
        out: columns that are left out, and why.
        device: where the model goes.
        batch: questions at once; None: the model is not here, so nobody can say.
        work: by benchmark; none where model or data are not here.
        skipped: rows that the checkpoint cannot serve.
        seconds: per answer of the untouched model and of the smallest budget; None: not tried.
        weights: the checkpoint, with its commit.
    """

    paper: Paper
    table: Table
    downloads: Sequence[Download]
    out: Mapping[str, str]
    device: str
    batch: int | None = None
    work: Mapping[str, Work] = field(default_factory=dict)
    skipped: Sequence[Skipped] = ()
    seconds: tuple[float, float] | None = None
    weights: str = ""

    @property
    def missing(self) -> list[Download]:
        """What is not here yet."""
        return [d for d in self.downloads if not d.here]

    @property
    def left(self) -> int:
        """Answers to give."""
        return sum(work.left for work in self.work.values())


def free_memory(device: str) -> int:
    """Bytes that are free where the model is."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return int(psutil.virtual_memory().available)


def trial(
    model: PreTrainedModel, questions: Streamed, methods: Sequence[Method], max_new_tokens: int
) -> tuple[float, float]:
    """Seconds per answer of the first and of the last method, on two batches behind a first one."""
    first, last = (_timed(model, questions, m, max_new_tokens) for m in (methods[0], methods[-1]))
    return first, last


def _timed(
    model: PreTrainedModel, questions: Streamed, method: Method, max_new_tokens: int
) -> float:
    asked, started = 0, time.monotonic()
    for number, (ids, inputs) in enumerate(questions.batches):
        if number == 1:  # the first one warms up
            asked, started = 0, time.monotonic()
        with method.on(model):
            asking.answer(model, questions.processor, inputs, max_new_tokens)
        asked += len(ids)
        if number == TRIAL:
            break
    return (time.monotonic() - started) / asked


def print_preflight(plan: Preflight, console: Console) -> None:
    """The plan in words."""
    told: list[str] = [f"{plan.paper.title}: {plan.table.where}, {plan.table.model.name}."]
    told += [_download(d) for d in plan.downloads]
    fetched = [d.missing or 0 for d in plan.downloads if d.kind == "dataset"]
    more = f"; data sets are opened as a copy, {sum(fetched) / GB:.1f} GB more"
    copies = more if any(fetched) else ""
    told.append(f"Disk: {free_bytes() / GB:.1f} GB free in {folder()}{copies}.")
    told.append(_memory(plan))
    for name, work in plan.work.items():
        source = OFFICIAL[name].source
        told.append(
            f"{name} ({source.split}): {work.questions} questions x {work.rows} rows, "
            f"{work.questions * work.rows - work.left} answered, {work.left} left."
        )
    if plan.work:
        told.append(f"Answers left: {plan.left}. {_hours(plan)}")
    told += [f"Left out, {label}: {why}." for label, why in plan.out.items()]
    told += [f"Left out, {s.method} at {s.budget} tokens: {s.reason}" for s in plan.skipped]
    console.print("\n".join(told), highlight=False, markup=False, soft_wrap=True)


def _download(d: Download) -> str:
    state = "here" if d.here else "not here"
    if d.here and d.cached:
        state = f"here, {d.cached / GB:.2f} GB"
    elif not d.here and d.missing is not None:
        state = f"{d.missing / GB:.2f} GB to fetch, {(d.cached or 0) / GB:.2f} GB here"
    licence = f"; {d.note}" if d.note else ""
    return f"{d.label}: {d.repo} @ {(d.revision or 'main')[:12]}: {state}{licence}."


def _memory(plan: Preflight) -> str:
    name = "CPU"
    if torch.device(plan.device).type == "cuda":
        name = torch.cuda.get_device_name(torch.device(plan.device))
    free = f"{name}: {free_memory(plan.device) / 2**30:.1f} GiB free"
    if plan.batch is None:
        return f"{free}; the batch size is known once the checkpoint is here."
    return f"{free} beside the checkpoint; {plan.batch} questions at once. Weights: {plan.weights}."


def _hours(plan: Preflight) -> str:
    if not plan.left:
        return "Nothing is left to ask."
    if plan.seconds is None:
        return "How long they take is known after a trial."
    first, last = sorted(plan.seconds)
    low, high = (plan.left * s / 3600 for s in (first, last))
    return (
        f"About {low:.2f} to {high:.2f} hours, by a trial of two batches: "
        f"{1000 * plan.seconds[0]:.0f} ms per answer untouched, {1000 * plan.seconds[1]:.0f} ms in "
        "the table's last row."
    )
