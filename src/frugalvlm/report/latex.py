r"""A table of texts as LaTeX for a paper: booktabs rules, everything escaped.

Pandas' Styler escapes and sets the rules; it knows no heading over a block of rows, so these are
put in here. Needs `\usepackage{booktabs}` alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from frugalvlm.report.terminal import Minor

__all__ = ["latex_table"]

# Signs that LaTeX's usual fonts lack, or that mean something else in text.
_SIGNS = {
    "±": r"\ensuremath{\pm}", "≥": r"\ensuremath{\geq}", "≤": r"\ensuremath{\leq}",
    "≈": r"\ensuremath{\approx}", "×": r"\ensuremath{\times}", "–": "--", "—": "---",
    "<": r"\ensuremath{<}", ">": r"\ensuremath{>}", "λ": r"\ensuremath{\lambda}",
    "τ": r"\ensuremath{\tau}", "→": r"\ensuremath{\rightarrow}", "…": r"\dots{}",
}  # fmt: skip


def latex_table(
    title: str,
    headers: Sequence[str],
    blocks: Sequence[tuple[str, Sequence[Sequence[str]]]],
    notes: Sequence[str],
    label: str = "",
) -> str:
    r"""A `table` environment.

    Args:
        title: its caption.
        headers: one per column; lines by newline.
        blocks: heading and rows of each.
        notes: sentences below the table.
        label: for `\ref`; none if empty.
    """
    rows = [list(row) for _, own in blocks for row in own]
    frame = pd.DataFrame(rows, columns=pd.RangeIndex(len(headers)), dtype=object)
    styler = frame.style.hide(axis="index").format(_cell, escape="latex")
    names = [_cell(_escaped(header)) for header in headers]
    styler = styler.format_index(lambda i: names[int(str(i))], axis=1)
    lines = styler.to_latex(
        hrules=True, column_format="l" + "r" * (len(headers) - 1), position="tbp",
        position_float="centering", label=label or None,
        caption=_text(title),
    ).splitlines()  # fmt: skip
    first = lines.index(r"\midrule") + 1
    body: list[str] = []
    for heading, own in blocks:
        if heading:
            minor, columns = isinstance(heading, Minor), len(headers)
            rule = rf"\cmidrule(lr){{1-{columns}}}" if minor else r"\midrule"
            body += [rule] if body else []
            span = rf"\multicolumn{{{columns}}}{{l}}"
            body.append(rf"{span}{{\emph{{{_text(heading)}}}}} \\")
        body += [lines[first + i] for i in range(len(own))]
        first += len(own)
    start = lines.index(r"\midrule") + 1
    *above, end = [*lines[:start], *body, *lines[start + len(rows) :]]
    small = above.index(r"\centering") + 1
    above.insert(small, r"\footnotesize\setlength{\tabcolsep}{3pt}")
    below = [r"\par\smallskip\raggedright " + " ".join(map(_text, notes))] if notes else []
    return "\n".join([*above, *below, end]) + "\n"


def _escaped(text: str) -> str:
    """As pandas escapes cells, for the texts that are none."""
    styled = pd.DataFrame([[text]]).style.hide(axis="index").hide(axis="columns")
    shown = styled.format(_marked, escape="latex").to_latex()
    return shown.split("<|", 1)[1].rsplit("|>", 1)[0]


def _text(text: str) -> str:
    return _signs(_escaped(text))


def _marked(text: object) -> str:
    return f"<|{text}|>"


def _cell(text: object) -> str:
    """Escaped text, its lines one below the other."""
    lines = [_signs(line) for line in str(text).split("\n")]
    stacked = r" \\ ".join(lines)
    return stacked if len(lines) == 1 else rf"\shortstack[r]{{{stacked}}}"


def _signs(text: str) -> str:
    shown = "".join(_SIGNS.get(sign, sign) for sign in text).replace("\n", " ")
    # Behind a line break LaTeX reads a bracket as its length and a star as its variant.
    return f"{{{shown[0]}}}{shown[1:]}" if shown[:1] in ("[", "*") else shown
