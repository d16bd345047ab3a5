"""What the command line prints: papers, tables, verdicts, comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from frugalvlm.papers import SCALES, Paper, all_papers, load_paper
from frugalvlm.paths import work_dir
from frugalvlm.report import tables
from frugalvlm.report.verdict_table import verdict_table
from frugalvlm.reproduce.problems import problems_told
from frugalvlm.runs import records
from frugalvlm.runs.identity import other_code_line
from frugalvlm.runs.records import Record
from frugalvlm.verdicts.verdicts import STATUSES, all_verdicts


def print_report(
    paper: Paper, scale: str, made: Sequence[Record], console: Console | None = None
) -> None:
    """A paper's tables and verdicts from the records of one reproduction."""
    console = console or Console()
    if scale == "blueprint":
        console.print(tables.blueprint_table(paper, made))
    else:
        first = next((t for t in paper.tables if scale in t.scales), None)
        if first is not None:
            console.print(tables.accuracy_table(paper, first.id, made))
            console.print(tables.efficiency_table(made, paper))
            console.print(tables.energy_table(made, paper))
    console.print(verdict_table(all_verdicts(paper, made, scale)))


def print_papers(console: Console | None = None) -> None:
    """The papers of the kit and what is reproduced at which scale."""
    console = console or Console()
    table = RichTable(title="Papers of the kit", title_justify="left")
    for header in ("key", "paper", "arXiv", "kind", *SCALES):
        table.add_column(header, overflow="fold")
    for paper in all_papers():
        version = f"v{paper.arxiv_version}" if paper.arxiv_version else ""
        states = [paper.status.get(scale, "planned") for scale in SCALES]
        title, kind = paper.title.split(":")[0], ", ".join(paper.kind)
        table.add_row(paper.key, title, f"{paper.arxiv}{version}", kind, *states)
    console.print(table)
    console.print("Reproduce one with: invoke reproduce --paper KEY [--scale pocket|blueprint]")


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
    table = RichTable(title=f"{title}; their claims", title_justify="left")
    for header in ("paper", "records", *shown):
        table.add_column(header, justify="left" if header == "paper" else "right")
    for key, count in counts.items():
        table.add_row(key, str(len(made[key])), *(str(count[s]) for s in shown))
    console.print(table)
    console.print(f"Records and pages: {work_dir() / scale}")


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
            "Nothing is recorded yet: run `invoke reproduce --paper visionzip` first."
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
