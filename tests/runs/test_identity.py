"""Identity of code: documentation and places are not part of it, statements that decide are."""

import importlib
import re
import shutil
import subprocess
import sys
import textwrap
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from frugalvlm import methods
from frugalvlm.methods import Blank, FastV, Method, Uniform, VisionZip
from frugalvlm.probes.controls import Chosen, RandomCut
from frugalvlm.runs import identity
from frugalvlm.runs.identity import CodeError, code_hash, code_of, of_other_code, other_code_line


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's files, whose code is what is hashed; `edit` changes one of them."""
    copy = tmp_path / "frugalvlm"
    shutil.copytree(Path(identity.__file__).parents[1], copy,
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    monkeypatch.setattr(identity, "__file__", str(copy / "runs" / "identity.py"))
    cached = (identity._files, identity._methods_imported, identity._statements)

    class Package:
        folder = copy

        def edit(self, file: str, old: str, new: str) -> None:
            text = (copy / file).read_text()
            if old == "return":  # the statement, not the word in a sentence
                old = re.search(r"\n +return (?=[A-Za-z(\[{])", text)[0]
                new = f"{old}1 and "
            assert old in text, (file, old)
            (copy / file).write_text(text.replace(old, new, 1))

        def code(self, method: Method | str) -> str:
            for function in cached:
                function.cache_clear()
            return code_hash(method)

    yield Package()
    for function in cached:
        function.cache_clear()


def test_the_copy_has_the_identity_of_the_package(package):
    inside = package.code(VisionZip(14, 2))
    assert len(inside) == 16
    assert int(inside, 16)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("methods/visionzip.py", '"""', '"""Another word. '),  # of the module
        ("methods/visionzip.py", "import torch", "# why\n\nimport torch"),
        ("loading.py", "FULL_SCALE_NEEDS:", '__all__ = ["load_vlm"]\nFULL_SCALE_NEEDS:'),
        ("engine/session.py", "from __future__ import annotations", ""),
        (
            "trace.py",
            "self._seen(image, processor, crop), grid",
            "self._seen(image, None, crop), grid",
        ),
        ("runs/records.py", "CLOCK_SLACK = timedelta(minutes=5)", "CLOCK_SLACK = timedelta(1)"),
        ("methods/aim.py", "class AIM(", "class Another(Method):\n    pass\n\n\nclass AIM("),
        ("methods/__init__.py", "METHODS", "ALL = 1\nMETHODS"),
        ("digest.py", "[:16]", "[:15]"),
    ],
)
def test_what_decides_no_answer_is_not_part_of_it(package, file, old, new):
    before = package.code(VisionZip(14, 2))
    package.edit(file, old, new)
    assert package.code(VisionZip(14, 2)) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("methods/base.py", "not 1 <= kept_tokens", "not 2 <= kept_tokens"),
        ("views.py", "CLS_SOURCE =", "CLS_SOURCE = 1 +"),
        ("engine/session.py", "return", "return 1 and"),
        ("benchmarks/asking.py", "do_sample=False", "do_sample=True"),
        ("benchmarks/metrics.py", "return", "return 1 and"),
        ("pocket/scenes.py", "IMAGE_SIZE =", "IMAGE_SIZE = 1 +"),
        ("pocket/onevision.py", "return", "return 1 and"),
        ("runs/accuracy.py", "prompts * t", "prompts + t"),
        ("hosts/llava.py", "return", "return 1 and"),
        ("methods/visionzip.py", "return", "return 1 and"),
    ],
)
def test_what_decides_an_answer_is(package, file, old, new):
    before = package.code(VisionZip(14, 2))
    package.edit(file, old, new)
    assert package.code(VisionZip(14, 2)) != before


def test_a_file_may_be_renamed_and_a_definition_moved(package):
    before = package.code(VisionZip(14, 2))
    (package.folder / "benchmarks" / "metrics.py").rename(
        package.folder / "benchmarks" / "measures.py"
    )
    assert package.code(VisionZip(14, 2)) == before
    source = (package.folder / "benchmarks" / "asking.py").read_text()
    moved = source[source.index("def chunks(") : source.index("def _check_shown(")]
    package.edit("benchmarks/asking.py", moved, "")
    with (package.folder / "benchmarks" / "measures.py").open("a") as file:
        file.write(f"\n\n{moved}")
    assert package.code(VisionZip(14, 2)) == before


def test_a_method_depends_on_the_methods_that_it_imports_alone(package):
    own = package.code(FastV(2, 16)), package.code(VisionZip(14, 2))
    package.edit("methods/schedules.py", "return", "return 1 and")
    assert package.code(FastV(2, 16)) != own[0], "FastV asks schedules"
    assert package.code(VisionZip(14, 2)) == own[1]
    package.edit("methods/visionzip.py", "import torch", "from frugalvlm.methods import ToMe")
    before = package.code(VisionZip(14, 2))
    package.edit("methods/tome.py", "return", "return 1 and")
    assert package.code(VisionZip(14, 2)) != before, "a class of the room's front"


def test_analyses_name_their_modules(package):
    before = package.code("studies.sgl")
    package.edit("studies/sgl.py", "return", "return 1 and")
    assert package.code("studies.sgl") != before
    import frugalvlm.studies.sgl as module

    assert code_hash(module) == code_hash("studies.sgl") == code_hash("frugalvlm.studies.sgl")
    with pytest.raises(CodeError, match=r"no module or room 'studies\.sgll'"):
        code_hash("studies.sgll")


def test_it_is_fast():
    for function in (identity._files, identity._methods_imported, identity._statements):
        function.cache_clear()
    began = time.process_time()
    code_of(VisionZip(14, 2))
    assert time.process_time() - began < 0.2
    began = time.process_time()
    for cls in methods.METHODS.values():
        code_hash(cls)
    assert time.process_time() - began < 0.1


# -- classes from elsewhere ------------------------------------------------------------------------

CELL = """
from dataclasses import dataclass
from typing import ClassVar
from frugalvlm.methods import Uniform
from frugalvlm.methods.base import check_budget

STEP = 2
ORDER = [3, 1, (2, "two")]


def chosen(grid):
    return helper(grid)


def helper(grid):
    return STEP, ORDER


def unused():
    return 1


@dataclass(frozen=True)
class Mine(Uniform):
    '''A sentence.'''

    key: ClassVar[str] = "mine"

    def picks(self, view):  # of a cell
        check_budget(1, 2)
        return chosen(view)
"""


def _in_notebook(*cells: str) -> str:
    """What a notebook's kernel would say, cell by cell; the last line printed."""
    script = f"""
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        for cell in {list(cells)!r}:
            shell.run_cell(cell, store_history=True).raise_error()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()[-1]


SAY = "from frugalvlm.runs.identity import code_of; print(code_of(Mine(16)))"


def _in_file(folder: Path, text: str, monkeypatch) -> str:
    """The same for a module of a user."""
    name = f"of_a_user_{uuid.uuid4().hex}"
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return code_of(importlib.import_module(name).Mine(16))


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A sentence.", "Another one.", True),
        ("  # of a cell", "", True),
        ("def unused():\n    return 1", "def unused():\n    return 2", True),
        ("check_budget(1, 2)", "check_budget(1, 3)", False),
        ("return helper(grid)", "return helper(grid) + 1", False),
        ("STEP = 2", "STEP = 3", False),
        ("[3, 1, (2,", "[1, 3, (2,", False),
        ('(2, "two")', '(2, "2")', False),
        ("(Uniform)", "(Uniform, Other)", False),
    ],
)
def test_a_users_class_counts_with_what_its_code_names(tmp_path, monkeypatch, old, new, same):
    assert old in CELL
    base = CELL + "\n\nclass Other:\n    pass\n"
    before = _in_file(tmp_path, base, monkeypatch)
    base = "class Other:\n    pass\n\n" + CELL
    assert (_in_file(tmp_path, base.replace(old, new), monkeypatch) == before) is same


@pytest.mark.slow
def test_a_class_of_a_notebook_has_an_identity():
    whole = _in_notebook(CELL, SAY)
    assert len(whole) == 16
    head, tail = CELL.split("@dataclass", 1)
    assert _in_notebook(head, "@dataclass" + tail, SAY) == whole, "in cells of its own"
    other = CELL.replace("return STEP", "return STEP + 1")
    assert _in_notebook(CELL, other, SAY) != whole, "what was run last counts"
    bare = CELL[: CELL.index("    def picks")]  # no function by whose cell it could be found
    assert _in_notebook(bare, SAY) not in (whole, _in_notebook(bare.replace("mine", "m"), SAY))


def test_no_source_is_one_sentence():
    made: dict = {}
    exec(CELL, made)  # as at a prompt without a memory
    made["Mine"].__module__ = "__main__"
    with pytest.raises(CodeError, match=r"source of 'Mine' cannot be found.*in a notebook cell"):
        code_of(made["Mine"](16))


def test_a_class_derived_from_a_method_depends_on_it(package):
    @dataclass(frozen=True)
    class Derived(VisionZip):
        key: ClassVar[str] = "derived"

    before = package.code(Derived)
    package.edit("methods/visionzip.py", "return", "return 1 and")
    assert package.code(Derived) != before
    assert package.code(Derived) != package.code(VisionZip)


def test_a_method_made_of_others_depends_on_them(package):
    @dataclass(frozen=True)
    class Pair(Uniform):
        key: ClassVar[str] = "pair"
        parts: tuple = field(default=(), kw_only=True)

    own = [Pair(16, parts=parts) for parts in ((), (VisionZip(14, 2),), (FastV(2, 16),))]
    assert len({package.code(pair) for pair in own}) == 3
    before = package.code(own[1])
    package.edit("methods/visionzip.py", "return", "return 1 and")
    assert package.code(own[1]) != before


def test_studies_own_classes_have_an_identity():
    kinds = (Blank, Chosen, RandomCut, methods.Vanilla)
    assert len({code_hash(kind) for kind in kinds}) == len(kinds)


# -- records of other code -------------------------------------------------------------------------


def _record(key: str, code: str) -> dict:
    return {"kind": "accuracy", "request": {"method": {"method": key}},
            "provenance": {"code": code}}  # fmt: skip


def test_records_of_other_code_are_counted_in_a_sentence():
    now = _record("visionzip", code_hash(VisionZip))
    old, foreign = _record("fastv", "0123456789abcdef"), _record("sgl_small", "0123456789abcdef")
    assert of_other_code([now, old, foreign]) == [old]
    assert other_code_line([now, foreign]) == ""
    assert other_code_line([now, old]).startswith("1 of 2 accuracy records were made by other code")
