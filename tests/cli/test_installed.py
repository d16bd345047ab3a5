"""The package without its repository: it carries what it needs and writes where it is called."""

import os
import subprocess
import sys

import pytest

from frugalvlm import paths
from frugalvlm.papers import load_paper
from frugalvlm.pocket.installed import WeightsError, verify
from frugalvlm.probes import training
from frugalvlm.runs.layout import ScaleError, pocket_table


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What `pip install .` puts into site-packages, built by setup.py itself."""
    pytest.importorskip("setuptools")
    base = tmp_path_factory.mktemp("build")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(base),
         "build", "--build-base", str(base), "--build-lib", str(base / "lib")],
        cwd=paths.project_root(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return base / "lib"


def _there(site, folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FRUGALVLM_")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
        env={**environment, "PYTHONPATH": str(site)},
    )  # fmt: skip


def test_it_carries_data_and_notebooks(site):
    root, inside = paths.project_root(), site / "frugalvlm" / "_files"
    for name in ("data", "notebooks"):
        ours = {p.relative_to(root / name) for p in (root / name).rglob("*") if p.is_file()}
        ours = {p for p in ours if not any(part.startswith(".") for part in p.parts)}
        there = {p.relative_to(inside / name) for p in (inside / name).rglob("*") if p.is_file()}
        assert there == {p for p in ours if p.suffix != ".tmp"}


def test_it_works_from_any_folder_and_leaves_itself_alone(site, tmp_path):
    before = sorted(site.rglob("*.ipynb"))
    told = (
        "import os; from frugalvlm import paths, cli; from frugalvlm.papers import all_papers\n"
        "from frugalvlm.report.notebooks import paper_notebook\n"
        "assert paths.repository() is None and len(all_papers()) >= 13\n"
        "assert paper_notebook('visionzip').is_file()\n"
        "print(paths.work_dir()); os.chdir('/'); print(paths.work_dir())\n"
        "print(paths.checkpoints_dir())\n"
        "assert cli.main(['readme']) == 2"
    )
    done = _there(site, tmp_path, "-c", told)
    assert done.returncode == 0, done.stderr
    results = str(tmp_path / "frugalvlm-results")
    assert done.stdout.split() == [results, results, f"{results}/checkpoints"]
    assert "needs a clone" in done.stderr
    assert sorted(site.rglob("*.ipynb")) == before
    assert _there(site, tmp_path, "-m", "frugalvlm.cli", "papers").returncode == 0


def test_a_copy_inside_a_clone_is_not_the_clone(monkeypatch, tmp_path):
    """A virtual environment in a clone holds a version of its own."""
    root = tmp_path / "clone"
    inside = root / ".venv" / "lib" / "site-packages" / "frugalvlm"
    for folder in (root / "data" / "papers", root / "src" / "frugalvlm", inside):
        folder.mkdir(parents=True)
    (root / "pyproject.toml").touch()
    monkeypatch.setattr(paths, "PACKAGE", inside)
    assert paths.repository() is None
    with pytest.raises(paths.MissingFilesError, match="needs a clone"):
        paths.project_root()
    monkeypatch.setattr(paths, "PACKAGE", root / "src" / "frugalvlm")
    assert paths.repository() == root


def test_messages_of_an_installed_package_name_remedies_that_work(monkeypatch, tmp_path):
    paper = load_paper("safe")
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "frugalvlm")
    monkeypatch.setattr(paths, "INSIDE", tmp_path / "frugalvlm" / "_files")
    monkeypatch.delenv("FRUGALVLM_DATA", raising=False)
    with pytest.raises(paths.MissingFilesError, match="force-reinstall"):
        paths.data_dir()
    with pytest.raises(WeightsError, match="force-reinstall") as error:
        verify(tmp_path / "pocket-llava-base")
    assert "git checkout" not in str(error.value)
    assert paths.command("papers") == "frugalvlm papers"
    with pytest.raises(ScaleError, match="`frugalvlm papers` shows"):
        pocket_table(paper)
    with pytest.raises(training.TrainingError, match="work in a clone"):
        training.train_and_install("pocket-llava-small", str(tmp_path / "run"))


def test_checkpoints_go_beside_results_that_lie_elsewhere(monkeypatch, tmp_path):
    monkeypatch.delenv("FRUGALVLM_RESULTS", raising=False)
    assert paths.checkpoints_dir() == paths.project_root() / "checkpoints"
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    assert paths.checkpoints_dir() == tmp_path / "checkpoints"
