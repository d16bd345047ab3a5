"""Where the kit keeps its data and its results.

In a clone (``pip install -e .``) data, notebooks and results lie beside the code in the repository.
A package that was installed without it (``pip install .``) carries data and notebooks inside, and
its results go to a folder of the caller's. Two environment variables move data and results:
``FRUGALVLM_DATA`` and ``FRUGALVLM_RESULTS``.
"""

import os
from pathlib import Path

from frugalvlm.errors import FrugalError

__all__ = [
    "MissingFilesError",
    "checkpoints_dir",
    "data_dir",
    "notebooks_dir",
    "project_root",
    "repository",
    "results_dir",
]

PACKAGE = Path(__file__).resolve().parent
INSIDE = PACKAGE / "_files"  # what setup.py copies into an installed package: data and notebooks


class MissingFilesError(FrugalError, FileNotFoundError):
    """Data or results that are not where they are looked for; the message names the remedy."""


def repository() -> Path | None:
    """The folder of the clone this package runs from; None for an installed package."""
    root = PACKAGE.parents[1]
    # The very place, not any folder above: a copy installed in a virtual environment that lies in
    # a clone is another version of the code, and must not take the clone's data for its own.
    ours = PACKAGE.parent.name == "src" and (root / "pyproject.toml").is_file()
    return root if ours and (root / "data" / "papers").is_dir() else None


def project_root() -> Path:
    """The folder of the repository this package runs from.

    Raises MissingFilesError when the package was installed without its repository.
    """
    root = repository()
    if root is None:
        raise MissingFilesError(
            f"This needs a clone of frugalvlm's repository, and {PACKAGE} was installed without "
            "one: run it inside a clone, after `pip install -e .` there."
        )
    return root


def checkpoints_dir() -> Path:
    """The folder of unfinished training runs; beside the results where these are not in a clone."""
    root = repository()
    if root is None or os.environ.get("FRUGALVLM_RESULTS"):
        return results_dir() / "checkpoints"
    return root / "checkpoints"


def notebooks_dir() -> Path:
    """The folder of the source notebooks, which no run changes."""
    return _shipped("notebooks")


def data_dir() -> Path:
    """The folder of reported figures, models and fixtures (``FRUGALVLM_DATA`` overrides it)."""
    override = os.environ.get("FRUGALVLM_DATA")
    if not override:
        return _shipped("data")
    folder = Path(override).expanduser()
    if not folder.is_dir():
        raise MissingFilesError(
            f"FRUGALVLM_DATA names {folder}, which is not a folder: point it at the data/ folder "
            "of a frugalvlm clone, or unset it."
        )
    return folder


def results_dir() -> Path:
    """The folder of records, tables and executed notebooks (``FRUGALVLM_RESULTS`` overrides it).

    By default results/ of the repository, or frugalvlm-results/ in the folder where an installed
    package is first asked. It need not exist yet: whoever writes the first record creates it.
    """
    override = os.environ.get("FRUGALVLM_RESULTS")
    if override:
        return Path(override).expanduser()
    if root := repository():
        return root / "results"
    # Said to the notebooks and processes that are started from here, which run in other folders.
    folder = Path.cwd() / "frugalvlm-results"
    os.environ["FRUGALVLM_RESULTS"] = str(folder)
    return folder


def _shipped(name: str) -> Path:
    """A folder that comes with the kit: of the repository, or inside the installed package."""
    root = repository()
    folder = INSIDE / name if root is None else root / name
    if not folder.is_dir():
        raise MissingFilesError(
            f"{folder} is missing, so this copy of frugalvlm is not whole: install it again with "
            "`pip install --force-reinstall --no-deps .` in a clone."
        )
    return folder
