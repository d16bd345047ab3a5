"""Publishing: what lies in the work folder is copied into results/, which is under version control.

Runs write into the work folder only, so nothing published changes until this is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from frugalvlm.errors import FrugalError
from frugalvlm.papers import load_paper
from frugalvlm.paths import command, published_dir, work_dir
from frugalvlm.report.pages import relink
from frugalvlm.runs import records
from frugalvlm.runs.records import Record, RecordError

__all__ = ["PublishError", "publish", "publish_folder"]

PAGES = {".ipynb", ".html", ".png", ".svg", ".pdf", ".csv"}


class PublishError(FrugalError, ValueError):
    """There is nothing to publish; the message names the command that makes it."""


def publish(scale: str, keys: Sequence[str]) -> list[Path]:
    """Copy complete records, executed notebooks, pages and figures of papers into results/.

    A record takes the place of those of the same request and machine; one that is older than what
    is published stays out. Records of other requests or machines stay as they are.

    Args:
        scale: "pocket" or "blueprint".
        keys: of the papers.

    Returns:
        The files that were written.

    Raises:
        UnknownPaperError: for a key of no paper.
        PublishError: when nothing of one of the papers was run; nothing is copied then.
        RecordError: results/ cannot be written to.
    """
    for key in keys:
        load_paper(key)
        if not _newest(_record_files(work_dir() / scale / key)):
            raise PublishError(
                f"Nothing of '{key}' was run at the {scale} scale, so there is nothing to publish: "
                f"run `{command(f'reproduce --paper {key} --scale {scale}')}` first."
            )
    return [file for key in keys for file in publish_folder(scale, key)]


def publish_folder(*parts: str) -> list[Path]:
    """The same for one folder of the results, such as "compare" or "benchmark"."""
    source, target = work_dir().joinpath(*parts), published_dir().joinpath(*parts)
    written = []
    for folder in sorted({path.parent for path in _record_files(source)}):
        written += _publish_records(folder, target / folder.relative_to(source))
    for path in sorted(source.rglob("*")):
        # Hidden: unfinished, or a tool's own. Failed: a notebook that stopped in the middle.
        inside = path.relative_to(source)
        shown = not any(part.startswith(".") for part in inside.parts)
        if shown and path.suffix in PAGES and ".failed." not in path.name and path.is_file():
            written.append(_copied(path, target / inside))
    relink(published_dir())  # the pages of the work folder know others than those published
    return written


def _record_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.json")) if not path.name.startswith(".")]


def _publish_records(source: Path, target: Path) -> list[Path]:
    published = _read(path for path in target.glob("*.json"))
    written = []
    for path, record in _newest(source.glob("*.json")):
        same = {p: r for p, r in published.items() if _run(r) == _run(record)}
        if any(records.created(r) > records.created(record) for r in same.values()):
            continue
        # First the new one: a kill in between leaves both, of which the newer counts.
        written.append(_copied(path, target / path.name))
        for superseded in same:
            if superseded.name != path.name:
                superseded.unlink()
    return written


def _newest(files: Iterable[Path]) -> list[tuple[Path, Record]]:
    """The newest complete record of every request on every machine."""
    found = _read(files)
    place = {id(record): path for path, record in found.items()}
    return [(place[id(record)], record) for record in records.latest(found.values())]


def _read(files: Iterable[Path]) -> dict[Path, Record]:
    return {
        path: record
        for path in sorted(files)
        for record in records.read_records(path.parent, pattern=path.name)
    }


def _run(record: Record) -> tuple[str, str, str]:
    return (
        record["kind"], records.request_hash(record["request"]), record["provenance"]["machine"]
    )  # fmt: skip


def _copied(source: Path, target: Path) -> Path:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise RecordError(
            f"Cannot read {source} ({error.strerror}): check its permissions."
        ) from error
    records.write_bytes(target, content)
    return target
