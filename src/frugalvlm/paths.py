"""Where the kit keeps its data and its results.

The kit is used from a clone (``pip install -e .``), so data and results lie beside the code in
the repository. Results are in two places: those that are published, under version control, and the
work folder, where every run writes. No run changes what is published; `reproduce.publish` does.
Two environment variables move data and work folder: ``FRUGALVLM_DATA`` and ``FRUGALVLM_RESULTS``.
"""

import os
from pathlib import Path

from frugalvlm.errors import FrugalError

__all__ = [
    "MissingFilesError",
    "data_dir",
    "project_root",
    "published_dir",
    "result_file",
    "results_dir",
    "results_places",
    "work_dir",
]


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


def published_dir() -> Path:
    """The folder of published records, tables and executed notebooks: the repository's results/.

    Raises MissingFilesError when the package was installed without its repository.
    """
    return project_root() / "results"


def work_dir() -> Path:
    """The folder where every run writes: ``FRUGALVLM_RESULTS``, or results/.work of the repository.

    It need not exist yet: whoever writes the first record creates it. A relative
    ``FRUGALVLM_RESULTS`` is made absolute in the environment when it is first asked for, so that
    notebooks and other processes, which run elsewhere, write into the same folder.

    Raises MissingFilesError when ``FRUGALVLM_RESULTS`` names a file or the published results.
    """
    override = os.environ.get("FRUGALVLM_RESULTS")
    if not override:
        return published_dir() / ".work"
    folder = Path(override).expanduser().absolute()
    os.environ["FRUGALVLM_RESULTS"] = str(folder)
    if folder.exists() and not folder.is_dir():
        raise MissingFilesError(
            f"FRUGALVLM_RESULTS names {folder}, which is not a folder: name one, or unset it."
        )
    published = _published()
    if published is not None and folder.resolve() == published.resolve():
        raise MissingFilesError(
            f"FRUGALVLM_RESULTS names {folder}, the published results, which no run may change: "
            "name another folder, or unset it."
        )
    return folder


results_dir = work_dir


def results_places() -> list[Path]:
    """Where results are looked for: the work folder, then the published ones if there are any."""
    published = _published()
    return [work_dir(), *([] if published is None else [published])]


def result_file(*parts: str) -> Path:
    """A file of the results by its parts: the work folder's, or else the published one.

    Of a file that is in neither, where a run would write it.
    """
    files = [place.joinpath(*parts) for place in results_places()]
    return next((file for file in files if file.is_file()), files[0])


def _published() -> Path | None:
    """The published results; None without the repository."""
    try:
        return published_dir()
    except MissingFilesError:
        return None
