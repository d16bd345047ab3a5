"""What the command line prints: papers, tables, verdicts, comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from frugalvlm.papers import SCALES, Paper, all_papers, load_paper
from frugalvlm.paths import command, work_dir
from frugalvlm.report import tables
from frugalvlm.report.display import name_of
from frugalvlm.report.terminal import terminal_table
from frugalvlm.report.verdict_table import verdict_table
from frugalvlm.reproduce.problems import problems_told
from frugalvlm.runs import records
from frugalvlm.runs.identity import other_code_line
from frugalvlm.runs.records import Record
from frugalvlm.verdicts.decision import STATUSES, Verdict
from frugalvlm.verdicts.verdicts import all_verdicts


def print_report(
    paper: Paper, scale: str, made: Sequence[Record], console: Console | None = None
) -> list[Verdict]:
    """A paper's tables and verdicts from the records of one reproduction; returns the verdicts."""
    console = console or Console()
    if scale == "blueprint":
        console.print(tables.blueprint_table(paper, made))
    else:
        first = next((t for t in paper.tables if scale in t.scales), None)
        if first is not None:
            console.print(tables.accuracy_table(paper, first.id, made))
            console.print(tables.efficiency_table(made, paper))
            console.print(tables.energy_table(made, paper))
    found = all_verdicts(paper, made, scale)
    console.print(verdict_table(found))
    return found


def print_closing(
    paper: Paper,
    scale: str,
    found: Sequence[Verdict],
    page: Path | None,
    console: Console | None = None,
) -> None:
    """What a reproduction came to, in five lines at most: what held, what not, where the page is.

    Args:
        paper: that was reproduced.
        scale: at which.
        found: its verdicts.
        page: its executed notebook's, if there is one.
        console: where it goes.
    """
    console = console or Console()
    ids = {status: [v.claim.id for v in found if v.status == status] for status in STATUSES}
    weaker, tested = ids["same direction"], sum(len(ids[status]) for status in _DECIDED)
    held = f"{len(ids['reproduced'])}" + (f", {len(weaker)} more in a weaker form" * bool(weaker))
    lines = [
        f"{name_of(paper)} at the {scale} scale: {tested} of {len(found)} claims tested.",
        _listed(f"Held: {held}", [*ids["reproduced"], *weaker], console.width),
        *(
            _listed(f"{word}: {len(ids[status])}", ids[status], console.width)
            for status, word in (
                ("contradicted", "Did not hold"), ("not significant", "Not decided")
            )
        ),
        *([] if page is None else [f"Page: {_near(page)}"]),
    ]  # fmt: skip
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


_DECIDED = ("reproduced", "same direction", "contradicted", "not significant")


def _listed(line: str, ids: Sequence[str], width: int) -> str:
    """A count and what it counts, as many names as one line has room for."""
    shown: list[str] = []
    for name in ids:
        rest = len(ids) - len(shown) - 1
        if len(f"{line} ({', '.join([*shown, name])}{f' and {rest} more' * bool(rest)})") > width:
            break
        shown.append(name)
    rest = len(ids) - len(shown)
    more = f" and {rest} more" * bool(rest)
    return f"{line} ({', '.join(shown)}{more})" if shown else line


def _near(path: Path) -> Path:
    """A path as one would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def print_papers(console: Console | None = None) -> None:
    """The papers of the kit and what is reproduced at which scale."""
    console = console or Console()
    table = RichTable(
        title="Papers of the kit", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        pad_edge=False,
    )  # fmt: skip
    table.add_column("key", no_wrap=True)
    table.add_column("paper", overflow="fold")
    table.add_column("arXiv", no_wrap=True)
    table.add_column("reproduced at", no_wrap=True)
    for paper in all_papers():
        version = f"v{paper.arxiv_version}" if paper.arxiv_version else ""
        states = {scale: paper.status.get(scale, "planned") for scale in SCALES}
        runs = [scale if state == "reproduced" else f"{scale} ({state})"
                for scale, state in states.items() if state != "planned"]  # fmt: skip
        where = Text(", ".join(runs) or "planned", style="green" if runs else "dim")
        table.add_row(paper.key, paper.title.split(":")[0], f"{paper.arxiv}{version}", where)
    console.print(table)
    how = f"{command('reproduce --paper KEY')} [--scale pocket|blueprint]"
    console.print(f"Reproduce one with: {how}", highlight=False, markup=False)


_HEADERS = {
    "same direction": "same\ndirection", "not significant": "not\nsignifi-\ncant",
    "not testable here": "not\ntestable\nhere", "not measured": "not\nmeasured",
}  # fmt: skip


def print_summary(
    made: Mapping[str, Sequence[Record]],
    scale: str,
    seconds: float,
    console: Console | None = None,
) -> None:
    """What a reproduction of several papers came to: records and verdicts, paper by paper."""
    console = console or Console()
    counts = {key: Counter(v.status for v in all_verdicts(load_paper(key), own, scale))
              for key, own in made.items()}  # fmt: skip
    shown = [s for s in STATUSES if any(c[s] for c in counts.values())]
    title = f"{len(made)} papers at the {scale} scale in {seconds / 60:.1f} minutes"
    rows = [[key, str(len(made[key])), *(str(count[s]) for s in shown)]
            for key, count in counts.items()]  # fmt: skip
    headers = ["paper", "records", *(_HEADERS.get(s, s) for s in shown)]
    console.print(
        terminal_table(f"{title}; their claims", headers, [("", rows)], (), console.width, {})
    )
    console.print(f"Records and pages: {_near(work_dir() / scale)}", soft_wrap=True)


def print_comparison(console: Console | None = None) -> None:
    """All pocket methods that were run here or are published, side by side; nothing is run.

    Raises:
        RecordError: when nothing was recorded yet.
    """
    from frugalvlm.report.comparison import recorded

    console = console or Console()
    with problems_told(console):
        found = recorded()
    made = records.newest_setting(r for own in found.values() for r in own)
    if not made:
        raise records.RecordError(
            f"Nothing is recorded yet: run `{command('reproduce --paper visionzip')}` first."
        )
    for paper in all_papers():
        if not found[paper.key]:
            continue
        for layout in paper.tables:
            asked = {column.id for column in layout.columns}
            if asked & {r["request"].get("benchmark") for r in made}:
                console.print(tables.accuracy_table(paper, layout.id, made))
    console.print(tables.efficiency_table(made))
    console.print(tables.energy_table(made))
    line = other_code_line(made)
    if line:
        console.print(line)


def compare(console: Console | None = None) -> list[Path]:
    """Everything behind `invoke compare`: printed tables, then the notebooks and their pages.

    Raises:
        RecordError: when nothing was recorded yet.
        NotebookError: when a notebook failed.
    """
    from frugalvlm.report.comparison import build  # late, for it brings notebooks along

    console = console or Console()
    print_comparison(console)
    pages = build()
    console.print("\n".join(["Pages:", *(str(page) for page in pages)]))
    return pages
