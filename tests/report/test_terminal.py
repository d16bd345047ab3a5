"""Tables on terminals of any width: nothing is cut, and narrow ones show fewer columns."""

import pandas as pd
import pytest
from rich.console import Console

from frugalvlm.report.display import Block, Cell, Narrow, Table


def shown(table: Table, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def table(narrow: Narrow | None = None, cells: int = 6) -> Table:
    headers = ("method", *(f"column {i}" for i in range(cells)))
    rows = (
        (Cell("a rather long name"), *(Cell("1234.5 ±12.3", tight="1234") for _ in range(cells))),
        (Cell("[CLS] <b>x</b>"), *(Cell("2345.6 ±23.4", tight="2345") for _ in range(cells))),
    )
    return Table("Title", headers, (Block("one block", rows),), ("A caption.",), pd.DataFrame(),
                 narrow=narrow)  # fmt: skip


def test_a_wide_terminal_shows_every_column() -> None:
    lines = shown(table(Narrow({0: "method", 1: "first"})), 120)
    (row,) = [line for line in lines if line.startswith("a rather long name")]
    assert row.count("1234.5 ±12.3") == 6
    assert not any("Left out" in line for line in lines)


def test_a_narrow_one_shows_the_columns_named_for_it_and_says_what_is_left_out() -> None:
    narrow = Narrow({0: "method", 1: "first", 3: "third"}, "Cells are short.")
    lines = shown(table(narrow), 80)
    (row,) = [line for line in lines if line.startswith("a rather long name")]
    assert row.split()[-2:] == ["1234", "1234"]
    assert any(line.split() == ["method", "first", "third"] for line in lines)
    text = " ".join(" ".join(lines).split())
    assert "Cells are short. Left out here: column 1, column 3, column 4, column 5." in text
    assert "A wider terminal (140 columns) and the page have everything." in text


@pytest.mark.parametrize("width", [30, 50, 80, 100])
def test_without_such_columns_cells_are_folded_and_never_cut(width: int) -> None:
    lines = shown(table(), width)
    assert max(len(line.rstrip()) for line in lines) <= width
    assert "…" not in "".join(lines)
    whole = "".join("".join(lines).split())
    # Folded cells lie across lines, so their signs are counted.
    assert whole.count("±") == 12


def test_markup_in_a_name_is_a_text() -> None:
    assert any(line.startswith("[CLS] <b>x</b>") for line in shown(table(), 120))


def test_not_measured_alone_may_be_wrapped() -> None:
    rows = ((Cell("m"), *(Cell("not measured") for _ in range(6))),)
    made = Table("T", ("method", *"abcdef"), (Block("", rows),), (), pd.DataFrame())
    lines = shown(made, 80)
    assert any(line.split() == ["m", *["not"] * 6] for line in lines)
    assert any(line.split() == ["measured"] * 6 for line in lines)
