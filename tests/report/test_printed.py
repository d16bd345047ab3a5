"""What the command line prints: readable at 80 columns, closed by five lines."""

from dataclasses import replace
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


def found(origin: str = "paper", **counts: int) -> list[Verdict]:
    """So many verdicts of each status on claims of one origin; an underscore stands for a blank."""
    claim = replace(load_paper("visionzip").claims[0], origin=origin)
    made = []
    for status, count in counts.items():
        for i in range(count):
            own = replace(claim, id=f"{status}-{i}-of-a-rather-long-name")
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
    verdicts = [
        *found(holds=many, holds_in_direction=many, refused=many, undecided=many,
               not_testable=many),
        *found("kit", holds=many, refused=many), *found("identity", by_construction=many),
    ]  # fmt: skip
    lines = said(printed.print_closing, load_paper(key), "pocket", verdicts, Path("/x/page.html"))
    assert len(lines) <= 5
    assert max(map(len, lines)) <= 80
    assert f", pocket: {4 * many} of {5 * many} claims of the paper tested" in lines[0]
    assert lines[0].endswith(f", {many} undecided.")
    assert lines[-1] == "Page: /x/page.html"


def test_the_closing_names_what_held_and_what_did_not() -> None:
    verdicts = [
        *found(holds=2, holds_in_direction=1, refused=1, undecided=5),
        *found("kit", holds=3, refused=1), *found("identity", by_construction=9),
    ]  # fmt: skip
    lines = said(printed.print_closing, load_paper("sgl"), "pocket", verdicts, None, width=200)
    assert len(lines) == 4
    assert lines[0] == "SGL, pocket: 9 of 9 claims of the paper tested, 5 undecided."
    assert lines[1].startswith("Held: 2, 1 more in direction (holds-0-")
    assert "holds_in_direction-0" in lines[1]
    assert lines[2].startswith("Refused: 1 (refused-0-of-a-rather-long-name)")
    assert lines[3] == "Controls of this kit: 3 holds, 1 refused"


def test_a_page_below_this_folder_is_named_from_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "results" / "page.html"
    lines = said(printed.print_closing, load_paper("sgl"), "pocket", [], page)
    assert lines[-1] == "Page: results/page.html"


def test_a_summary_of_many_papers_fits(monkeypatch) -> None:
    every = [*found(**{status.replace(" ", "_"): 11 for status in STATUSES}),
             *found("kit", holds=3, refused=2, not_measured=1)]  # fmt: skip
    monkeypatch.setattr(printed, "all_verdicts", lambda paper, made, scale: every)
    made = {key: [{}] * 185 for key in ("visionzip", "early_exit", "flashsloth")}
    lines = said(printed.print_summary, made, "pocket", 200.0)
    assert "…" not in "".join(lines)
    (row,) = [line for line in lines if line.startswith("early_exit")]
    own = ["11"] * 5  # holds, in direction, undecided, refused, not comparable
    assert row.split() == ["early_exit", "185", *own, "22", "3", "of", "5"]
