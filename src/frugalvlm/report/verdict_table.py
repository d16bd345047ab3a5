"""The verdicts of a paper as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import pandas as pd

from frugalvlm.formats import NONE_PRINTED
from frugalvlm.papers import SCALES
from frugalvlm.report.display import Block, Cell, Narrow, Table, name_of
from frugalvlm.verdicts.decision import SHARE, STATUSES, UNTESTED, Verdict
from frugalvlm.verdicts.wording import asked, said, with_interval

_STYLES = {
    "holds": "green",
    "holds in direction": "cyan",
    "refused": "red",
    "undecided": "yellow",
    "not comparable": "dim",
    "by construction": "dim",
    "not testable": "dim",
    "not measured": "dim",
}
_HEADINGS = {
    "paper": "claims of the paper",
    "kit": "controls that this kit adds",
    "identity": "true by construction: checks of this kit's code",
}


def verdict_table(found: Sequence[Verdict]) -> Table:
    """The verdicts as a table for terminal, HTML and Markdown; `to_frame()` gives the numbers.

    Claims of the paper, controls of this kit and identities stand apart; what was not tested stands
    below the table, by reason.
    """
    names = ", ".join(name_of(key) for key in sorted({v.paper for v in found}))
    scales = ", ".join(sorted({v.scale for v in found}, key=SCALES.index))
    shown = [v for v in found if v.status not in UNTESTED]
    twice = any(v.replication for v in found)
    blocks = [
        Block(heading, tuple(_row(v, twice) for v in shown if v.claim.origin == origin))
        for origin, heading in _HEADINGS.items()
        if any(v.claim.origin == origin for v in shown)
    ]
    headers = ["claim", "asked", "ours [95 % interval]", "n", "paper", "verdict"]
    return Table(
        title=f"Claims of {names} at the {scales} scale",
        headers=(*headers, *(["other questions"] if twice else [])),
        blocks=tuple(blocks) or (Block("", ()),),
        caption=(
            *counted(found),
            "A verdict is given by the whole 95 % interval. A level holds within its margin of "
            "the paper's number on our columns; a comparison holds where at least "
            f"{100 * SHARE:.0f} % of the paper's effect is sure, and in direction (with the share "
            "that was measured) where only its sign is. Counted quantities are exact; times of one "
            "process have a range. Paper: its number, and in brackets the same over the benchmarks "
            "of our table.",
            *_family(found),
            *_late(found),
            *_left_out(found),
            *_grouped(v for v in found if v.status in UNTESTED),
        ),
        data=_frame(found),
        facts={"scale": scales},
        styles=_STYLES,
        narrow=Narrow({0: "claim", 1: "asked", 2: "ours [95 % interval]", 5: "verdict"}),
    )


def counted(found: Sequence[Verdict]) -> list[str]:
    """How many verdicts of each word, a sentence for each origin."""
    lines = []
    for origin, heading in _HEADINGS.items():
        own = [v.status for v in found if v.claim.origin == origin]
        words = [f"{own.count(status)} {status}" for status in STATUSES if status in own]
        if own:
            lines.append(f"{heading[0].upper()}{heading[1:]}: {', '.join(words)}.")
    return lines


def _family(found: Sequence[Verdict]) -> list[str]:
    """Over how many verdicts Holm's correction went, and which it changed."""
    family = [v for v in found if v.p is not None]
    lost = [v.claim.id for v in family if "Holm" in v.sentence]
    changed = f"; undecided by it alone: {', '.join(lost)}" if lost else ""
    return [f"Corrected by Holm's method over {len(family)} intervals{changed}."] if family else []


def _late(found: Sequence[Verdict]) -> list[str]:
    """Claims that were changed when their data was known."""
    names = [v.claim.id for v in found if v.late]
    what = "Last changed after the first of their records was made, so not written in advance"
    return [f"{what}: {', '.join(names)}."] if names else []


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
        again, claim = v.replication, v.claim
        row = {k: x for k, x in asdict(v).items() if k not in ("claim", "replication")}
        extra = {"claim": claim.id, "text": claim.text, "where": claim.where, "unit": claim.unit,
                 "origin": claim.origin, "about": claim.about, "relation": claim.relation,
                 "threshold": claim.threshold, "margin": claim.margin, "effect": claim.effect,
                 "written": claim.written}  # fmt: skip
        second = {"replication": again and again.status, "replication_value": again and again.value}
        rows.append(extra | row | second)
    return pd.DataFrame(rows)


def _row(v: Verdict, twice: bool) -> tuple[Cell, ...]:
    paper = NONE_PRINTED if v.reported is None else f"{v.reported:g}"
    if v.claim.reported_on_columns is not None:
        paper += f" ({v.claim.reported_on_columns:g})"
    trainings = f", {v.trainings} trainings" if v.trainings > 1 else ""
    cells = [
        Cell(v.claim.id, f"{v.claim.text}\n{v.claim.where}", v.claim.text),
        Cell(asked(v.claim) or NONE_PRINTED),
        Cell(with_interval(v) if v.value is not None else NONE_PRINTED),
        Cell(f"{v.n} {v.of}{trainings}" if v.n is not None else v.spread or NONE_PRINTED),
        Cell(paper),
        Cell(said(v), f"{said(v)}\n{v.sentence}", tight=v.status),
    ]
    if twice:
        cells.append(_again(v.replication))
    return tuple(cells)


def _again(second: Verdict | None) -> Cell:
    """The verdict on a second set of test questions."""
    if second is None:
        return Cell(NONE_PRINTED)
    ours = with_interval(second) if second.value is not None else NONE_PRINTED
    return Cell(f"{ours}\n{said(second)}", f"{ours}\n{said(second)}\n{second.sentence}")
