"""The commands of tasks.py: each has help, errors are one sentence, lists agree with each other."""

import json
import os
import subprocess
import sys

import pytest
from invoke import Context

from frugalvlm.methods import METHODS
from frugalvlm.papers import KEYS, all_papers
from frugalvlm.paths import project_root
from frugalvlm.reproduce import command as rep
from frugalvlm.reproduce.printed import print_comparison
from frugalvlm.runs.options import sizes_for
from frugalvlm.runs.records import RecordError


def _invoke(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "invoke", *arguments],
        cwd=project_root(), capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_every_task_has_a_line_of_help():
    done = _invoke("--list", "--list-format", "json")
    assert done.returncode == 0, done.stderr
    tasks = {task["name"]: task["help"] for task in json.loads(done.stdout)["tasks"]}
    assert {"papers", "reproduce", "compare", "train", "lab", "test", "lint", "clean"} <= set(tasks)
    assert all(help_ for help_ in tasks.values())
    assert {"bench", "new", "readme"} <= set(tasks)
    assert len(tasks) <= 14


def test_papers_lists_all():
    done = _invoke("papers", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert all(key in done.stdout for key in KEYS)


@pytest.mark.parametrize(
    ("arguments", "n"),
    [({"paper": "aim"}, 200), ({"all_": True}, 100), ({"all_": True, "n": "7"}, 7)],
)
def test_all_papers_are_asked_less(arguments, n, monkeypatch):
    monkeypatch.syspath_prepend(str(project_root()))
    import tasks

    asked = []
    monkeypatch.setattr(rep, "reproduce", lambda paper, scale, options: asked.append(options))
    monkeypatch.setattr(rep, "reproduce_all", lambda scale, options: asked.append(options))
    tasks.reproduce.body(Context(), **arguments)
    assert [options.n for options in asked] == [n]
    assert asked[0].repeats == sizes_for(n)["repeats"], "what is measured goes with the questions"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("reproduce", "--paper", "visionzap"), "visionzip"),
        (("reproduce", "--paper", "visionzip", "--scale", "huge"), "pocket, blueprint or full"),
        (("reproduce", "--paper", "nvila"), "invoke papers"),
        (("reproduce", "--paper", "visionzip", "--model", "pocket-none"), "Known: pocket"),
    ],
)
def test_bad_input_ends_with_one_sentence(arguments, sentence, tmp_path):
    done = _invoke(*arguments, FRUGALVLM_RESULTS=str(tmp_path))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.rglob("*.json")), "nothing may be left behind"


@pytest.mark.slow
def test_full_scale_without_weights_says_what_to_fetch(tmp_path):
    done = _invoke(
        "reproduce", "--paper", "visionzip", "--scale", "full",
        FRUGALVLM_RESULTS=str(tmp_path), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"),
    )  # fmt: skip
    assert done.returncode == 2
    assert "hf download llava-hf/llava-1.5-7b-hf" in done.stderr
    assert "14 GB" in done.stderr
    assert "Traceback" not in done.stderr


def test_compare_without_records_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    monkeypatch.setattr("frugalvlm.paths.published_dir", lambda: tmp_path / "published")
    with pytest.raises(RecordError, match="invoke reproduce --paper visionzip"):
        print_comparison()


def test_one_name_everywhere():
    """Method file, class key, data file and notebook carry the paper's key."""
    root = project_root()
    for key, cls in METHODS.items():
        module = cls.__module__.rsplit(".", 1)[-1]
        assert key == module or key.startswith(module + "_"), key
    reproduced = {p.key for p in all_papers() if p.status["pocket"] != "planned"}
    notebooks = {p.stem for p in (root / "notebooks" / "papers").glob("*.ipynb")}
    assert reproduced == notebooks
    assert reproduced <= set(METHODS) | {"cegi"}  # an index, and no method
    assert {p.stem for p in (root / "data" / "papers").glob("*.yaml")} == set(KEYS)
    readme = (root / "README.md").read_text()
    assert all(f"| {key} |" in readme or f"`{key}`" in readme for key in KEYS)
