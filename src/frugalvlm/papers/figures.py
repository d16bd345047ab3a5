"""Whether a file of reported figures can be read; looked at line by line, without pandas."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from frugalvlm.papers.classes import COLUMNS

__all__ = ["Complaint", "complaints_of_figures", "text_of"]

Complaint = tuple[int, str]  # line, counted from 1, and what is wrong there with its remedy


def text_of(path: Path) -> str | Complaint:
    """A file's text, or what is wrong with it."""
    content = path.read_bytes()
    if not content.strip():
        return 1, "the file is empty; restore it or write it anew"
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return line, f"byte 0x{content[error.start]:02x} is no UTF-8 text; save the file as UTF-8"


def complaints_of_figures(path: Path, key: str) -> Iterator[Complaint]:
    """What is wrong with `KEY.csv`, line by line; nothing when it can be used.

    Args:
        path: the file.
        key: of its paper.
    """
    if not path.is_file():
        yield 1, f"the file is missing; a paper without figures has its header alone: {_header()}"
        return
    text = text_of(path)
    if isinstance(text, tuple):
        yield text
        return
    lines = csv.reader(text.splitlines(keepends=True), strict=True)
    seen: dict[tuple[str, ...], int] = {}
    try:
        for cells in lines:
            line = lines.line_num
            if not seen:
                if tuple(cells) != COLUMNS:
                    yield line, f"the first line must be {_header()}"
                    return
                seen[COLUMNS] = line
                continue
            if not cells:  # an empty line at the end, say
                continue
            wrong = _wrong(cells, key)
            identity = (*cells[:8], *cells[9:10])
            if wrong is None and identity in seen:
                wrong = f"the same figure stands in line {seen[identity]}; remove one of them"
            seen.setdefault(identity, line)
            if wrong is not None:
                yield line, wrong
    except csv.Error as error:
        yield lines.line_num, f"{error}; is a double quote left open above?"


def _wrong(cells: list[str], key: str) -> str | None:
    """What is wrong with one line."""
    if len(cells) != len(COLUMNS):
        return (
            f"{len(cells)} cells instead of {len(COLUMNS)}; put text with commas in double quotes"
        )
    figure = dict(zip(COLUMNS, cells, strict=True))
    if figure["paper"] != key:
        return f"paper is {figure['paper']!r}, but this file is of {key!r}"
    for name, text in figure.items():
        if name != "visual_tokens" and not text.strip():
            return f"{name} is empty; write - where there is nothing to say"
    if not _is_number(figure["value"]):
        return f"value is {figure['value']!r}; write a number, its unit goes into the column unit"
    tokens = figure["visual_tokens"]
    if tokens and not (_is_number(tokens) and float(tokens) >= 0):
        return f"visual_tokens is {tokens!r}; write a count, or nothing"
    if figure["verified"].lower() not in ("true", "false"):
        return f"verified is {figure['verified']!r}; write true or false"
    return None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def _header() -> str:
    return ",".join(COLUMNS)
