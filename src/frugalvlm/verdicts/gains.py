"""Visual gain: how much of what the pictures are worth a method keeps.

Retention flatters where a question answers itself: of a model that is right on 60 of 100 questions
with a grey picture and on 80 with the real one, a method that shows nothing retains 75 %. Its gain,
(score - blank) / (untouched - blank), is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from frugalvlm.benchmarks import stats
from frugalvlm.benchmarks.base import Sheet
from frugalvlm.benchmarks.stats import Estimate
from frugalvlm.verdicts.scored import Scored

__all__ = ["BLANK", "gain_of", "visual_gain"]

BLANK = "blank"  # the run whose pictures are one grey


def visual_gain(
    scored: Scored, method: str, budget: int, benchmarks: Sequence[str], level: float = 0.95
) -> Estimate | None:
    """(score - blank) / (untouched - blank) in percent, the mean over benchmarks, paired.

    Args:
        scored: the records; those of the method, of the untouched model and with blank pictures
            share every resampled picture.
        method: key.
        budget: visual tokens asked for.
        benchmarks: ids; those that the guard does not admit are left out of the mean.
        level: coverage of the interval.

    Returns:
        None where a record is missing.
    """
    total = scored.total
    if total is None:
        return None
    names = scored.guard.admitted(benchmarks)
    asked = ((method, budget), (scored.baseline, total), (BLANK, total))
    runs = {name: [scored.sheet(key, kept, name) for key, kept in asked] for name in names}
    known = {n: [s for s in own if s is not None] for n, own in runs.items()}
    if not known or any(len(own) < len(asked) for own in known.values()):
        return None
    return _estimate(known, level)


def _estimate(runs: Mapping[str, Sequence[Sheet]], level: float) -> Estimate:
    """The mean over benchmarks from the sheets of method, untouched model and blank pictures."""
    values, draws = [], []
    for name, sheets in runs.items():
        values.append(float(gain_of(*(np.array(s.headline) for s in sheets))))
        draws.append(gain_of(*(stats.draws(s, name) for s in sheets)))
    value, drawn = float(np.mean(values)), np.mean(draws, axis=0)
    defined, tail = drawn[~np.isnan(drawn)], (1 - level) / 2
    low, high, reason = float("nan"), float("nan"), ""
    first = [sheets[0] for sheets in runs.values()]
    if np.isnan(value):
        nothing = [name for name, v in zip(runs, values, strict=True) if np.isnan(v)]
        reason = f"the pictures are worth nothing on {', '.join(nothing)}, so no share can be kept"
    elif min(len(s.image_ids) for s in first) < 2:
        reason = "one picture gives no interval"
    else:
        low, high = (float(q) for q in np.quantile(defined, [tail, 1 - tail]))
    n_questions = sum(len(s.correct) for s in first)
    return Estimate(value, low, high, n_questions, sum(len(s.image_ids) for s in first), reason)


def gain_of(score: np.ndarray, untouched: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """Percent of the way from blank to untouched; NaN where that is no way up."""
    whole = np.asarray(untouched - blank, dtype=float)
    nothing = np.full(whole.shape, np.nan)
    return np.divide(100 * (score - blank), whole, out=nothing, where=whole > 0)
