"""Verdicts: what the records say about each claim of a paper.

A claim asks whether a quantity stands in a relation to a threshold, and may name a weaker demand.
The decision is made by the whole 95 % interval, never by the value alone:

| interval                                             | verdict         |
| ---------------------------------------------------- | --------------- |
| all of it meets the claim                            | reproduced      |
| all of it meets the weaker demand, not all the claim | same direction  |
| none of it meets the claim nor the weaker demand     | contradicted    |
| anything else: the records do not decide             | not significant |

So an interval that contains the threshold never reproduces a claim, and without a weaker demand it
is not significant, on whichever side of the threshold the value lies. Counted quantities (tokens,
FLOPs, cache bytes) are exact: their interval is a point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugalvlm.formats import NONE_PRINTED
from frugalvlm.papers import SCALES, Claim, Paper, load_paper
from frugalvlm.paths import work_dir
from frugalvlm.runs.records import Record, newest_setting, read_records, select
from frugalvlm.verdicts.evidence import Evidence, Measured, MissingEvidence
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.scored import SheetMaker

__all__ = [
    "STATUSES", "Measured", "Verdict", "all_verdicts", "decide", "verdicts",
]  # fmt: skip

STATUSES = (
    "reproduced", "same direction", "contradicted", "not significant", "not testable here",
    "not measured",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the records say about one claim at one scale.

    Attributes:
        paper: the paper's key.
        claim: the claim.
        scale: where it was tested.
        status: one of STATUSES.
        sentence: the verdict in one plain sentence.
        value: the measured quantity, None when there is none, with `low` and `high`.
        n: what it rests on (`of`: questions, rounds, images); None for counted quantities.
        reported: the paper's number (`claim.reported_on_columns`: over our benchmarks only).
        left_out: benchmarks that the guard kept out of the quantity's mean.
    """

    paper: str
    claim: Claim
    scale: str
    status: str
    sentence: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    of: str = ""
    reported: float | None = None
    left_out: tuple[str, ...] = ()


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
    evidence = Evidence(paper, own, scale, benchmarks, guard)
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


def decide(measured: Measured, claim: Claim) -> str:
    """The status that a measured interval gives a claim, see the module's table."""
    ends = (measured.low, measured.high)
    if claim.relation is None or claim.threshold is None:
        raise ValueError(f"claim {claim.id} has no relation to decide.")
    if any(math.isnan(x) for x in ends):
        return "not significant"
    strong = _holds(ends, claim.relation, claim.threshold, claim.tolerance)
    weak = strong
    if claim.weaker:
        weak = _holds(ends, claim.weaker["relation"], float(claim.weaker["threshold"]), 0.0)
    if strong is True:
        return "reproduced"
    if claim.weaker and weak is True:
        return "same direction"
    if strong is False and weak is False:
        return "contradicted"
    return "not significant"


def _holds(
    ends: tuple[float, float], relation: str, threshold: float, tolerance: float
) -> bool | None:
    """Whether a relation holds on the whole interval (True), nowhere (False), or in part (None)."""
    low, high = ends
    if relation in ("==", "~"):
        # A hair of slack: a ratio of two counts is rarely its decimal fraction to the last bit.
        slack = tolerance + 1e-9 * max(1.0, abs(threshold))
        if threshold - slack <= low and high <= threshold + slack:
            return True
        return False if high < threshold - slack or low > threshold + slack else None
    tests: dict[str, Callable[[float], bool]] = {
        ">": lambda x: x > threshold,
        ">=": lambda x: x >= threshold,
        "<": lambda x: x < threshold,
        "<=": lambda x: x <= threshold,
    }
    found = {tests[relation](low), tests[relation](high)}
    return found.pop() if len(found) == 1 else None


def _verdict(paper: Paper, claim: Claim, scale: str, evidence: Evidence) -> Verdict:
    blank = Verdict(paper.key, claim, scale, "not measured", "", reported=claim.reported)
    if scale not in claim.scales:
        why = claim.why_not.get(scale, "")
        return _with(blank, status="not testable here", sentence=f"Not testable here: {why}.")
    if claim.quantity is None:
        return _with(blank, sentence="Not measured: no record holds this quantity yet.")
    try:
        measured = evidence.measure(claim.quantity)
    except MissingEvidence as missing:
        return _with(blank, sentence=f"Not measured: {missing}.")
    if math.isnan(measured.value):
        return _with(
            blank,
            status="not significant",
            sentence=f"Undefined: {measured.reason or 'no number comes out'}.",
        )
    status = decide(measured, claim)
    found = _with(
        blank, status=status, value=measured.value, low=measured.low, high=measured.high,
        n=measured.n, of=measured.of, left_out=evidence.left_out(claim.quantity),
    )  # fmt: skip
    return _with(found, sentence=_sentence(found, measured.reason))


def _with(verdict: Verdict, **changes: Any) -> Verdict:
    return Verdict(**{**vars(verdict), **changes})


def _sentence(v: Verdict, why_no_interval: str) -> str:
    measured = f"Measured {with_interval(v)} {v.claim.unit}".rstrip()
    basis = "" if v.n is None else f" on {v.n} {v.of}"
    return f"{measured}{basis}; asked {asked(v.claim)}, {_finding(v, why_no_interval)}."


def _finding(v: Verdict, why_no_interval: str) -> str:
    if v.low is None or v.high is None or math.isnan(v.low):
        return f"which cannot be decided: {why_no_interval or 'there is no interval'}"
    point = v.low == v.high
    if v.status == "reproduced":
        return "which holds" if point else "which holds on the whole interval"
    claim = v.claim
    fails = "which does not hold" if point else "which holds nowhere on the interval"
    if claim.weaker is None:
        return fails if v.status == "contradicted" else "which the interval does not decide"
    why = f" ({claim.weaker['why']})" if "why" in claim.weaker else ""
    weaker = f"the weaker {claim.weaker['relation']} {claim.weaker['threshold']:g}{why}"
    ends, threshold = (v.low, v.high), float(claim.threshold or 0)
    if _holds(ends, claim.relation or "", threshold, claim.tolerance) is not False:
        fails = "which the interval does not decide"
    ending = {
        "same direction": f"but {weaker} holds",
        "contradicted": f"and neither does {weaker}",
        "not significant": f"and {weaker} is not decided",
    }
    return f"{fails}; {ending[v.status]}"


def with_interval(v: Verdict) -> str:
    if v.low is None or v.high is None or v.value is None:
        return NONE_PRINTED
    value = _short(v.value)
    if v.low == v.high == v.value:
        return value
    if math.isnan(v.low):
        return f"{value} [no interval]"
    return f"{value} [{_short(v.low)}, {_short(v.high)}]"


def _short(x: float) -> str:
    digits = 1 if abs(x) >= 10 else 2 if abs(x) >= 1 else 3
    return f"{x:.{digits}f}" if x != round(x) else f"{x:.0f}"


def asked(claim: Claim) -> str:
    if claim.relation is None or claim.threshold is None:
        return ""
    around = f" ±{claim.tolerance:g}" if claim.relation == "~" and claim.tolerance else ""
    sign = {">=": "≥", "<=": "≤", "==": "=", "~": "≈"}.get(claim.relation, claim.relation)
    return f"{sign} {claim.threshold:.4g}{around}"
