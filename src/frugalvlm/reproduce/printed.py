"""What the command line prints: papers, tables, verdicts, comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from frugalvlm.papers import ORIGINS, SCALES, Paper, all_papers, load_paper
from frugalvlm.paths import command, work_dir
from frugalvlm.report import tables
from frugalvlm.report.display import name_of
from frugalvlm.report.terminal import terminal_table
from frugalvlm.report.verdict_table import verdict_table
from frugalvlm.reproduce.problems import problems_told
from frugalvlm.runs import records
from frugalvlm.runs.identity import other_code_line
from frugalvlm.runs.records import Record
from frugalvlm.verdicts.decision import DECIDED, STATUSES, UNTESTED, Verdict
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
    own = [v for v in found if v.claim.origin == "paper"]
    ids = {status: [v.claim.id for v in own if v.status == status] for status in STATUSES}
    tested = sum(v.status in DECIDED for v in own)
    directed = ids["holds in direction"]
    held = f"{len(ids['holds'])}" + (f", {len(directed)} more in direction" * bool(directed))
    lines = [
        f"{name_of(paper)}, {scale}: {tested} of {len(own)} claims of the paper tested, "
        f"{len(ids['undecided'])} undecided.",
        _listed(f"Held: {held}", [*ids["holds"], *directed], console.width),
        _listed(f"Refused: {len(ids['refused'])}", ids["refused"], console.width),
        _listed(f"Controls of this kit: {_tally(found, 'kit')}", [], console.width),
        *([] if page is None else [f"Page: {_near(page)}"]),
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _tally(found: Sequence[Verdict], origin: str) -> str:
    """How many of one origin hold, are refused and undecided."""
    counts = Counter(v.status for v in found if v.claim.origin == origin)
    words = [f"{counts[status]} {status}" for status in DECIDED if counts[status]]
    return ", ".join(words) or "none tested"


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
    """The papers of the kit, their claims, and at which scale results are published."""
    console = console or Console()
    table = RichTable(
        title="Papers of the kit", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        pad_edge=False,
    )  # fmt: skip
    table.add_column("key", no_wrap=True)
    table.add_column("paper", min_width=21)
    table.add_column("arXiv", no_wrap=True)
    table.add_column("claims", no_wrap=True)
    table.add_column("published at", min_width=21)
    for paper in all_papers():
        version = f"v{paper.arxiv_version}" if paper.arxiv_version else ""
        states = {scale: paper.status.get(scale, "planned") for scale in SCALES}
        runs = [scale if state == "published" else f"{scale} ({state})"
                for scale, state in states.items() if state != "planned"]  # fmt: skip
        where = Text(", ".join(runs) or "planned", style="green" if runs else "dim")
        origins = Counter(claim.origin for claim in paper.claims)
        claims = "/".join(str(origins[origin]) for origin in ORIGINS)
        title = paper.title.split(":")[0]
        table.add_row(paper.key, title, f"{paper.arxiv}{version}", claims, where)
    console.print(table)
    console.print("Claims: of the paper/controls of this kit/true by construction.")
    how = f"{command('reproduce --paper KEY')} [--scale pocket|blueprint]"
    console.print(f"Reproduce one with: {how}", highlight=False, markup=False)


_HEADERS = {"holds in direction": "in\ndirec-\ntion", "not comparable": "not\ncompa-\nrable"}


def print_summary(
    made: Mapping[str, Sequence[Record]],
    scale: str,
    seconds: float,
    console: Console | None = None,
) -> None:
    """What a reproduction of several papers came to: records and verdicts, paper by paper."""
    console = console or Console()
    found = {key: all_verdicts(load_paper(key), own, scale) for key, own in made.items()}
    counts = {key: Counter(v.status for v in own if v.claim.origin == "paper")
              for key, own in found.items()}  # fmt: skip
    shown = [*DECIDED, "not comparable"]
    title = f"{len(made)} papers at the {scale} scale in {seconds / 60:.1f} minutes"
    rows = [
        [
            key, str(len(made[key])), *(str(count[s]) for s in shown),
            str(sum(count[s] for s in UNTESTED)), _of_all(found[key], "kit", "holds"),
        ]
        for key, count in counts.items()
    ]  # fmt: skip
    words = [_HEADERS.get(s, s) for s in shown]
    headers = ["paper", "records", *words, "not\ntested", "controls\nheld"]
    console.print(
        terminal_table(
            f"{title}; claims of the papers", headers, [("", rows)], (), console.width, {}
        )
    )
    console.print(f"Records and pages: {_near(work_dir() / scale)}", soft_wrap=True)


def _of_all(found: Sequence[Verdict], origin: str, status: str) -> str:
    """How many of those of one origin that an interval could decide have a status."""
    tested = [v.status for v in found if v.claim.origin == origin and v.status in DECIDED]
    return f"{tested.count(status)} of {len(tested)}"


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
