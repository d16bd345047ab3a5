"""The surveyed papers as data: which there are, and what each says.

`data/papers/KEY.yaml` describes a paper and `data/papers/KEY.csv` holds its reported figures, one
number a line with the place it was taken from; `docs/papers_format.md` gives every field. A paper
is there because its YAML file is: nothing else lists it.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from frugalvlm.errors import FrugalError
from frugalvlm.papers.classes import (
    Paper,
    suggestion,
)
from frugalvlm.papers.reading import PaperFormatError, read_paper
from frugalvlm.paths import MissingFilesError, data_dir

__all__ = ["UnknownPaperError", "all_papers", "keys", "load_paper", "readable_paper"]

_LOG = logging.getLogger(__name__)
_NAMED: set[str] = set()  # files that cannot be used; each is named once
_ARXIV = re.compile(rb"^arxiv:[ \t]*[\"']?(\d{4})\.(\d{4,5})", re.MULTILINE)


class UnknownPaperError(FrugalError, ValueError):
    """The key names none of the papers."""


def keys(folder: Path | None = None) -> tuple[str, ...]:
    """Keys of the papers in the order of their arXiv numbers: the YAML files of the folder.

    Only the line with the number is looked for; a file without one stands at the end.

    Args:
        folder: default: `data/papers`.
    """
    paths = [path for path in _folder(folder).glob("*.yaml") if path.stem.isidentifier()]
    return tuple(path.stem for path in sorted(paths, key=_arxiv))


def load_paper(key: str, folder: Path | None = None) -> Paper:
    """Read one paper's description.

    Args:
        key: the paper.
        folder: default: `data/papers`.

    Raises:
        UnknownPaperError: for a key without a file.
        PaperFormatError: for a description, or figures, that break the format.
    """
    folder = _folder(folder)
    known = keys(folder)
    if not known:
        raise MissingFilesError(
            f"{folder / key}.yaml is not there, nor any other paper: point FRUGALVLM_DATA at the "
            "data/ folder of a frugalvlm clone, or unset it."
        )
    if key not in known:
        raise UnknownPaperError(
            f"unknown paper {key!r}{suggestion(key, known)}; known: {', '.join(known)}"
        )
    return _read(key, folder, *(_state(folder / f"{key}{end}") for end in (".yaml", ".csv")))


def readable_paper(key: str, folder: Path | None = None) -> Paper | None:
    """As `load_paper`, but None for one whose files break the format, which is named once."""
    try:
        return load_paper(key, folder)
    except PaperFormatError as error:
        if str(error) not in _NAMED:
            _NAMED.add(str(error))
            _LOG.warning("Left out, for its files cannot be used: %s", error)
        return None


def all_papers(folder: Path | None = None) -> tuple[Paper, ...]:
    """All papers whose files can be used, in the order of `keys`; others are named once."""
    found = (readable_paper(key, folder) for key in keys(folder))
    return tuple(paper for paper in found if paper is not None)


def _folder(folder: Path | None) -> Path:
    return data_dir() / "papers" if folder is None else folder


def _arxiv(path: Path) -> tuple[int, int, str]:
    found = _ARXIV.search(path.read_bytes())
    if found is None:
        return 10**6, 0, path.stem
    return int(found[1]), int(found[2]), path.stem


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written."""
    if not path.is_file():
        return 0, 0
    about = path.stat()
    return about.st_mtime_ns, about.st_size


@lru_cache(maxsize=256)
def _read(key: str, folder: Path, description: tuple[int, int], figures: tuple[int, int]) -> Paper:
    """A paper as its files are now; read again when they change."""
    paper = read_paper(key, folder)
    return replace(paper, folder=folder, other=partial(_another, folder))


def _another(folder: Path, key: str) -> Paper | None:
    return readable_paper(key, folder)
