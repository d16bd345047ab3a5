"""What the command line prints: readable at 80 columns, closed by five lines."""

from pathlib import Path

import pytest
from rich.console import Console

from frugalvlm.papers import all_papers, load_paper
from frugalvlm.reproduce import printed
from frugalvlm.verdicts.decision import STATUSES, Verdict


def said(show, *arguments, width: int = 80) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        show(*arguments, console)
    return captured.get().splitlines()


def found(**counts: int) -> list[Verdict]:
    """So many verdicts of each status; an underscore stands for a blank."""
    claim = load_paper("visionzip").claims[0]
    made = []
    for status, count in counts.items():
        for i in range(count):
            own = type(claim)(**{**vars(claim), "id": f"{status}-{i}-of-a-rather-long-name"})
            made.append(Verdict("visionzip", own, "pocket", status.replace("_", " "), ""))
    assert {v.status for v in made} <= set(STATUSES)
    return made


def test_keys_of_papers_are_whole() -> None:
    lines = said(printed.print_papers)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    words = {line.split()[0] for line in lines if line.split()}
    assert {paper.key for paper in all_papers()} <= words


@pytest.mark.parametrize("key", ["visionzip", "early_exit", "gsearch", "fastervlm"])
@pytest.mark.parametrize("many", [0, 1, 12])
def test_a_reproduction_ends_in_five_lines_at_most(key: str, many: int) -> None:
    verdicts = found(reproduced=many, same_direction=many, contradicted=many,
                     not_significant=many, not_testable_here=many)  # fmt: skip
    lines = said(printed.print_closing, load_paper(key), "pocket", verdicts, Path("/x/page.html"))
    assert len(lines) <= 5
    assert max(map(len, lines)) <= 80
    assert lines[0].endswith(f"at the pocket scale: {4 * many} of {5 * many} claims tested.")
    assert lines[-1] == "Page: /x/page.html"


def test_the_closing_names_what_held_and_what_did_not() -> None:
    verdicts = found(reproduced=2, same_direction=1, contradicted=1, not_significant=5)
    lines = said(printed.print_closing, load_paper("sgl"), "pocket", verdicts, None, width=200)
    assert len(lines) == 4
    assert lines[1].startswith("Held: 2, 1 more in a weaker form (reproduced-0-")
    assert "same direction".replace(" ", "_") in lines[1]
    assert lines[2].startswith("Did not hold: 1 (contradicted-0-of-a-rather-long-name)")
    assert lines[3].startswith("Not decided: 5 (not_significant-0-of-a-rather-long-name")
    assert " and 1 more)" in lines[3] or " and 2 more)" in lines[3]


def test_a_page_below_this_folder_is_named_from_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "results" / "page.html"
    lines = said(printed.print_closing, load_paper("sgl"), "pocket", [], page)
    assert lines[-1] == "Page: results/page.html"


def test_a_summary_of_many_papers_fits(monkeypatch) -> None:
    every = found(**{status.replace(" ", "_"): 11 for status in STATUSES})
    monkeypatch.setattr(printed, "all_verdicts", lambda paper, made, scale: every)
    made = {key: [{}] * 185 for key in ("visionzip", "early_exit", "flashsloth")}
    lines = said(printed.print_summary, made, "pocket", 200.0)
    assert "…" not in "".join(lines)
    (row,) = [line for line in lines if line.startswith("early_exit")]
    assert row.split() == ["early_exit", "185", *["11"] * len(STATUSES)]
    assert "early_exit" in row
