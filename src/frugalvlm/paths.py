"""Where the kit keeps its data and its results.

In a clone (``pip install -e .``) data, notebooks and results lie beside the code in the repository.
A package that was installed without it (``pip install .``) carries data and notebooks inside, and
its results go to a folder of the caller's.

Results are in two places: those that are published, under version control, and the work folder,
where every run writes. No run changes what is published; `reproduce.publish` does. Two environment
variables move data and work folder: ``FRUGALVLM_DATA`` and ``FRUGALVLM_RESULTS``.
"""

import os
import tempfile
from pathlib import Path

from frugalvlm.errors import FrugalError, unwritable

__all__ = [
    "MissingFilesError",
    "UnwritableError",
    "check_writable",
    "checkpoints_dir",
    "command",
    "data_dir",
    "notebooks_dir",
    "project_root",
    "published_dir",
    "repository",
    "result_file",
    "results_places",
    "work_dir",
]


PACKAGE = Path(__file__).resolve().parent
INSIDE = PACKAGE / "_files"  # what setup.py copies into an installed package: data and notebooks


class MissingFilesError(FrugalError, FileNotFoundError):
    """Data or results that are not where they are looked for; the message names the remedy."""


class UnwritableError(FrugalError, OSError):
    """A folder in which nothing can be written; the message names the remedy."""


def check_writable(folder: Path) -> Path:
    """Make a folder for results, before anything is computed for it.

    Raises:
        UnwritableError: it cannot be made, or no file in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UnwritableError(unwritable(folder, error)) from error
    return folder


def repository() -> Path | None:
    """The folder of the clone this package runs from; None for an installed package."""
    root = PACKAGE.parents[1]
    # The very place, not any folder above: a copy installed in a virtual environment that lies in
    # a clone is another version of the code, and must not take the clone's data for its own.
    ours = PACKAGE.parent.name == "src" and (root / "pyproject.toml").is_file()
    return root if ours and (root / "data" / "papers").is_dir() else None


def command(verb: str) -> str:
    """How a verb of the kit is called from here: `invoke VERB` in a clone, else `frugalvlm VERB`.

    Args:
        verb: the verb with its options, for example "reproduce --paper visionzip".
    """
    return f"{'frugalvlm' if repository() is None else 'invoke'} {verb}"


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
        return work_dir() / "checkpoints"
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


def published_dir() -> Path:
    """The folder of published records, tables and executed notebooks: the repository's results/.

    Raises MissingFilesError when the package was installed without its repository.
    """
    return project_root() / "results"


def work_dir() -> Path:
    """The folder where every run writes.

    ``FRUGALVLM_RESULTS``, or results/.work of the repository, or, for an installed package,
    frugalvlm-results in the folder where it is first asked.

    It need not exist yet: whoever writes the first record creates it. A relative
    ``FRUGALVLM_RESULTS`` is made absolute in the environment when it is first asked for, so that
    notebooks and other processes, which run elsewhere, write into the same folder.

    Raises MissingFilesError when ``FRUGALVLM_RESULTS`` names a file or the published results.
    """
    override = os.environ.get("FRUGALVLM_RESULTS")
    root = repository()
    if not override and root is not None:
        return root / "results" / ".work"
    override = override or "frugalvlm-results"
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
