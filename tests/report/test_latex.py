"""Tables as LaTeX: escaped, with booktabs, and TeX reads them where it is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from frugalvlm.report.display import Block, Cell, Table

HOSTILE = r"50 % of a_b & c#d $x$ {y} ~z ^w \section <i> ≥ 1 ± 2 – é"


@pytest.fixture
def table() -> Table:
    blocks = (
        Block("48 of 144 tokens (33.3 %)", (
            (Cell("[CLS] first"), Cell("1.63x\n[1.41, 1.76]", brief="1.63x\n[1.41, 1.76]")),
            (Cell(HOSTILE), Cell("*\n*2")),
        )),
        Block("", ((Cell("no heading"), Cell("–")),)),
    )  # fmt: skip
    return Table("Title of a_table", ("method\n& more", "speed-up\n[95 %]"), blocks,
                 ("Modelled: 5 % of a_b.", "Second."), pd.DataFrame())  # fmt: skip


def test_every_special_sign_is_escaped(table: Table) -> None:
    made = table.to_latex()
    (row,) = [line for line in made.splitlines() if "50 " in line]
    for shown in (r"50 \% of a\_b \& c\#d \$x\$ \{y\}", r"\textasciitilde", r"\textasciicircum",
                  r"\textbackslash", r"\ensuremath{<}i\ensuremath{>}", r"\ensuremath{\geq} 1",
                  r"\ensuremath{\pm} 2 -- é"):  # fmt: skip
        assert shown in row
    assert r"\caption{Title of a\_table}" in made
    assert r"5 \% of a\_b. Second." in made
    assert not re.search(r"(?<!\\)[%#$]", made)


def test_rules_headings_and_as_many_cells_in_every_row(table: Table) -> None:
    made = table.to_latex("tab:one")
    order = [r"\begin{table}", r"\label{tab:one}", r"\toprule", r"\midrule",
             r"\multicolumn{2}{l}{\emph{48 of 144", "CLS", "no heading", r"\bottomrule",
             r"\end{tabular}", r"\end{table}"]  # fmt: skip
    places = [made.index(text) for text in order]
    assert places == sorted(places)
    rows = [line for line in made.splitlines() if line.endswith(r"\\") and "multicol" not in line]
    assert len(rows) == 1 + 3
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {1}


def test_a_bracket_behind_a_line_break_is_no_length(table: Table) -> None:
    made = table.to_latex()
    assert r"\shortstack[r]{1.63x \\ {[}1.41, 1.76]}" in made
    assert not re.search(r"\\\\\s*[\[*]", made)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_tex_reads_it(table: Table, tmp_path: Path) -> None:
    text = table.to_latex("tab:one")
    page = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n%s\\end{document}"
    (tmp_path / "page.tex").write_text(page % text)
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
