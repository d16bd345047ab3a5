"""Fetching what a paper's full scale needs: its checkpoint and its benchmarks' data sets."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.console import Console

from frugalvlm.benchmarks.official import OFFICIAL, DataError, Source
from frugalvlm.benchmarks.official.data import files_of, wanted_files
from frugalvlm.errors import FrugalError
from frugalvlm.loading import hub_answers
from frugalvlm.papers import Table, load_paper
from frugalvlm.runs.full import FullOptions, full_paper

__all__ = ["Download", "FetchError", "downloads_of", "fetch", "folder", "free_bytes",
           "without_network"]  # fmt: skip

WEIGHTS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
GB = 10**9


class FetchError(FrugalError, OSError):
    """Something cannot be fetched; the message says what, from where, and the remedy."""


@dataclass(frozen=True)
class Download:
    """A model or a data set on the Hub.

    Attributes:
        repo: owner/name.
        kind: "model" or "dataset".
        revision: that is asked for.
        label: for people.
        cached: bytes that are here; None: nobody can say without a network.
        missing: bytes to fetch; None: nobody can say without a network.
        here: whether all of it is here.
        note: a licence that restricts the use.
    """

    repo: str
    kind: str
    revision: str | None
    label: str
    cached: int | None
    missing: int | None
    here: bool
    note: str = ""


def folder() -> Path:
    """The cache that everything is fetched to."""
    return Path(huggingface_hub.constants.HF_HUB_CACHE)


def free_bytes() -> int:
    """Free space where the cache is, or will be."""
    place = folder()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def downloads_of(table: Table, options: FullOptions) -> list[Download]:
    """The checkpoint and data sets of a table, with what of them is here; nothing is fetched."""
    name = options.model or table.model.hub
    revision = options.revision if options.model else table.model.revision
    found = [] if Path(name).is_dir() else [_model(name, revision)]
    return [*found, *(_data(source) for source in _sources(table))]


def fetch(key: str, options: FullOptions | None = None, console: Console | None = None
          ) -> list[Download]:  # fmt: skip
    """Everything behind `invoke fetch`: what a paper's table needs is in the cache afterwards.

    Raises:
        FetchError: no network, a full disk, or a data set that is gone.
        ScaleError, UnknownPaperError: the paper has no such table.
    """
    options, console = options or FullOptions(), console or Console()
    _, table, _ = full_paper(load_paper(key), options)
    wanted = [d for d in downloads_of(table, options) if not d.here]
    if wanted and not hub_answers():
        raise FetchError(without_network(wanted))
    need, free = sum(d.missing or 0 for d in wanted), free_bytes()
    if need > free:
        raise FetchError(
            f"{need / GB:.1f} GB are to be fetched and {free / GB:.1f} GB are free in {folder()}: "
            "free some space, or set HF_HOME to another disk."
        )
    for download in wanted:
        size = "" if download.missing is None else f", {download.missing / GB:.1f} GB"
        console.print(f"Fetching {download.label}: {download.repo}{size}", highlight=False)
        _fetch(download, table)
    console.print(f"Everything for {key} is in {folder()}.", highlight=False, soft_wrap=True)
    return wanted


def without_network(wanted: Sequence[Download]) -> str:
    """One sentence: what is missing where, and how to get it."""
    names = ", ".join(dict.fromkeys(f"{d.repo} ({d.label})" for d in wanted))
    return (
        f"No network, and not in {folder()}: {names}; run `invoke fetch --paper KEY` where there "
        "is one, and copy that folder here."
    )


def _fetch(download: Download, table: Table) -> None:
    sources = [s for s in _sources(table) if s.repo == download.repo]
    try:
        if download.kind == "model":
            huggingface_hub.snapshot_download(
                download.repo, revision=download.revision, allow_patterns=list(WEIGHTS)
            )
        for source in sources:
            card = huggingface_hub.hf_hub_download(
                source.repo, "README.md", repo_type="dataset", revision=source.revision
            )
            huggingface_hub.snapshot_download(
                source.repo, repo_type="dataset", revision=source.revision,
                allow_patterns=["README.md", *wanted_files(Path(card), source)],
            )  # fmt: skip
    except Exception as error:  # whatever the HTTP library calls its failures
        if isinstance(error, FrugalError):
            raise
        raise FetchError(_unreachable(download, error)) from error


def _unreachable(download: Download, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{download.label} ({download.repo}) is not in {folder()} and cannot be fetched ({reason}):"
        " run `invoke fetch --paper KEY` where there is a network, and copy that folder here."
    )


def _sources(table: Table) -> list[Source]:
    """The data sets of a table's columns, each once."""
    every: Iterable[Source] = (s for c in table.columns for s in OFFICIAL[c.id].sources)
    return list(dict.fromkeys(every))


def _model(name: str, revision: str | None) -> Download:
    cached, missing = _dry_run(name, "model", revision, WEIGHTS)
    here = missing == 0
    if missing is None:  # no network: a snapshot with weights is all that can be seen
        try:
            place = huggingface_hub.snapshot_download(
                name, revision=revision, local_files_only=True, cache_dir=folder()
            )
            here = any(Path(str(place)).glob("*.safetensors"))
        except (OSError, ValueError):
            here = False
    return Download(name, "model", revision, "checkpoint", cached, missing, here)


def _data(source: Source) -> Download:
    try:
        files = files_of(source)
        size, label = sum(f.stat().st_size for f in files), f"data set, {source.split}"
        return Download(source.repo, "dataset", source.revision, label, size, 0, True,
                        source.licence)  # fmt: skip
    except DataError:
        pass
    cached = missing = None
    try:
        if not hub_answers():
            raise OSError("no network")
        card = huggingface_hub.hf_hub_download(
            source.repo, "README.md", repo_type="dataset", revision=source.revision
        )
        patterns = wanted_files(Path(card), source)
        cached, missing = _dry_run(source.repo, "dataset", source.revision, patterns)
    except Exception:  # no network, or no such data set: fetching says which
        pass
    return Download(source.repo, "dataset", source.revision, f"data set, {source.split}", cached,
                    missing, False, source.licence)  # fmt: skip


def _dry_run(
    repo: str, kind: str, revision: str | None, patterns: Sequence[str]
) -> tuple[int | None, int | None]:
    """Bytes that are cached and bytes to fetch; None for both without a network."""
    if not hub_answers():
        return None, None
    try:
        files = huggingface_hub.snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=list(patterns), dry_run=True
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None, None
    sizes = [(file.file_size or 0, file.will_download) for file in files]
    missing = sum(size for size, wanted in sizes if wanted)
    return sum(size for size, _ in sizes) - missing, missing
