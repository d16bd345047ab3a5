"""Notebooks run small under nbval, refuse what they do not know, and carry no outputs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from papermill.parameterize import parameterize_notebook

from frugalvlm.papers import KEYS, load_paper
from frugalvlm.paths import project_root
from frugalvlm.pocket.installed import save_vlm
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.report import notebooks
from frugalvlm.report.pages import FigurelessError

SOURCES = sorted((project_root() / "notebooks").rglob("*.ipynb"))
SMALL = {
    "n": 12,
    "benchmarks": ["pocket-gqa", "pocket-textvqa"],
    "budgets": 1,
    "repeats": 2,
    "energy_window_s": 0.1,
}
SMALL_TRAINING = {
    **dict.fromkeys(("language_steps", "tower_steps", "align_steps", "instruct_steps"), 2),
    "scenes": 3,
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_source_notebooks_are_bare_and_typed(source):
    notebook = nbformat.read(source, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert 7 <= len(code) <= 14
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        name, rest = line.split(":", 1)
        assert name.isidentifier(), line
        assert "=" in rest, f"{line}: a parameter has a type and a default"
        assert "  # " in rest, f"{line}: a parameter has a help comment"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_figures_show_names_and_not_keys(source):
    code = "".join(c.source for c in nbformat.read(source, 4).cells if c.cell_type == "code")
    assert not re.findall(r"f.\{(?:method\.)?key\}", code), "method_label(key) is what it is called"


def test_paper_notebooks_carry_the_papers_keys():
    assert {p.stem for p in SOURCES if p.parent.name == "papers"} <= set(KEYS)


def _run_under_nbval(source: Path, parameters: dict, tmp_path: Path) -> None:
    """The source notebook with small parameters, cell by cell, its own assertions included."""
    small = parameterize_notebook(papermill.iorw.load_notebook_node(str(source)), parameters)
    copy = tmp_path / source.name
    nbformat.write(small, copy)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-p",
         "no:cacheprovider", "--rootdir", str(tmp_path), "-c", os.devnull, "-q", str(copy)],
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, **notebooks.QUIET, "FRUGALVLM_RESULTS": str(tmp_path / "results")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    cells = sum(cell.cell_type == "code" for cell in small.cells)
    assert f"{cells} passed" in done.stdout


def _random_model(folder: Path, name: str = "pocket-llava-tiny") -> str:
    """The folder of a model of random weights, so that a test depends on none that is trained."""
    torch.manual_seed(0)
    save_vlm(build_model(name), build_processor(), folder)
    return str(folder)


def _records_of_paper(key: str, models: dict[str, str], tmp_path: Path) -> int:
    """Runs a paper's notebook small; how many records it left, a figure beside them."""
    _run_under_nbval(notebooks.paper_notebook(key), {**SMALL, **models}, tmp_path)
    folder = tmp_path / "results" / "pocket" / key
    assert (folder / "kept_tokens.png").stat().st_size > 10_000
    return len(list((folder / "records").glob("*.json")))


def _rows(key: str) -> int:
    """Rows of a paper's pocket table at its first budget, those that stand once among them."""
    table = load_paper(key).pocket_table
    return sum(budget in (None, table.budgets[0]) for _, budget in table.lines())


@pytest.mark.notebook
def test_training_notebook_runs_under_nbval(tmp_path):
    source = project_root() / "notebooks" / "learn" / "train_a_pocket_vlm.ipynb"
    _run_under_nbval(source, {**SMALL_TRAINING, "folder": str(tmp_path / "run")}, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(e["stage"], e["step"]) for e in log] == [
        (stage, step) for stage in ("language", "tower", "align", "instruct") for step in (0, 1)
    ]


@pytest.mark.notebook
def test_benchmark_notebook_runs_under_nbval(tmp_path):
    source = project_root() / "notebooks" / "learn" / "the_pocket_benchmarks.ipynb"
    small = {"n": 12, "benchmarks": ["pocket-gqa"], "budgets": [16], "images": 4}
    _run_under_nbval(source, {**small, "model": _random_model(tmp_path / "tiny")}, tmp_path)
    records = list((tmp_path / "results/pocket/benchmarks/records").glob("*.json"))
    # Untouched, blank and four choices; seven exits of eight layers; the attention maps.
    assert len(records) == 2 + 4 + 7 + 1


@pytest.mark.notebook
def test_visionzip_notebook_runs_under_nbval(tmp_path):
    records = _records_of_paper("visionzip", {}, tmp_path)
    # Two benchmarks, the rows of one budget; efficiency and attention.
    assert records == 2 * _rows("visionzip") + 2


@pytest.mark.notebook
def test_fastervlm_notebook_runs_under_nbval(tmp_path):
    models = {"model": _random_model(tmp_path / "tiny")}
    records = _records_of_paper("fastervlm", models, tmp_path)
    # Two benchmarks, the rows of one budget; efficiency, attention, the analysis.
    assert records == 2 * _rows("fastervlm") + 3


@pytest.mark.notebook
def test_sgl_notebook_runs_under_nbval(tmp_path):
    models = {
        "model": _random_model(tmp_path / "model"),
        "guide": _random_model(tmp_path / "guide", "pocket-llava-small"),
    }
    records = _records_of_paper("sgl", models, tmp_path)
    # Two benchmarks: the rows of one budget, SGL at the smallest budget, its twelve variants, its
    # guide and three exits; efficiency and attention; three analyses.
    assert records == 2 * (_rows("sgl") + 1 + 12 + 4) + 2 + 3


@pytest.mark.notebook
def test_aim_notebook_runs_under_nbval(tmp_path):
    models = {"model": _random_model(tmp_path / "tiny")}
    records = _records_of_paper("aim", models, tmp_path)
    # Two benchmarks: the rows of one budget and three of the ablation; efficiency and attention.
    assert records == 2 * (_rows("aim") + 3) + 2


@pytest.mark.notebook
def test_cegi_notebook_runs_under_nbval(tmp_path):
    small = {
        "n": 6, "repeats": 2, "energy_window_s": 0.1, "model": _random_model(tmp_path / "tiny"),
        "guide": _random_model(tmp_path / "guide"),
    }  # fmt: skip
    _run_under_nbval(notebooks.paper_notebook("cegi"), small, tmp_path)
    assert len(list((tmp_path / "results/pocket/cegi/records").glob("*.json"))) == 1


def _notebook(folder: Path, cell: str, kernel: str = "python3") -> Path:
    nb = nbformat.v4.new_notebook()
    parameters = nbformat.v4.new_code_cell(
        "n: int = 1  # a number", metadata={"tags": ["parameters"]}
    )
    nb.cells = [parameters, nbformat.v4.new_code_cell(cell)]
    nb.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    path = folder / "small.ipynb"
    nbformat.write(nb, path)
    return path


def test_execution_gives_a_notebook_and_a_page(tmp_path):
    source = _notebook(tmp_path, "print('n is', n * 2)")
    page = notebooks.execute(source, tmp_path / "out" / "small.ipynb", {"n": 21})
    assert "n is 42" in page.read_text()
    assert "n is 42" in str(nbformat.read(tmp_path / "out" / "small.ipynb", as_version=4))
    assert not list((tmp_path / "out").glob("*.failed*"))
    assert str(tmp_path) not in (tmp_path / "out" / "small.ipynb").read_text()


FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"


def test_a_shells_backend_does_not_take_the_figures_away(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    page = notebooks.execute(_notebook(tmp_path, FIGURE), tmp_path / "out" / "small.ipynb", {})
    assert "data:image/png" in page.read_text()


def test_a_page_without_its_figures_is_a_failure(tmp_path):
    cell = f"import matplotlib\nmatplotlib.use('Agg')\n{FIGURE}"
    with pytest.raises(FigurelessError, match=r"1 cells, but only 0 hold a picture"):
        notebooks.execute(_notebook(tmp_path, cell), tmp_path / "out.ipynb", {})
    assert not (tmp_path / "out.html").exists()
    assert (tmp_path / "out.failed.ipynb").is_file()


def test_the_kernel_starts_without_a_word(tmp_path, capfd):
    notebooks.execute(_notebook(tmp_path, "print(n)"), tmp_path / "out.ipynb", {})
    assert "TCP" not in capfd.readouterr().err


def test_unknown_parameters_are_refused_before_anything_runs(tmp_path):
    source = _notebook(tmp_path, "raise RuntimeError('ran')")
    with pytest.raises(notebooks.NotebookError, match=r"no parameter question_count.*It has: n"):
        notebooks.execute(source, tmp_path / "out.ipynb", {"question_count": 3})
    assert not (tmp_path / "out.ipynb").exists()


def test_a_missing_kernel_is_named_with_the_remedy(tmp_path):
    source = _notebook(tmp_path, "1", kernel="no-such-kernel")
    with pytest.raises(notebooks.NotebookError, match=r"no-such-kernel.*ipykernel install"):
        notebooks.execute(source, tmp_path / "out.ipynb", {})


def test_a_failed_cell_leaves_no_result_but_a_trail(tmp_path):
    source = _notebook(tmp_path, "assert n > 5, 'too small'")
    with pytest.raises(notebooks.NotebookError, match="AssertionError: too small"):
        notebooks.execute(source, tmp_path / "out.ipynb", {"n": 2})
    assert not (tmp_path / "out.ipynb").exists()
    assert not (tmp_path / "out.html").exists()
    assert (tmp_path / "out.failed.ipynb").is_file()


def test_a_paper_without_a_notebook_says_so():
    with pytest.raises(notebooks.NotebookError, match="no notebook for 'nvila'"):
        notebooks.paper_notebook("nvila")
