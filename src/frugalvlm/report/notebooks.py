"""Executing a paper's notebook with parameters, and its HTML page."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

from frugalvlm.digest import request_hash
from frugalvlm.errors import FrugalError
from frugalvlm.paths import PACKAGE, data_dir, notebooks_dir, work_dir
from frugalvlm.report.pages import FigurelessError, figures_drawn, relink, write_page
from frugalvlm.runs.options import Options

# Progress bars and library warnings would end up as noise in the executed notebook. Figures are
# drawn by the kernel's own backend, whatever the shell's MPLBACKEND says: with Agg a page has none.
QUIET = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm asks for widgets that a page cannot show
}


class NotebookError(FrugalError, ValueError):
    """A notebook that cannot be run as asked; the message names the remedy."""


def paper_notebook(key: str) -> Path:
    """The source notebook of a paper.

    Raises:
        NotebookError: when the paper has none yet.
    """
    path = notebooks_dir() / "papers" / f"{key}.ipynb"
    if not path.is_file():
        raise NotebookError(f"There is no notebook for '{key}' yet ({path}).")
    return path


def execute(source: Path, target: Path, parameters: Mapping[str, Any]) -> Path:
    """Run a notebook with parameters and write the executed copy and its HTML page.

    Both files appear only when the run is over; a failed run leaves `TARGET.failed.ipynb`.

    Args:
        source: a notebook with one cell tagged `parameters`.
        target: where the executed copy goes.
        parameters: values for that cell; names it does not have are refused.

    Returns:
        The HTML page, beside `target`.

    Raises:
        NotebookError: unknown parameter, missing kernel, or a cell that failed.
        FigurelessError: a cell drew a figure that is not in the executed copy.
    """
    known = papermill.inspect_notebook(str(source))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise NotebookError(
            f"{source.name} has no parameter {', '.join(unknown)}. It has: {', '.join(known)}."
        )
    kernel = nbformat.read(source, as_version=4).metadata.get("kernelspec", {}).get("name", "")
    try:
        KernelSpecManager().get_kernel_spec(kernel)
    except NoSuchKernel as error:
        raise NotebookError(
            f"The notebook's kernel '{kernel}' is not installed: run "
            "`python -m ipykernel install --sys-prefix` in this environment."
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    running = target.with_suffix(".failed.ipynb")
    try:
        with mock.patch.dict(os.environ, QUIET):
            papermill.execute_notebook(
                str(source),
                str(running),
                dict(parameters),
                progress_bar=False,
                cwd=str(source.parent),
                # Or the kernel warns that it listens on this machine without encryption.
                extra_arguments=["--log-level=ERROR"],
            )
    except papermill.exceptions.PapermillExecutionError as error:
        raise NotebookError(
            f"Cell {error.exec_count} of {source.name} failed with {error.ename}: {error.evalue} "
            f"(see {running})."
        ) from error
    executed = nbformat.read(running, as_version=4)
    # Where this machine keeps its files is nobody's business and would differ in every copy.
    executed.metadata.papermill.update(input_path=source.name, output_path=target.name)
    nbformat.write(executed, running)
    drawn, held = figures_drawn(executed)
    if held < drawn:
        raise FigurelessError(
            f"{source.name} draws figures in {drawn} cells, but only {held} hold a picture "
            f"(see {running}): run it without a matplotlib backend of your own."
        )
    page = write_page(executed, target.with_suffix(".html"))
    os.replace(running, target)
    return page


def execute_paper_notebook(key: str, options: Options, folder: Path) -> Path:
    """Execute a paper's notebook on records that exist already; returns the HTML page.

    An executed copy of the very same notebook, parameters, code, figures and records is kept,
    unless `options.force` is set.
    """
    parameters: dict[str, Any] = {"n": options.n, "model": options.model, "device": options.device}
    if options.benchmarks is not None:
        parameters["benchmarks"] = list(options.benchmarks)
    if options.budgets is not None:
        parameters["budgets"] = options.budgets
    source = paper_notebook(key)
    # Not every notebook measures energy or needs a second model.
    for name in {"repeats", "energy_window_s", "guide"} & set(
        papermill.inspect_notebook(str(source))
    ):
        parameters[name] = getattr(options, name)
    target = folder / f"{key}.ipynb"
    page = target.with_suffix(".html")
    if options.force or not page.is_file() or _made_of(target) != _state(source, parameters):
        page = execute(source, target, parameters)
        _note(target, _state(source, parameters))  # a notebook may have made records itself
    relink(folder.parents[1], only=page)
    return page


def _state(source: Path, parameters: Mapping[str, Any]) -> str:
    """What an executed paper notebook depends on, as one hash."""
    code = sorted(PACKAGE.rglob("*.py"))
    figures = sorted((data_dir() / "papers").iterdir())
    made = sorted(work_dir().rglob("records/*.json"))  # what it takes of others is copied there
    digest = hashlib.sha256()
    for path in (source, *code, *figures):
        digest.update(path.name.encode() + path.read_bytes())
    for path in made:
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}".encode())
    libraries = [metadata.version(name) for name in ("torch", "transformers", "matplotlib")]
    return request_hash([digest.hexdigest(), dict(parameters), libraries])


def _made_of(executed: Path) -> str | None:
    """The state that an executed copy was made of; None where nothing is noted."""
    try:
        noted = json.loads(executed.read_text(encoding="utf-8"))["metadata"]
        return noted.get("frugalvlm", {}).get("state")
    except (OSError, ValueError, KeyError):
        return None


def _note(executed: Path, state: str) -> None:
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata["frugalvlm"] = {"state": state}
    temporary = executed.with_suffix(".ipynb.tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, executed)
