"""Data sets of official benchmarks: at a fixed revision, and of their files one split's alone.

`datasets` prepares all splits of a data set when one is asked for; of VQAv2 these are 45 GB. So the
card's own list of files is read, the files of one split are fetched, and these are opened.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from datasets import Dataset, Image, load_dataset

from frugalvlm.errors import FrugalError

__all__ = ["DataError", "Source", "commit_of", "files_of", "picture_columns", "rows_of",
           "wanted_files"]  # fmt: skip

CARD = "README.md"


class DataError(FrugalError, FileNotFoundError):
    """A data set that is not here or is no longer what it was; the message names the remedy."""


@dataclass(frozen=True)
class Source:
    """A split of a data set on the Hugging Face Hub.

    Attributes:
        repo: owner/name; a moved data set answers to its old name, too.
        revision: the commit.
        split: of these rows.
        config: as the card names it.
        columns: that the rows must have.
        owners: others under which the same data set is found in a cache.
        licence: where it restricts the use.
    """

    repo: str
    revision: str
    split: str
    config: str = "default"
    columns: tuple[str, ...] = ()
    owners: tuple[str, ...] = ("lmms-lab-encoder",)
    licence: str = ""

    @property
    def name(self) -> str:
        """All of it in a word."""
        return f"{self.repo}/{self.config}:{self.split}@{self.revision[:12]}"

    @property
    def names(self) -> tuple[str, ...]:
        """The data set under all its owners."""
        name = self.repo.split("/")[1]
        return (self.repo, *(f"{owner}/{name}" for owner in self.owners))


def files_of(source: Source) -> list[Path]:
    """The files of a split, from the cache: nothing is fetched.

    Raises:
        DataError: they are not all there; says how to get them.
    """
    folder, names = _located(source)
    return [folder / name for name in names]


def commit_of(source: Source) -> str:
    """The commit of the rows in the cache, also where the newest was asked for.

    Raises:
        DataError: they are not all there.
    """
    return _located(source)[0].name


def _located(source: Source) -> tuple[Path, list[str]]:
    """The snapshot that holds a split, and its files there."""
    for name in source.names:
        folder = _cached(name, source.revision)
        if folder is None:
            continue
        patterns = wanted_files(folder / CARD, source)
        inside = [str(p.relative_to(folder).as_posix()) for p in sorted(folder.rglob("*.parquet"))]
        found = [path for path in inside if any(fnmatch.fnmatch(path, p) for p in patterns)]
        if found and not _lacking(found):
            return folder, found
    raise DataError(
        f"The {source.split} split of {source.repo} (revision {source.revision[:8]}) is not in "
        f"{huggingface_hub.constants.HF_HUB_CACHE}: run `invoke fetch --paper KEY` on a machine "
        "with internet access, and copy that folder if it is another one."
    )


def _cached(name: str, revision: str) -> Path | None:
    """The folder of a data set in the cache; None without one."""
    try:
        folder = huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, local_files_only=True,
            cache_dir=huggingface_hub.constants.HF_HUB_CACHE,
        )  # fmt: skip
    except (OSError, ValueError):
        return None
    return Path(str(folder)) if (Path(str(folder)) / CARD).is_file() else None


def _lacking(files: Iterable[str]) -> bool:
    """Whether a part of several, as in `test-00001-of-00004.parquet`, is not there."""
    parts: dict[str, set[int]] = {}
    for name in files:
        # A hash may stand behind the numbers; it is another one in every part.
        numbers = re.search(r"^(.*)-(\d{5})-of-(\d{5})", name)
        if numbers:
            parts.setdefault(f"{numbers[1]}-{numbers[3]}", set()).add(int(numbers[2]))
    return any(len(found) < int(key[-5:]) for key, found in parts.items())


def wanted_files(card: Path, source: Source) -> list[str]:
    """Patterns of a split's files, as the data set's card lists them.

    Raises:
        DataError: the card does not name the configuration or the split.
    """
    told: Any = huggingface_hub.metadata_load(card) or {}
    configs = told.get("configs") or []
    for config in configs:
        if config.get("config_name", "default") != source.config:
            continue
        files = config.get("data_files") or []
        if isinstance(files, str | list) and not any(isinstance(f, dict) for f in files):
            files = [{"split": source.split, "path": files}]
        for entry in files:
            if entry.get("split") == source.split:
                path = entry["path"]
                return [str(PurePosixPath(p)) for p in ([path] if isinstance(path, str) else path)]
    names = sorted({str(config.get("config_name", "default")) for config in configs})
    raise DataError(
        f"The card of {source.repo} names no {source.split} split of '{source.config}' (it has "
        f"{', '.join(names) or 'no configurations'}): fetch revision {source.revision} of it."
    )


@lru_cache(maxsize=32)
def rows_of(source: Source) -> Dataset:
    """The rows of a split; pictures are decoded when they are looked at.

    Raises:
        DataError: they are not here, or lack a column.
    """
    files = [str(path) for path in files_of(source)]
    data = load_dataset("parquet", data_files=files, split="train")
    missing = [name for name in source.columns if name not in data.column_names]
    if missing:
        raise DataError(
            f"{source.name} has no column {', '.join(missing)}: it has "
            f"{', '.join(data.column_names)}; fetch revision {source.revision} of it."
        )
    if "image" in data.column_names and isinstance(data.features["image"], dict):
        data = data.cast_column("image", Image())  # a file that does not say what its bytes are
    return data


def picture_columns(data: Dataset) -> list[str]:
    """The columns that hold pictures, or lists of them."""
    kinds = {name: getattr(kind, "feature", kind) for name, kind in data.features.items()}
    return [name for name, kind in kinds.items() if isinstance(kind, Image)]
