"""Where the kit keeps its data and its results.

The kit is used from a clone (``pip install -e .``), so data and results lie beside the code in
the repository. Two environment variables move them: ``FRUGALVLM_DATA`` and ``FRUGALVLM_RESULTS``.
"""

import os
from pathlib import Path

from frugalvlm.errors import FrugalError

__all__ = ["MissingFilesError", "data_dir", "project_root", "results_dir"]


class MissingFilesError(FrugalError, FileNotFoundError):
    """Data or results that are not where they are looked for; the message names the remedy."""


def project_root() -> Path:
    """The folder of the repository this package runs from.

    Raises MissingFilesError when the package was installed without its repository.
    """
    here = Path(__file__).resolve()
    for folder in here.parents:
        # data/papers, not just data/: a copy installed in the virtual environment of some other
        # project must not take that project's data folder for ours.
        if (folder / "pyproject.toml").is_file() and (folder / "data" / "papers").is_dir():
            return folder
    raise MissingFilesError(
        f"no folder above {here} holds frugalvlm's pyproject.toml and data/papers: install with "
        "`pip install -e .` inside a clone, or set FRUGALVLM_DATA and FRUGALVLM_RESULTS."
    )


def data_dir() -> Path:
    """The folder of reported figures, models and fixtures (``FRUGALVLM_DATA`` overrides it)."""
    override = os.environ.get("FRUGALVLM_DATA")
    if not override:
        return project_root() / "data"
    folder = Path(override).expanduser()
    if not folder.is_dir():
        raise MissingFilesError(
            f"FRUGALVLM_DATA names {folder}, which is not a folder: point it at the data/ folder "
            "of a frugalvlm clone, or unset it."
        )
    return folder


def results_dir() -> Path:
    """The folder of records, tables and executed notebooks (``FRUGALVLM_RESULTS`` overrides it).

    It need not exist yet: whoever writes the first record creates it.
    """
    override = os.environ.get("FRUGALVLM_RESULTS")
    return Path(override).expanduser() if override else project_root() / "results"
