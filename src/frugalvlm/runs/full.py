"""The full scale: a paper's table on its own checkpoint and official benchmarks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.benchmarks.official import OFFICIAL, REFUSED
from frugalvlm.checks import check_name, check_names, check_present, check_whole
from frugalvlm.hosts import host_for
from frugalvlm.loading import model_hash
from frugalvlm.methods import Method
from frugalvlm.methods.base import GuidedReducer
from frugalvlm.papers import Claim, Paper, Table
from frugalvlm.papers.classes import suggestion
from frugalvlm.runs.guides import with_guide
from frugalvlm.runs.layout import ScaleError, Skipped, check_methods, planned
from frugalvlm.runs.options import Options, folders_of
from frugalvlm.runs.setting import Setting
from frugalvlm.views import BudgetError, UnsupportedError

__all__ = ["FullOptions", "full_paper", "full_rows", "full_setting", "full_tables", "weights_of"]

QUESTIONS = 500  # per benchmark, unless told otherwise
# What claims call by its pocket counterpart.
COUNTERPART = {
    "pocket-gqa": "gqa", "pocket-pope": "pope", "pocket-mme": "mme", "pocket-textvqa": "textvqa",
    "pocket-sqa": "scienceqa", "pocket-vqav2": "vqav2",
}  # fmt: skip


@dataclass(frozen=True)
class FullOptions:
    """What a reproduction at the full scale may be told.

    Attributes:
        n: questions per benchmark, a fixed sample; 0: all.
        benchmarks: ids of the table's benchmarks to run; None: all of them.
        budgets: how many of the table's budgets to run, the first ones; None: all.
        table: id of the paper's table; None: its first one.
        model: a folder or Hub id in the place of the paper's checkpoint.
        revision: of that Hub model.
        device: "cpu", "cuda", "cuda:1", ...
        batch: questions asked at once; None: as many as fit.
        force: run again although complete records exist.
        guide: small model of the methods that need one.

    Raises:
        OptionError: for a value that an option cannot have.
    """

    n: int = QUESTIONS
    benchmarks: tuple[str, ...] | None = None
    budgets: int | None = None
    table: str | None = None
    model: str | None = None
    revision: str | None = None
    device: str = "cpu"
    batch: int | None = None
    force: bool = False
    guide: str | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "n": check_whole("n", self.n, 0), "device": check_present(self.device)
        }  # fmt: skip
        if self.benchmarks is not None:
            known = (*OFFICIAL, *REFUSED)
            checked["benchmarks"] = check_names("benchmarks", self.benchmarks, known)
        for name in ("budgets", "batch"):
            if getattr(self, name) is not None:
                checked[name] = check_whole(name, getattr(self, name))
        for name in ("model", "guide"):
            if getattr(self, name) is not None:
                checked[name] = check_name(name, getattr(self, name), "a folder or a Hub id")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def full_tables(paper: Paper) -> list[Table]:
    """The tables of a paper whose columns are official benchmarks.

    Raises:
        ScaleError: there are none; says what the paper needs.
    """
    known = {*OFFICIAL, *REFUSED}
    found = [t for t in paper.tables if "full" in t.scales and known & {c.id for c in t.columns}]
    if not found:
        raise ScaleError(
            f"'{paper.key}' has no table at the full scale: "
            f"{NEEDS.get(paper.key, 'its models were trained by its authors and not released')}."
        )
    return found


# Why a paper that runs at the pocket scale does not at the full one.
NEEDS: Mapping[str, str] = {
    "sgl": "its tables are about InternVL2-26B guided by InternVL2-2B, for which the kit has no "
    "host; `--scale blueprint` counts its costs",
    "early_exit": "it prints an analysis of traces and no benchmark scores",
}


def full_paper(paper: Paper, options: FullOptions) -> tuple[Paper, Table, dict[str, str]]:
    """A paper with the one table that is asked for, of it the columns and budgets that can be run.

    Claims speak of the official benchmarks then, where they named pocket ones.

    Returns:
        The paper, its table, and for every column that is left out the reason.

    Raises:
        ScaleError: an unknown table or benchmark, or none that gives a number.
    """
    tables = {t.id: t for t in full_tables(paper)}
    wanted = options.table or next(iter(tables))
    if wanted not in tables:
        raise ScaleError(
            f"'{paper.key}' has no table '{wanted}' at the full scale{suggestion(wanted, tables)}: "
            f"{', '.join(tables)}."
        )
    table = tables[wanted]
    ids = [column.id for column in table.columns]
    absent = [name for name in options.benchmarks or () if name not in ids]
    if absent:
        raise ScaleError(
            f"Table '{table.id}' of '{paper.key}' has no column {', '.join(absent)}: "
            f"{', '.join(ids)}."
        )
    asked = [c for c in table.columns if options.benchmarks is None or c.id in options.benchmarks]
    out = {c.label: REFUSED[c.id] for c in asked if c.id in REFUSED}
    columns = tuple(c for c in asked if c.id in OFFICIAL)
    if not columns:
        raise ScaleError(f"No number can be had: {'; '.join(out.values())}.")
    budgets = table.budgets[: options.budgets]
    models = (replace(table.model, budgets=budgets),)
    table = replace(table, columns=columns, models=models, note=_note(table, out))
    claims = tuple(_official_claim(claim) for claim in paper.claims)
    return replace(paper, tables=(table,), claims=claims), table, out


def _note(table: Table, out: Mapping[str, str]) -> str:
    """What stands below the table: of every column its data, and what is left out and why."""
    found = [(c.label, OFFICIAL[c.id]) for c in table.columns if c.id in OFFICIAL]
    data = "; ".join(f"{label}: {b.source.name}" for label, b in found)
    differs = " ".join(f"{label}: {b.differs}" for label, b in found if b.differs)
    left = " ".join(f"Left out: {why}." for why in out.values())
    return " ".join(part for part in (table.note, f"Data: {data}.", differs, left) if part)


def _official_claim(claim: Claim) -> Claim:
    return replace(claim, quantity=_official(copy.deepcopy(claim.quantity)))


def _official(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _official(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_official(part) for part in value]
    return COUNTERPART.get(value, value) if isinstance(value, str) else value


def weights_of(name: str, revision: str | None) -> str:
    """What identifies a checkpoint in records: a hash, or Hub id and commit.

    Raises:
        WeightsError: as `load_vlm`, for what is seen without reading the weights.
    """
    known = model_hash(name, revision)
    if Path(name).is_dir() or "/" not in name:
        return known
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=True,
            cache_dir=huggingface_hub.constants.HF_HUB_CACHE,
        )  # fmt: skip
    except (OSError, ValueError):
        return known
    return f"{name}@{Path(str(folder)).name}"


def full_rows(
    table: Table, options: FullOptions, model: PreTrainedModel, processor: ProcessorMixin
) -> tuple[list[tuple[Method, int]], list[Skipped]]:
    """The rows of a table that a checkpoint can serve, the baseline first, and the others."""
    check_methods(table)
    shape = host_for(model).shape
    plan: list[tuple[Method, int]] = []
    skipped: list[Skipped] = []
    for row, budget in table.lines():
        above = 0 if row.once == "none" else shape.patches  # of the rows above all blocks
        tokens = above if budget is None else table.model.at(budget, shape.patches)
        try:
            method = planned(table, row, budget, tokens, shape)
            if isinstance(method, GuidedReducer) and options.guide is None:
                raise UnsupportedError(f"{row.method} needs a small model: name one with --guide.")
            method.check(shape)
            plan.append((method, tokens))
        except (BudgetError, UnsupportedError) as error:
            skipped.append(Skipped(row.method, tokens, error))
    if options.guide is not None:
        told = Options(guide=options.guide, model=options.model or table.model.hub,
                       device=options.device)  # fmt: skip
        plan = with_guide(plan, told, processor)
    return plan, skipped


def full_setting(paper: Paper, table: Table, first: bool, options: FullOptions, name: str,
                 weights: str) -> Setting:  # fmt: skip
    """What all runs of a table share; another table than the paper's first has its own folder."""
    own, *published = [
        (folder if first else folder / table.id) / "records"
        for folder in folders_of(paper.key, "full")
    ]
    return Setting(
        scale="full", model_name=name, model_hash=weights, folder=own, n=options.n,
        device=options.device, force=options.force, others=tuple(published),
    )  # fmt: skip
