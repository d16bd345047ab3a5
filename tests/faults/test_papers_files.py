"""Papers' files: listed by the folder, refused with file, line and remedy, one by one."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from frugalvlm import papers, paths
from frugalvlm.errors import FrugalError
from frugalvlm.papers import paper
from frugalvlm.papers.page import format_page
from frugalvlm.paths import project_root
from frugalvlm.runs.layout import ScaleError, check_methods


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of papers, and those of which it was said already that they are left out."""
    folder = tmp_path / "papers"
    shutil.copytree(paths.data_dir() / "papers", folder)
    monkeypatch.setattr(paper, "_NAMED", set())
    return folder


def replaced(old: str, new: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        text = content.decode()
        assert old in text
        return text.replace(old, new, 1).encode()

    return change


# A change, the line that is named (by its number, or by how the last such line begins), the remedy.
DESCRIPTIONS: dict[str, tuple[Callable[[bytes], bytes], int | str, str]] = {
    "empty": (lambda b: b"", 1, "restore it"),
    "comments alone": (lambda b: b"# nothing\n", 1, "begin with key: visionzip"),
    "a list": (lambda b: b"- key\n- title\n", 1, "begin with key: visionzip"),
    "a word": (lambda b: b"visionzip", 1, "begin with key: visionzip"),
    "bytes": (lambda b: b[:30] + b"\xff\xfe" + b[30:], 2, "save the file as UTF-8"),
    "a zero byte": (lambda b: b[:30] + b"\x00" + b[30:], 2, "remove it"),
    "part of it": (lambda b: b[: b.index(b"{kind: ret") + 9], 0, "close what was opened"),
    "up to the claims": (lambda b: b[: b.index(b"claims:")], 1, "lacks the field 'claims'"),
    "no claim": (
        lambda b: b[: b.index(b"claims:") + 7], "claims:", "claims must be a list, not nothing",
    ),
    "tabs": (replaced("  url: ", "\turl: "), 9, "indent with spaces, not with tabs"),
    "two documents": (lambda b: b + b"---\nkey: x\n", "---", "no YAML"),
    "an unknown field": (replaced("venue:", "venu:"), 6, "did you mean 'venue'?"),
    "one in a claim": (
        replaced("  threshold: 97.7", "  treshold: 97.7"),
        "  treshold", "did you mean 'threshold'?",
    ),
    "one in a budget": (
        replaced("paper_tokens: 128,", "tokens: 128,"),
        "    - {tokens: 128", "models[0].budgets[1] has no",
    ),
    "a field of the reader": (replaced("year: 2024", "year: 2024\nfolder: /"), 8, "no field 'fold"),
    "a field twice": (replaced("year: 2024", "year: 2024\nyear: 2025"), 8, "in line 7 already"),
    "another key": (replaced("key: visionzip", "key: zip"), 1, "describes 'zip', not 'visionzip'"),
    "a claim twice": (
        replaced("id: retention-third", "id: retention-ninth"),
        "- id: retention-ninth", "stands twice in claims",
    ),
    "a layout twice": (
        replaced("- id: efficiency", "- id: table1"), "- id: table1", "stands twice in tables",
    ),
    "a method twice": (
        replaced("- {method: random, label: random}", "- {method: avgpool, label: r}"),
        "  - {method: avgpool, label: avg",
        "layout table1: the method 'avgpool' stands twice in rows",
    ),
    "text for a number": (
        replaced("threshold: 97.7", "threshold: much"),
        "  threshold: much", 'must be a number, not "much"',
    ),
    "a number as text": (replaced("year: 2024", "year: '2024'"), 7, "must be a whole number"),
    "text as a number": (replaced('"2412.04467"', "2412.04467"), 4, "numbers in quotes"),
    "no number": (
        replaced("threshold: 97.7", "threshold: .nan"), "  threshold: .nan", "a finite number",
    ),
    "no quantity": (
        replaced("kind: retention,", "kid: retention,"),
        "  quantity: {kid", "None is none of retent",
    ),
    "itself": (replaced("[encoder reducer]", "&a [*a]"), 1, "simplify it"),
    "code": (replaced("year: 2024", "year: !!python/object:os.x y"), 1, "simplify it"),
}  # fmt: skip
FIGURES: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    "empty": (lambda b: b"", 1, "restore it"),
    "another header": (replaced("paper,table", "paper,tabel"), 1, "the first line must be paper,"),
    "a cell more": (replaced("\nvisionzip,", "\nvisionzip,x,"), 2, "13 cells instead of 12"),
    "a cell less": (replaced(",POPE,score as printed,77.0", ",POPE,77.0"), 137, "11 cells"),
    "half of it": (lambda b: b[: b.index(b",77.0,")], 137, "8 cells instead of 12"),
    "text for a value": (replaced(",77.0,", ",77.O,"), 137, "value is '77.O'; write a number"),
    "no number": (replaced(",77.0,", ",nan,"), 137, "value is 'nan'; write a number"),
    "text for a count": (replaced("(54+10),64,POPE,", "(54+10),few,POPE,"), 137, "write a count"),
    "yes": (replaced(",true", ",yes"), 2, "write true or false"),
    "another paper": (replaced("\nvisionzip", "\nsafe"), 2, "this file is of 'visionzip'"),
    "a figure twice": (lambda b: b + b.splitlines()[1] + b"\n", 863, "stands in line 2"),
    "bytes": (lambda b: b.replace(b"\nvision", b"\n\xff", 1), 2, "save the file as UTF-8"),
    "an open quote": (replaced(",POPE,", ',"POPE,'), 0, "is a double quote left open"),
}  # fmt: skip
CASES = [("visionzip.yaml", name) for name in DESCRIPTIONS] + [
    ("visionzip.csv", name) for name in FIGURES
]


@pytest.mark.parametrize(("file", "name"), CASES)
def test_what_breaks_the_format_is_named_with_line_and_remedy(
    file: str, name: str, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, line, remedy = (DESCRIPTIONS if file.endswith("yaml") else FIGURES)[name]
    path = copied / file
    path.write_bytes(change(path.read_bytes()))
    if isinstance(line, str):
        lines = path.read_text(encoding="utf-8").splitlines()
        line = max(i for i, text in enumerate(lines, 1) if text.startswith(line))
    with pytest.raises(papers.PaperFormatError) as caught:
        papers.load_paper("visionzip", copied)
    said = str(caught.value)
    assert said.startswith(f"{path}:{line or ''}")
    assert remedy in said
    assert "\n" not in said
    assert said.endswith("See docs/papers_format.md.")
    with caplog.at_level(logging.WARNING):
        others = papers.all_papers(copied)
        papers.all_papers(copied)
    assert [p.key for p in others] == [k for k in papers.KEYS if k != "visionzip"]
    assert [record.getMessage().count(said) for record in caplog.records] == [1], "named once"


@pytest.mark.parametrize("ending", ["\r\n", "\n\n"])
def test_line_ends_and_empty_lines_do_not_matter(ending: str, copied: Path) -> None:
    path = copied / "visionzip.csv"
    path.write_bytes(path.read_bytes().replace(b"\n", ending.encode()))
    assert papers.load_paper("visionzip", copied).figures.equals(
        papers.load_paper("visionzip").figures
    )


def test_a_header_alone_is_a_paper_without_figures(copied: Path) -> None:
    (copied / "safe.csv").write_text(",".join(papers.COLUMNS) + "\n")
    assert papers.load_paper("safe", copied).figures.empty
    (copied / "safe.csv").unlink()
    with pytest.raises(papers.PaperFormatError, match="the file is missing; a paper without fig"):
        papers.load_paper("safe", copied)


def test_a_printed_number_of_a_broken_paper_is_none(copied: Path) -> None:
    """VisionZip's table quotes FasterVLM's score without visual tokens; it goes on without."""
    table = papers.load_paper("visionzip").table("table1")
    (row,) = [row for row in table.rows if row.method == "no_image"]
    assert papers.load_paper("visionzip", copied).printed(table, row, table.columns[0]) == 37.38
    (copied / "fastervlm.csv").write_text("broken\n")
    assert papers.load_paper("visionzip", copied).printed(table, row, table.columns[0]) is None


def test_the_folder_lists_the_papers(copied: Path) -> None:
    known = papers.keys(copied)
    assert known == papers.KEYS == papers.keys()
    text = (copied / "safe.yaml").read_text()
    (copied / "later.yaml").write_text(
        text.replace("key: safe", "key: later").replace("2412.03587", "2503.0001")
    )
    (copied / "later.csv").write_text((copied / "safe.csv").read_text().replace("safe,", "later,"))
    (copied / "unreadable.yaml").write_text("")
    (copied / "notes.txt").write_text("no paper")
    (copied / ".safe.yaml.yaml").write_text("left by an editor")
    assert papers.keys(copied) == (*known, "later", "unreadable")
    assert papers.load_paper("later", copied).url.endswith("2503.0001v2")
    assert [paper.key for paper in papers.all_papers(copied)] == [*known, "later"]


def test_a_file_is_read_again_when_it_changes(copied: Path) -> None:
    before = papers.load_paper("safe", copied)
    assert papers.load_paper("safe", copied) is before
    path = copied / "safe.yaml"
    path.write_text(path.read_text().replace("year: 2024", "year: 2025"))
    os.utime(path, ns=(1, 1))
    assert papers.load_paper("safe", copied).year == 2025


def test_a_method_that_the_kit_does_not_know_is_named_before_anything_runs(copied: Path) -> None:
    path = copied / "visionzip.yaml"
    text = path.read_text().replace(
        "{method: random, label: random}", "{method: randon, label: random}"
    )
    path.write_text(text)
    with pytest.raises(ScaleError, match=r"'randon' of layout 'table1'.*mean 'random'.*invoke new"):
        check_methods(papers.load_paper("visionzip", copied).table("table1"))
    check_methods(papers.load_paper("visionzip").table("table1"))


def test_one_broken_file_leaves_the_commands_alone(copied: Path) -> None:
    (copied / "safe.yaml").write_text("key: safe\n\ttitle: x\n")
    os.symlink(paths.data_dir() / "models", copied.parent / "models")
    done = subprocess.run(
        [sys.executable, "-m", "invoke", "papers"], cwd=project_root(), capture_output=True,
        text=True, env={**os.environ, "FRUGALVLM_DATA": str(copied.parent), "COLUMNS": "160"},
    )  # fmt: skip
    assert done.returncode == 0
    assert "visionzip" in done.stdout
    assert done.stderr.count("safe.yaml:2: ") == 1
    assert "Traceback" not in done.stderr


def test_listing_papers_needs_neither_torch_nor_pandas() -> None:
    code = (
        "import sys; from frugalvlm import papers; papers.keys(); "
        "print([m for m in ('torch', 'pandas', 'transformers', 'pydantic') if m in sys.modules]); "
        "papers.load_paper('visionzip'); "
        "print([m for m in ('torch', 'pandas', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["[]", "[]", ""]


def test_the_page_about_the_format_is_printed_from_the_classes() -> None:
    page = project_root() / "docs" / "papers_format.md"
    assert page.read_text(encoding="utf-8") == format_page(), (
        "run python -m frugalvlm.papers.page > docs/papers_format.md"
    )


def test_problems_with_papers_are_known_problems() -> None:
    assert issubclass(papers.PaperFormatError, FrugalError)
    assert issubclass(papers.PaperFormatError, ValueError)
