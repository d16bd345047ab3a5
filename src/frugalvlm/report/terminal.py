"""A table of texts for a terminal of any width: nothing is cut, whatever is too long is folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from frugalvlm.formats import NOT_MEASURED

__all__ = ["Minor", "fits", "terminal_table"]


class Minor(str):
    """A heading below which the block above goes on: a thin rule with a word."""

    __slots__ = ()


Rows = Sequence[Sequence[str]]
Blocks = Sequence[tuple[str, Rows]]


def terminal_table(
    title: str,
    headers: Sequence[str],
    blocks: Blocks,
    notes: Sequence[str],
    width: int,
    styles: Mapping[str, str],
) -> Group:
    """Title, blocks of rows under their headings, and notes below.

    Args:
        title: one line.
        headers: one per column; lines by newline.
        blocks: heading and rows of each.
        notes: sentences below the table.
        width: of the terminal, in columns.
        styles: rich style of cells with this very text.
    """
    widths = _widths(headers, blocks)
    gap = 1 if fits(headers, blocks, width) else 0
    room = width - _total(widths, gap)
    widths[0] = max(_word(headers, blocks), min(widths[0], widths[0] + room))

    def table(rows: Rows, show_header: bool) -> RichTable:
        # Rich knows no cell over all columns, so each block is a table of its own, equally wide.
        shown = RichTable(
            box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False,
            show_header=show_header,
        )  # fmt: skip
        for i, (header, column) in enumerate(zip(headers, widths, strict=True)):
            justify = "left" if i == 0 else "right"
            shown.add_column(Text(header), justify=justify, width=column, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            shown.add_row(*(Text(text, style=styles.get(text, "")) for text in row))
        return shown

    shown: list[Text | RichTable | Padding] = [Text(title, style="bold"), Text("")]
    shown.append(table((), show_header=True))
    for heading, rows in blocks:
        if isinstance(heading, Minor):
            rule = f"{heading} ".ljust(min(width, _total(widths, gap)), "╌")
            shown.append(Text(rule, style="dim"))
        elif heading:
            shown.append(Text(heading, style="cyan"))
        shown.append(table(rows, show_header=False))
    return Group(*shown, Text(""), *(Text(note, style="dim") for note in notes), Text(""))


def fits(headers: Sequence[str], blocks: Blocks, width: int) -> bool:
    """Whether every cell has its place in a terminal so wide, with two blanks between columns.

    Names (the first column) of several words may take several lines.
    """
    widths = _widths(headers, blocks)
    widths[0] = min(widths[0], _word(headers, blocks))
    return _total(widths, 1) <= width


def _word(headers: Sequence[str], blocks: Blocks) -> int:
    """The longest word of the first column."""
    names = [headers[0], *(row[0] for _, rows in blocks for row in rows)]
    return max((len(word) for name in names for word in name.split()), default=0)


def _total(widths: Sequence[int], gap: int) -> int:
    """Columns of a row; beside the gap each divider of rich's box is one blank."""
    return sum(widths) + (gap + 1) * (len(widths) - 1)


def _widths(headers: Sequence[str], blocks: Blocks) -> list[int]:
    rows = [headers, *(row for _, rows in blocks for row in rows)]
    return [max(_width(text) for text in column) for column in zip(*rows, strict=True)]


def _width(text: str) -> int:
    """Columns that a cell needs; only "not measured" may be wrapped."""
    lines = text.replace(NOT_MEASURED, "measured").splitlines()
    return max((len(line) for line in lines), default=0)
