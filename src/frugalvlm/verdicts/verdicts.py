"""Verdicts: what the records say about each claim of a paper.

How a measured interval decides is in `decision`, what is measured in `evidence`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from frugalvlm.papers import SCALES, Claim, Paper, load_paper
from frugalvlm.paths import work_dir
from frugalvlm.runs.records import Record, newest_setting, read_records, select
from frugalvlm.verdicts.decision import STATUSES, Verdict, decide
from frugalvlm.verdicts.evidence import measure
from frugalvlm.verdicts.from_answers import left_out
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.quantity import Evidence, Measured, MissingEvidence
from frugalvlm.verdicts.scored import SheetMaker
from frugalvlm.verdicts.wording import sentence

__all__ = ["STATUSES", "Measured", "Verdict", "all_verdicts", "decide", "verdicts"]


def verdicts(
    paper: Paper | str,
    records: Iterable[Record],
    scale: str,
    *,
    benchmarks: Mapping[str, SheetMaker] | None = None,
    guard: Guard | None = None,
) -> list[Verdict]:
    """One verdict per claim, in the paper's order.

    Args:
        paper: the paper or its key.
        records: records of this scale, of one setting; incomplete ones are left out.
        scale: "pocket", "blueprint" or "full".
        benchmarks: by id; default: the kit's own.
        guard: which benchmarks may enter a mean; default: by the scores stored with the weights.

    Raises:
        ValueError: for an unknown scale.
        MixedSettingError: when the records come from several models, machines and so on.
    """
    if scale not in SCALES:
        raise ValueError(f"Unknown scale '{scale}'. Known: {', '.join(SCALES)}.")
    paper = load_paper(paper) if isinstance(paper, str) else paper
    own = select(records, scale=scale)
    evidence = Evidence.of(paper, own, scale, benchmarks, guard)
    return [_verdict(paper, claim, scale, evidence) for claim in paper.claims]


def all_verdicts(
    paper: Paper, records: Iterable[Record], scale: str, results: Path | None = None
) -> list[Verdict]:
    """As `verdicts`, claims about another embedded model than the records' included.

    Runs with another model lie in a folder of their own, `results/SCALE/KEY/MODEL/records`.

    Args:
        paper: whose claims.
        records: of the paper's own folder.
        scale: "pocket", "blueprint" or "full".
        results: the folder of results; default: the work folder.
    """
    found = verdicts(paper, records, scale)
    for folder in sorted(((results or work_dir()) / scale / paper.key).glob("*/records")):
        made = newest_setting(read_records(folder))
        other = {v.claim.id: v for v in verdicts(paper, made, scale) if v.value is not None}
        found = [v if v.value is not None else other.get(v.claim.id, v) for v in found]
    return found


def _verdict(paper: Paper, claim: Claim, scale: str, evidence: Evidence) -> Verdict:
    blank = Verdict(paper.key, claim, scale, "not measured", "", reported=claim.reported)
    if scale not in claim.scales:
        why = claim.why_not.get(scale, "")
        return replace(blank, status="not testable here", sentence=f"Not testable here: {why}.")
    if claim.quantity is None:
        return replace(blank, sentence="Not measured: no record holds this quantity yet.")
    try:
        measured = measure(evidence, claim.quantity)
    except MissingEvidence as missing:
        return replace(blank, sentence=f"Not measured: {missing}.")
    if math.isnan(measured.value):
        return replace(
            blank,
            status="not significant",
            sentence=f"Undefined: {measured.reason or 'no number comes out'}.",
        )
    status = decide(measured, claim)
    found = replace(
        blank, status=status, value=measured.value, low=measured.low, high=measured.high,
        n=measured.n, of=measured.of, left_out=left_out(evidence, claim.quantity),
    )  # fmt: skip
    return replace(found, sentence=sentence(found, measured.reason))
