"""Records scored on a part of their questions: those about what stands out, or the fine ones.

A row's category says which, in front of a slash (`salient/main_color`, `fine/relation`). Benchmarks
whose categories say nothing of the kind have no parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frugalvlm.benchmarks import ALL_BENCHMARKS
from frugalvlm.benchmarks.base import EvalSplit, Sheet
from frugalvlm.runs.records import Record, select
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.scored import Scored, SheetMaker, question_rows

__all__ = ["PARTS", "part_of", "scored_parts"]

PARTS: Mapping[str, str] = {
    "salient": "what stands out",
    "fine": "fine detail",
}


@dataclass(frozen=True)
class _Part:
    """A benchmark of which one part of the questions counts."""

    whole: SheetMaker
    name: str
    part: str

    def dataset(self, split: EvalSplit, n: int) -> Any:
        """All questions: records are about all of them."""
        if self.whole is ALL_BENCHMARKS.get(self.name):
            return question_rows(self.name, split, n)[0]
        return self.whole.dataset(split, n)

    def sheet(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[str | None]) -> Sheet:
        """The benchmark's own score of the part."""
        own = [i for i, row in enumerate(rows) if part_of(row) == self.part]
        return self.whole.sheet([rows[i] for i in own], [answers[i] for i in own])


def part_of(row: Mapping[str, Any]) -> str | None:
    """The part that a question belongs to, if its category says so."""
    head = str(row.get("category", "")).split("/")[0]
    return head if head in PARTS else None


def scored_parts(
    records: Iterable[Record],
    baseline: str = "vanilla",
    benchmarks: Mapping[str, SheetMaker] | None = None,
    guard: Guard | None = None,
) -> dict[str, tuple[Scored, list[str]]]:
    """By part the scored records, and ids of the benchmarks that have such questions.

    Args:
        records: of one setting.
        baseline: key of the untouched run.
        benchmarks: by id; default: the kit's own.
        guard: which benchmarks may enter a mean.
    """
    records = select(records, "accuracy")
    known = ALL_BENCHMARKS if benchmarks is None else benchmarks
    asked = {r["request"]["benchmark"]: (r["request"]["split"], r["request"]["n"]) for r in records}
    found: dict[str, tuple[Scored, list[str]]] = {}
    for part in PARTS:
        makers = {name: _Part(known[name], name, part) for name in asked if name in known}
        names = [
            name
            for name, maker in makers.items()
            if any(part_of(row) == part for row in maker.dataset(*asked[name]))
        ]
        if names:
            own = [r for r in records if r["request"]["benchmark"] in names]
            found[part] = Scored(own, baseline, makers, guard), names
    return found
