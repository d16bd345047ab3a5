"""The verdicts of a paper as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import pandas as pd

from frugalvlm.formats import NONE_PRINTED
from frugalvlm.papers import SCALES
from frugalvlm.report.display import Block, Cell, Narrow, Table, name_of
from frugalvlm.verdicts.decision import STATUSES, Verdict
from frugalvlm.verdicts.wording import asked, with_interval

_STYLES = {
    "reproduced": "green",
    "same direction": "cyan",
    "contradicted": "red",
    "not significant": "yellow",
    "not testable here": "dim",
    "not measured": "dim",
}


def verdict_table(found: Sequence[Verdict]) -> Table:
    """The verdicts as a table for terminal, HTML and Markdown; `to_frame()` gives the numbers.

    Claims that are not testable here stand below it, by reason.
    """
    names = ", ".join(name_of(key) for key in sorted({v.paper for v in found}))
    scales = ", ".join(sorted({v.scale for v in found}, key=SCALES.index))
    counts = [(sum(v.status == status for v in found), status) for status in STATUSES]
    rows = tuple(_row(v) for v in found if v.status != "not testable here")
    return Table(
        title=f"Claims of {names} at the {scales} scale",
        headers=("claim", "asked", "ours [95 % interval]", "n", "paper", "verdict"),
        blocks=(Block("", rows),),
        caption=(
            "; ".join(f"{n} {status}" for n, status in counts if n) + ".",
            "A verdict is given by the whole 95 % interval: one that contains the threshold does "
            "not reproduce a claim. Counted quantities are exact. Paper: its number, and in "
            "brackets the same over the benchmarks of our table.",
            *_left_out(found),
            *_grouped(v for v in found if v.status in ("not testable here", "not measured")),
        ),
        data=_frame(found),
        facts={"scale": scales},
        styles=_STYLES,
        narrow=Narrow({0: "claim", 1: "asked", 2: "ours [95 % interval]", 5: "verdict"}),
    )


def _left_out(found: Sequence[Verdict]) -> list[str]:
    """Which benchmarks the guard kept out, and of which claims."""
    claims = [v.claim.id for v in found if v.left_out]
    names = dict.fromkeys(name for v in found for name in v.left_out)
    why = "the untouched model scores there nearly as well with blank pictures"
    left = f"Not in the means of {', '.join(claims)}: {', '.join(names)}; {why}."
    return [left] if claims else []


def _grouped(found: Iterable[Verdict]) -> list[str]:
    """One line per reason, with the claims it holds for."""
    ids: dict[str, list[str]] = {}
    for v in found:
        ids.setdefault(v.sentence, []).append(v.claim.id)
    return [f"{sentence.rstrip('.')} ({', '.join(names)})." for sentence, names in ids.items()]


def _frame(found: Sequence[Verdict]) -> pd.DataFrame:
    rows = []
    for v in found:
        row = {k: x for k, x in asdict(v).items() if k != "claim"}
        claim = v.claim
        extra = {"claim": claim.id, "text": claim.text, "where": claim.where, "unit": claim.unit,
                 "origin": claim.origin, "relation": claim.relation,
                 "threshold": claim.threshold}  # fmt: skip
        rows.append(extra | row)
    return pd.DataFrame(rows)


def _row(v: Verdict) -> tuple[Cell, ...]:
    origin = "" if v.claim.origin == "paper" else " (added by this kit)"
    tested = v.status not in ("not testable here", "not measured")
    ours = with_interval(v) if v.value is not None else NONE_PRINTED
    paper = NONE_PRINTED if v.reported is None else f"{v.reported:g}"
    if v.claim.reported_on_columns is not None:
        paper += f" ({v.claim.reported_on_columns:g})"
    return (
        Cell(v.claim.id, f"{v.claim.text}{origin}\n{v.claim.where}", v.claim.text),
        Cell(asked(v.claim) or NONE_PRINTED),
        Cell(ours),
        Cell(f"{v.n} {v.of}" if v.n is not None else "exact" if tested else NONE_PRINTED),
        Cell(paper),
        Cell(v.status, f"{v.status}\n{v.sentence}"),
    )
