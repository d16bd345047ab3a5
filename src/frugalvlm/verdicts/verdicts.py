"""Verdicts: what the records say about each claim of a paper.

How a measured interval decides is in `decision`, what is measured in `evidence`. The verdicts of a
paper at a scale are one family: all that have an interval are corrected together by Holm's method,
and one that does not outlast it is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from frugalvlm.papers import SCALES, Claim, Paper, load_paper
from frugalvlm.paths import work_dir
from frugalvlm.pocket.installed import seeds_of
from frugalvlm.runs.records import Record, created, newest_setting, read_records, select
from frugalvlm.verdicts.decision import (
    DECIDED,
    STATUSES,
    UNTESTED,
    Verdict,
    decide,
    p_value,
    share_of,
)
from frugalvlm.verdicts.evidence import measure
from frugalvlm.verdicts.from_answers import left_out
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.quantity import Evidence, Measured, MissingEvidence, Untestable
from frugalvlm.verdicts.ranking import LEVEL, holm
from frugalvlm.verdicts.scored import SheetMaker
from frugalvlm.verdicts.wording import sentence

__all__ = [
    "REPLICATION",
    "STATUSES",
    "Measured",
    "Verdict",
    "all_verdicts",
    "decide",
    "verdicts",
]

REPLICATION = "replication"  # folder of the records that answer a second set of test questions


def verdicts(
    paper: Paper | str,
    records: Iterable[Record],
    scale: str,
    *,
    beside: Mapping[str, Sequence[Record]] | None = None,
    benchmarks: Mapping[str, SheetMaker] | None = None,
    guard: Guard | None = None,
) -> list[Verdict]:
    """One verdict per claim, in the paper's order.

    Args:
        paper: the paper or its key.
        records: records of this scale, of one setting; incomplete ones are left out.
        scale: "pocket", "blueprint" or "full".
        beside: by name those of other models, of other trainings of the same model
            (`pocket.installed.seeds_of`), and of a second set of questions ("replication").
        benchmarks: by id; default: the kit's own.
        guard: which benchmarks may enter a mean; default: by the scores stored with the weights.

    Raises:
        ValueError: for an unknown scale.
        MixedSettingError: when the records come from several models, machines and so on.
    """
    if scale not in SCALES:
        raise ValueError(f"Unknown scale '{scale}'. Known: {', '.join(SCALES)}.")
    paper = load_paper(paper) if isinstance(paper, str) else paper

    def evidence_of(found: Iterable[Record]) -> Evidence:
        return Evidence.of(paper, select(found, scale=scale), scale, benchmarks, guard)

    others = {name: evidence_of(found) for name, found in (beside or {}).items()}
    own = replace(evidence_of(records), beside=others)
    seeds = seeds_of(own.model)[1:] if own.model else ()
    own = replace(own, trainings=tuple(others[name] for name in seeds if name in others))
    found = _corrected([_verdict(paper, claim, scale, own) for claim in paper.claims])
    if REPLICATION not in others:
        return found
    again = [_verdict(paper, claim, scale, others[REPLICATION]) for claim in paper.claims]
    second = [None if v.status in UNTESTED else v for v in _corrected(again)]
    return [replace(v, replication=w) for v, w in zip(found, second, strict=True)]


def all_verdicts(
    paper: Paper, records: Iterable[Record], scale: str, results: Path | None = None
) -> list[Verdict]:
    """As `verdicts`, with what lies in folders of its own beside the records.

    Runs with another model, with another training of the same one, and of a second set of test
    questions lie in `results/SCALE/KEY/NAME/records`.

    Args:
        paper: whose claims.
        records: of the paper's own folder.
        scale: "pocket", "blueprint" or "full".
        results: the folder of results; default: the work folder.
    """
    folders = sorted(((results or work_dir()) / scale / paper.key).glob("*/records"))
    beside = {folder.parent.name: newest_setting(read_records(folder)) for folder in folders}
    return verdicts(paper, records, scale, beside=beside)


def _verdict(paper: Paper, claim: Claim, scale: str, evidence: Evidence) -> Verdict:
    blank = Verdict(paper.key, claim, scale, "not measured", "", reported=claim.reported)
    if scale not in claim.scales:
        why = f"not testable here: {claim.why_not.get(scale, '')}"
        return replace(blank, status="not testable", sentence=sentence(blank, why))
    if claim.quantity is None:
        return replace(
            blank, sentence=sentence(blank, "not measured: no record holds this quantity yet")
        )
    try:
        measured = measure(evidence, claim.quantity)
    except MissingEvidence as missing:
        return replace(blank, sentence=sentence(blank, f"not measured: {missing}"))
    except Untestable as never:
        never_here = sentence(blank, f"not testable here: {never}")
        return replace(blank, status="not testable", sentence=never_here)
    if math.isnan(measured.value):
        why = measured.reason or "no number comes out"
        return replace(blank, status="undecided", sentence=sentence(blank, f"undefined: {why}"))
    found = replace(
        blank, status="not comparable" if claim.not_comparable else decide(measured, claim),
        value=measured.value, low=measured.low, high=measured.high, n=measured.n, of=measured.of,
        spread="" if math.isnan(measured.low) else measured.spread, trainings=measured.trainings,
        share=share_of(measured.value, claim), left_out=left_out(evidence, claim.quantity),
        late=_late(claim, evidence),
    )  # fmt: skip
    if found.status in DECIDED and found.spread == "interval":
        found = replace(found, p=p_value(measured, claim))
    return replace(found, sentence=sentence(found, measured.reason))


def _corrected(found: Sequence[Verdict]) -> list[Verdict]:
    """Holm's correction over all verdicts that an interval decides."""
    p = holm({v.claim.id: v.p for v in found if v.p is not None})
    return [_outlasting(v, p[v.claim.id]) if v.claim.id in p else v for v in found]


def _outlasting(v: Verdict, corrected: float) -> Verdict:
    v = replace(v, corrected=corrected)
    if corrected < LEVEL or v.status == "undecided":
        return v
    v = replace(v, status="undecided")
    return replace(v, sentence=sentence(v, ""))


def _late(claim: Claim, evidence: Evidence) -> bool:
    """Whether the claim was last changed after the first record that it is held against."""
    with suppress(MissingEvidence):
        if evidence.scale == "pocket" and "pocket_model" in (claim.quantity or {}):
            evidence = evidence.about((claim.quantity or {})["pocket_model"])
    analyses = (*evidence.attention, *evidence.analyses)
    made = {
        "accuracy": [created(r) for r in evidence.scored.records],
        "finding": [created(r) for r in analyses],
    }.get(claim.about, [row["made"] for row in evidence.rows])
    return bool(claim.written and made) and min(made) < datetime.fromisoformat(claim.written)
