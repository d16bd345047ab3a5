"""An executed paper notebook is kept while nothing that it depends on has changed."""

import json

import pytest

from frugalvlm.report import notebooks
from frugalvlm.runs.options import Options


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Calls of `execute`, which only writes what it was asked for."""
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path / "work"))
    source = tmp_path / "visionzip.ipynb"
    source.write_bytes(notebooks.paper_notebook("visionzip").read_bytes())
    monkeypatch.setattr(notebooks, "paper_notebook", lambda key: source)
    calls = []

    def execute(source, target, parameters):
        calls.append(dict(parameters))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        page = target.with_suffix(".html")
        page.write_text("page")
        return page

    monkeypatch.setattr(notebooks, "execute", execute)
    return calls


@pytest.fixture
def run(executed, tmp_path):
    def again(**options):
        folder = tmp_path / "work" / "pocket" / "visionzip"
        page = notebooks.execute_paper_notebook("visionzip", Options(n=5, **options), folder)
        assert page == folder / "visionzip.html"
        return len(executed)

    return again


def test_nothing_changed_nothing_is_executed(run):
    assert run() == 1
    assert run() == 1


def test_what_is_forced_is_executed(run):
    assert run() == 1
    assert run(force=True) == 2


def test_other_parameters_are_executed(run):
    assert run() == 1
    assert run(budgets=1) == 2
    assert run(budgets=1) == 2


def test_another_notebook_record_or_code_is_executed(run, tmp_path, monkeypatch):
    assert run() == 1
    source = tmp_path / "visionzip.ipynb"
    notebook = json.loads(source.read_text())
    notebook["cells"][0]["source"] += ["another word"]
    source.write_text(json.dumps(notebook))
    assert run() == 2
    records = tmp_path / "work" / "pocket" / "aim" / "records"
    records.mkdir(parents=True)
    (records / "a.json").write_text("{}")
    assert run() == 3
    assert run() == 3
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("x = 1")
    monkeypatch.setattr(notebooks, "PACKAGE", package)
    assert run() == 4


@pytest.mark.parametrize("harm", ["no page", "half a notebook", "no notebook"])
def test_what_is_not_whole_is_executed(run, tmp_path, harm):
    assert run() == 1
    folder = tmp_path / "work" / "pocket" / "visionzip"
    if harm == "no page":
        (folder / "visionzip.html").unlink()
    elif harm == "no notebook":
        (folder / "visionzip.ipynb").unlink()
    else:
        (folder / "visionzip.ipynb").write_text("{")
    assert run() == 2
