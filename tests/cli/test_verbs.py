"""The command `frugalvlm`: help, quick answers, what verbs hand on, missing extras."""

import importlib
import os
import re
import subprocess
import sys
import types

import pytest

from frugalvlm import cli
from frugalvlm.paths import project_root


def test_help_has_a_line_for_every_verb_of_invoke(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(str(project_root()))
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    tasks = importlib.import_module("tasks")
    known = {name for name, task in vars(tasks).items() if type(task).__name__ == "Task"}
    assert known - {"lint", "clean"}
    for verb in known - {"lint", "clean"}:
        assert re.search(rf"[.B] {verb} [A-Z][^.]*\.", said), verb


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["reproduce", "--paper", "visionzap"], ["reproduce", "--paper", "aim", "-n", "x"],
     ["train", "--device", "gpu"], ["nothing"]],
)  # fmt: skip
def test_small_answers_import_no_torch(arguments):
    heavy = "torch", "transformers", "matplotlib"
    done = subprocess.run(
        [sys.executable, "-c",
         "import sys\nfrom frugalvlm.cli import main\n"
         "try:\n main(sys.argv[1:])\nexcept SystemExit:\n pass\n"
         f"print('heavy:', [name for name in {heavy} if name in sys.modules])", *arguments],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout


@pytest.fixture
def door(monkeypatch):
    """A door that only writes down what it is asked."""
    asked = []
    result = types.SimpleNamespace(table="the table", costs=None, skipped=[])
    fake = types.ModuleType("frugalvlm.door")
    fake.compare = lambda **told: asked.append(told) or result
    monkeypatch.setitem(sys.modules, "frugalvlm.door", fake)
    return asked


def test_compare_hands_methods_budgets_and_data_on(door, tmp_path, capsys):
    told = ["--methods", "fastv, visionzip", "--budgets", "48,25%", "-n", "9", "--model", "m"]
    assert cli.main(["compare", *told, "--data", "pocket-gqa,pocket-mme"]) == 0
    assert cli.main(["compare", "--methods", "fastv", "--data", str(tmp_path)]) == 0
    assert door == [
        {"methods": ["fastv", "visionzip"], "budgets": ["48", "25%"], "n": 9, "model": "m",
         "data": ["pocket-gqa", "pocket-mme"]},
        {"methods": ["fastv"], "data": str(tmp_path)},
    ]  # fmt: skip
    assert "the table" in capsys.readouterr().out


def test_publish_follows_the_run(monkeypatch, capsys):
    done = []
    command = importlib.import_module("frugalvlm.reproduce.command")
    fake = types.ModuleType("frugalvlm.reproduce.publish")
    fake.publish = lambda scale, keys: done.append(("publish", scale, list(keys))) or []
    monkeypatch.setitem(sys.modules, "frugalvlm.reproduce.publish", fake)
    monkeypatch.setattr(command, "reproduce", lambda *given: done.append(("run", given[0])))
    assert cli.main(["reproduce", "--paper", "aim", "--publish"]) == 0
    assert done == [("run", "aim"), ("publish", "pocket", ["aim"])]
    done.clear()
    assert cli.main(["reproduce", "--paper", "aim"]) == 0
    assert done == [("run", "aim")]


def test_which_tests_are_run(monkeypatch):
    run = []
    monkeypatch.setattr(
        cli.subprocess, "run",
        lambda command, cwd: run.append(command) or types.SimpleNamespace(returncode=3),
    )  # fmt: skip
    for given in ([], ["--all"], ["--only", "tests/cli tests/runs"], ["--faults"]):
        assert cli.main(["test", *given]) == 3
    where = [command[3 : command.index("-n")] for command in run]
    which = [command[command.index("-m", 3) + 1] for command in run if "-m" in command[3:]]
    assert where == [["tests"], ["tests"], ["tests/cli", "tests/runs"], ["tests/faults"]]
    assert which == [cli.FAST, cli.ALL, cli.FAST], "of the faults all"


def test_new_calls_the_scaffold(monkeypatch):
    made = []
    fake = types.ModuleType("frugalvlm.scaffold")
    fake.new_method = lambda key, root: made.append(("method", key, root))
    fake.new_paper = lambda key, root: made.append(("paper", key, root))
    monkeypatch.setitem(sys.modules, "frugalvlm.scaffold", fake)
    assert cli.main(["new", "--method", "mine"]) == cli.main(["new", "--paper", "theirs"]) == 0
    assert made == [("method", "mine", project_root()), ("paper", "theirs", project_root())]


def test_contracts_installs_a_release_and_tests_with_it(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(
        cli.subprocess, "run",
        lambda command, **how: ran.append((command, how)) or types.SimpleNamespace(returncode=0),
    )  # fmt: skip
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "mine")
    for asked, release in (("oldest", "5.17"), ("newest", "5.24"), ("5.20", "5.20")):
        ran.clear()
        assert cli.main(["contracts", "--transformers", asked]) == 0
        (install, _), (test, how) = ran
        assert f"transformers=={release}.*" in install
        folder = install[install.index("--target") + 1]
        first, second = how["env"]["PYTHONPATH"].split(os.pathsep)
        assert (first, second) == (folder, "mine")
        assert release in folder
        assert "tests/contract" in test
    ran.clear()
    assert cli.main(["contracts", "--transformers", "latest"]) == 2
    assert not ran
    assert "a release such as 5.20; got 'latest'" in capsys.readouterr().err


def test_a_missing_library_names_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "frugalvlm.reproduce.printed", raising=False)
    for name in [name for name in sys.modules if name.startswith("rich.")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["papers"]) == 2
    said = capsys.readouterr().err
    assert "needs rich" in said
    assert "pip install -e '.[study]'" in said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["test"]) == cli.main(["lab"]) == 2
    said = capsys.readouterr().err
    assert "'.[test]'" in said
    assert "needs jupyterlab" in said


def test_a_loaded_model_needs_the_core_only():
    """What [study] brings is hidden; a method still runs on an embedded model."""
    hidden = "rich matplotlib seaborn datasets codecarbon optuna papermill nbconvert psutil pynvml"
    done = subprocess.run(
        [sys.executable, "-c",
         f"import sys\nsys.modules.update(dict.fromkeys({hidden!r}.split()))\n"
         "from frugalvlm import load_vlm, methods\nimport frugalvlm.pocket.scenes as scenes\n"
         "assert 'load_digits' not in vars(scenes)\n"
         "model, processor = load_vlm('pocket-llava-small')\n"
         "with methods.VisionZip(14, 2).on(model): pass\nprint('served')"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "served", done.stderr[-2000:]


def test_interruption_says_that_nothing_is_lost(monkeypatch, capsys):
    def interrupted(given):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_papers", interrupted)
    assert cli.main(["papers"]) == 130
    assert "same command continues" in capsys.readouterr().err
