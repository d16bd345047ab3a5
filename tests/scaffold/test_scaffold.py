"""What `invoke new` lays out runs and passes every test; what it refuses leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from frugalvlm.errors import FrugalError
from frugalvlm.paths import project_root
from frugalvlm.scaffold import ScaffoldError, files, new_method, new_paper
from frugalvlm.scaffold.registry import RegistryError, names_in, with_method

ROOT = project_root()
REGISTRY = (ROOT / files.REGISTRY).read_text()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As much of a repository as laying out looks at."""
    for folder in (
        "src/frugalvlm/methods", "src/frugalvlm/studies", "tests/methods", "data/papers",
        "notebooks/papers",
    ):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / files.REGISTRY).write_text(REGISTRY)
    return tmp_path


def state(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_method_has_a_file_a_test_and_its_lines(clone: Path) -> None:
    made = new_method("even_steps", clone)
    assert [path.relative_to(clone).as_posix() for path in made] == [
        "src/frugalvlm/methods/even_steps.py",
        "tests/methods/test_even_steps.py",
        "src/frugalvlm/methods/__init__.py",
    ]
    assert all("$" not in path.read_text() for path in made)
    old, new = REGISTRY.splitlines(), made[-1].read_text().splitlines()
    added = [line.strip() for line in new if line not in old]
    assert added[0] == "from frugalvlm.methods.even_steps import EvenSteps"
    assert set(added[1:]) <= {"EvenSteps,", '"EvenSteps",'}
    assert [line for line in new if line in old] == old


def test_a_paper_has_data_study_and_notebook_too(clone: Path) -> None:
    made = {path.relative_to(clone).as_posix(): path for path in new_paper("even_steps", clone)}
    assert set(made) == {
        where.format(key="even_steps") for where in (*files.PAPER, *files.METHOD)
    } | {files.REGISTRY}
    notebook = json.loads(made["notebooks/papers/even_steps.ipynb"].read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    with pytest.raises(ScaffoldError, match="exists already"):
        new_paper("even_steps", clone)


def test_a_paper_of_a_method_that_is_there_leaves_it_alone(clone: Path) -> None:
    method = new_method("even_steps", clone)
    before = [path.read_bytes() for path in method]
    assert len(new_paper("even_steps", clone)) == len(files.PAPER)
    assert [path.read_bytes() for path in method] == before


@pytest.mark.parametrize("lay_out", [new_method, new_paper])
@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("", "is no key"),
        ("Steps", "is no key"),
        ("even-steps", "is no key"),
        ("even steps", "is no key"),
        ("2steps", "is no key"),
        ("_steps", "is no key"),
        ("steps_", "is no key"),
        ("a__b", "is no key"),
        ("../steps", "is no key"),
        ("schritt\u00e9", "is no key"),
        ("steps\n", "is no key"),
        ("class", "is no key"),
        ("x" * 25, "is no key"),
        (None, "is no key"),
        ("vision_zip", "VisionZip already"),
        ("method", "Method already"),
    ],
)
def test_a_bad_key_is_refused_and_nothing_is_written(lay_out, key, complaint, clone) -> None:
    before = state(clone)
    with pytest.raises(ScaffoldError, match=complaint) as caught:
        lay_out(key, clone)
    assert isinstance(caught.value, FrugalError)
    assert str(caught.value).count("\n") == 0
    assert state(clone) == before


@pytest.mark.parametrize("taken", ["visionzip", "uniform", "base", "schedules"])
def test_a_taken_key_is_refused(taken: str) -> None:
    before = (ROOT / files.REGISTRY).read_bytes()
    with pytest.raises(ScaffoldError, match=r"exists already|has a|have a"):
        new_method(taken, ROOT)
    assert (ROOT / files.REGISTRY).read_bytes() == before


def test_a_study_in_several_files_takes_its_key(clone: Path) -> None:
    (clone / "src/frugalvlm/studies/even_steps").mkdir()
    with pytest.raises(ScaffoldError, match="exists already"):
        new_paper("even_steps", clone)


@pytest.mark.parametrize("failing", range(7))
def test_a_full_disk_leaves_nothing_half_written(failing, clone, monkeypatch) -> None:
    before, write, calls = state(clone), Path.write_text, []

    def full(path: Path, text: str, **more: str) -> int:
        calls.append(path)
        if len(calls) > failing:
            write(path, text[:10], **more)
            raise OSError(28, "No space left on device")
        return write(path, text, **more)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ScaffoldError, match="No space left on device"):
        new_paper("even_steps", clone)
    assert state(clone) == before


def test_another_folder_than_a_clone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScaffoldError, match="in a clone of the repository"):
        new_method("even_steps", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["a", "aim_more", "even_steps", "sgl2", "zz", "a1"])
def test_the_registry_keeps_ruffs_order(key: str) -> None:
    name = "".join(part.capitalize() for part in key.split("_"))
    made = with_method(REGISTRY, key, name)
    assert names_in(made) == names_in(REGISTRY) | {name}
    assert made.count(f"import {name}\n") == made.count(f" {name},\n") == 1
    command = ["ruff", "check", "--stdin-filename", str(ROOT / files.REGISTRY), "-"]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        input=made, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "text",
    [
        "METHODS = {}\n",
        "from frugalvlm.methods.a import A\nMETHODS = {}\n",
        "from frugalvlm.methods.a import A\nMETHODS = {m.key: m for m in (A,)}\n",
    ],
)
def test_a_registry_of_another_shape_is_left_to_the_reader(text: str) -> None:
    with pytest.raises(RegistryError):
        with_method(text, "even_steps", "EvenSteps")


@pytest.mark.parametrize("key", ["q", "abcdefghijklmnopqrstuvwx"])
def test_short_and_long_names_keep_the_style(key: str, clone: Path) -> None:
    made = [str(path) for path in new_paper(key, clone) if path.suffix in (".py", ".ipynb")]
    shutil.copy(ROOT / "pyproject.toml", clone)
    own = ["--config", 'lint.isort.known-first-party=["frugalvlm"]']  # the rest of it is not here
    for check in (["check", *own], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "--no-cache", *made],
            capture_output=True, text=True, cwd=clone,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_what_is_laid_out_passes_its_own_tests_and_the_contracts(tmp_path: Path) -> None:
    """In a copy of the repository: its test, contracts on one host, its data, its notebook."""
    for folder in ("src", "tests", "notebooks", "data/papers", "docs"):
        left_out = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    new_paper("even_steps", tmp_path)
    contracts = ["test_equivalence", "test_batches", "test_answers", "test_meta_and_gradients"]
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            "-k", "(even_steps and not llava_) or (even_steps and llava_clip)",
            "tests/methods/test_even_steps.py", "tests/study/test_papers.py", "tests/house",
            "tests/notebooks/test_notebooks.py", *(f"tests/contract/{c}.py" for c in contracts),
        ],
        capture_output=True, text=True, cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in ("FRUGALVLM_DATA", "PYTHONPATH")}
        | {"PYTHONPATH": str(tmp_path / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    last = done.stdout.strip().splitlines()
    assert sum(line.count(".") for line in last[:3]) >= 30, done.stdout[-2000:]
