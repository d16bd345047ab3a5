"""Intervals from a bootstrap over pictures.

Questions about one picture stand or fall together, so pictures are drawn, not questions. Two runs
on the same questions share every draw (paired), and different benchmarks are drawn independently.
A draw is a vector of weights, one count per picture, and a metric is computed from weighted sums;
nothing is scored twice. Intervals are percentile intervals (Efron and Tibshirani 1993, ch. 13).
Two cases have no such interval. Fewer than ten pictures give none at all. Where all pictures say
the same (no error at all, or not one answer that two runs give differently) there is no spread to
draw from: then the interval is Clopper and Pearson's for the share of pictures that would say
otherwise, of which none was seen.

Where several trainings of one model answered the same questions, trainings are drawn as well
(`over_trainings`).

scipy.stats.bootstrap is not used here: it draws the rows of its samples, builds every resample and
keeps no draw for the next call. Here a row is a picture with several sums (yes and no questions,
groups), one set of draws serves some hundred sheets, and the first 2000 of 10,000 draws are the
2000 of every table; as weights that is one matrix product. Tests hold both against each other.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from frugalvlm.benchmarks.base import Sheet

Pairs = Mapping[str, tuple[Sheet, Sheet]]
FEWEST = 10  # pictures (or prompts) that an interval needs
TOO_FEW = f"fewer than {FEWEST} pictures give no interval"


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval. What could not be computed is NaN, and `reason` says why.

    `draws` are its values on resampled pictures, [resamples]; `trainings` counts the models of
    other seeds that it is a mean of.
    """

    value: float
    low: float
    high: float
    n_questions: int
    n_images: int
    reason: str = ""
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)
    trainings: int = 1

    def plain(self) -> dict[str, float | int | str]:
        """As a file can hold it: without the values on resampled pictures."""
        return {name: value for name, value in vars(self).items() if name != "draws"}


def interval(sheet: Sheet, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Estimate:
    """The headline of one sheet, on its official scale."""
    draws = _draws(sheet, _weights(len(sheet.image_ids), resamples, [seed]))
    top = sheet.headline_max
    return _estimate(sheet.headline, draws, [sheet], level, scale=top, ends=(0, top))


def paired_retention(
    method: Sheet, vanilla: Sheet, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Headline of a method as a percentage of the untouched model's, on the same pictures.

    Raises:
        ValueError: when the two sheets are not about the same questions.
    """
    return _paired(_retention, method, vanilla, resamples, [seed], level, _KEPT)


def paired_difference(
    a: Sheet, b: Sheet, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Headline of `a` minus headline of `b`, on the same pictures and their official scale.

    Raises:
        ValueError: when the two sheets are not about the same questions.
    """
    top = a.headline_max
    return _paired(np.subtract, a, b, resamples, [seed], level, (-top, top), scale=top)


def mean_retention(
    pairs: Pairs, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Mean over benchmarks of the retention in percent, as papers report it.

    Args:
        pairs: for each benchmark the sheets of the method and of the untouched model.
        resamples: number of bootstrap draws.
        seed: of the draws.
        level: coverage of the interval.

    Raises:
        ValueError: when there are no benchmarks, or a pair is not about the same questions.
    """
    return _mean(lambda m, v, _: _retention(m, v), pairs, resamples, seed, level, _KEPT)


def mean_difference(
    pairs: Pairs, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Mean over benchmarks of the difference, in percentage points of each `headline_max`.

    Arguments and errors as for `mean_retention`.
    """
    ends = (-100.0, 100.0)
    return _mean(lambda a, b, top: 100 * (a - b) / top, pairs, resamples, seed, level, ends)


def over_trainings(found: Sequence[Estimate], seed: int = 0, level: float = 0.95) -> Estimate:
    """One figure of several trainings of a model: the mean, with trainings drawn, then pictures.

    A few trainings drawn from as many vary by (1 - 1 / trainings) of what new ones would; their
    distances from the mean are widened by that.

    Args:
        found: the figure of each training, on the same pictures and draws.
        seed: of the draws of trainings.
        level: coverage of the interval.
    """
    first, count = found[0], len(found)
    if count == 1:
        return first
    values = np.array([f.value for f in found])
    alone = replace(first, value=float(values.mean()), trainings=count, draws=None)
    if any(f.draws is None or math.isnan(f.low) for f in found):
        reason = next(f.reason for f in found if f.draws is None or math.isnan(f.low))
        return replace(alone, low=math.nan, high=math.nan, reason=reason)
    away = (values - values.mean()) * (math.sqrt(count / (count - 1)) - 1)
    each = np.stack([f.draws for f in found if f.draws is not None]) + away[:, None]
    resamples = each.shape[1]
    picked = np.random.default_rng([seed, count]).integers(count, size=(count, resamples))
    draws = each[picked, np.arange(resamples)].mean(0)
    low, high = _quantiles(draws[~np.isnan(draws)], level)
    return replace(alone, low=low, high=high, draws=draws)


def draws(sheet: Sheet, benchmark: str, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Values of a sheet on resampled pictures, [resamples].

    All sheets about one benchmark share every draw, those of `mean_retention` included, and more
    draws begin with the fewer ones; so any two runs can be compared in pairs.
    """
    seeds = [seed, zlib.crc32(benchmark.encode())]
    return _draws(sheet, _weights(len(sheet.image_ids), resamples, seeds))


def from_sums(
    statistic: Callable[[np.ndarray], np.ndarray],
    sums: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    top: float | None = None,
) -> Estimate:
    """Any figure that is computed from sums over pictures (or prompts).

    Args:
        statistic: from [..., columns] to [...]; NaN where it is undefined.
        sums: [pictures, columns].
        resamples: number of bootstrap draws.
        seed: of the draws.
        level: coverage of the interval.
        top: of a share, its largest value (1, or 100 of percentages); then one that all pictures
            agree on has an interval, too.
    """
    value, count = float(statistic(sums.sum(0))), len(sums)
    draws = statistic(_weights(count, resamples, [seed]) @ sums)
    nothing = Estimate(value, math.nan, math.nan, count, count, draws=draws)
    defined = draws[~np.isnan(draws)]
    if count < FEWEST or not len(defined):
        return replace(nothing, reason=TOO_FEW if count < FEWEST else "it is nowhere defined")
    if top is not None and np.ptp(defined) == 0:
        low, high = _unanimous(value, count, level, top, (0, top))
    else:
        low, high = _quantiles(defined, level)
    return replace(nothing, low=low, high=high)


def mean_interval(
    values: ArrayLike, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis (pictures), and the low and the high end of its interval.

    Args:
        values: [pictures] or [pictures, columns].
        resamples: number of bootstrap draws.
        seed: of the draws.
        level: coverage of the interval.
    """
    table, tail = np.asarray(values, dtype=np.float64), (1 - level) / 2
    draws = _weights(len(table), resamples, [seed]) @ table / len(table)
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return table.mean(0), low, high


def share(sums: np.ndarray) -> np.ndarray:
    """First column over the second, [..., 2] -> [...]; NaN over nothing."""
    top, bottom = sums[..., 0], sums[..., 1]
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def _retention(method: np.ndarray | float, vanilla: np.ndarray | float) -> np.ndarray:
    whole = np.asarray(vanilla, dtype=np.float64)
    return 100 * np.divide(method, whole, out=np.full(whole.shape, np.nan), where=whole != 0)


def _weights(images: int, resamples: int, seed: list[int]) -> np.ndarray:
    """How often each picture is drawn: [resamples, images], rows multinomial with sum `images`."""
    return _drawn(images, resamples, tuple(seed))


@lru_cache(maxsize=12)  # many figures of one benchmark share their draws
def _drawn(images: int, resamples: int, seed: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(images, size=(resamples, images))
    flat = drawn + images * np.arange(resamples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=resamples * images)
    weights = counts.reshape(resamples, images).astype(np.float64)
    weights.flags.writeable = False
    return weights


def _draws(sheet: Sheet, weights: np.ndarray) -> np.ndarray:
    return sheet.value(weights @ sheet.stats)


_KEPT = (0.0, math.inf)  # what a retention can be, in percent


def _paired(
    combine: Callable,
    a: Sheet,
    b: Sheet,
    resamples: int,
    seed: list[int],
    level: float,
    ends: tuple[float, float],
    scale: float = 100.0,
) -> Estimate:
    _same_questions(a, b)
    weights = _weights(len(a.image_ids), resamples, seed)
    value = float(combine(a.headline, b.headline))
    draws = combine(_draws(a, weights), _draws(b, weights))
    ends = (value, value) if a is b else ends  # nothing differs from itself
    return _estimate(value, draws, [a], level, scale=scale, ends=ends)


def _mean(
    combine: Callable,
    pairs: Pairs,
    resamples: int,
    seed: int,
    level: float,
    ends: tuple[float, float],
) -> Estimate:
    if not pairs:
        raise ValueError("A mean over benchmarks needs at least one benchmark.")
    values, draws = [], []
    for name, (a, b) in pairs.items():
        _same_questions(a, b, name)
        # The name decides the draws, so that they do not depend on which others are there.
        weights = _weights(len(a.image_ids), resamples, [seed, zlib.crc32(name.encode())])
        values.append(float(combine(a.headline, b.headline, a.headline_max)))
        draws.append(combine(_draws(a, weights), _draws(b, weights), a.headline_max))
    zero = [name for name, value in zip(pairs, values, strict=True) if math.isnan(value)]
    where = f" on {', '.join(zero)}" if zero else ""
    sheets = [a for a, _ in pairs.values()]
    value, mean = float(np.mean(values)), np.mean(draws, axis=0)
    if all(a is b for a, b in pairs.values()):  # nothing differs from itself
        ends = value, value
    return _estimate(value, mean, sheets, level, where, scale=100.0, ends=ends)


def _same_questions(a: Sheet, b: Sheet, name: str = "") -> None:
    if a.image_ids != b.image_ids or len(a.correct) != len(b.correct):
        raise ValueError(
            f"{name + ': ' if name else ''}the sheets are about different questions "
            f"({len(a.correct)} on {len(a.image_ids)} pictures, "
            f"{len(b.correct)} on {len(b.image_ids)}); a paired comparison needs the same rows in "
            "the same order."
        )


def _estimate(
    value: float,
    draws: np.ndarray,
    sheets: list[Sheet],
    level: float,
    where: str = "",
    *,
    scale: float,
    ends: tuple[float, float],
) -> Estimate:
    """Value and interval; `scale` is what all pictures together are worth, `ends` the limits."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
    n_questions = sum(len(s.correct) for s in sheets)
    n_images = sum(len(s.image_ids) for s in sheets)
    low = high = math.nan
    reason = ""
    defined = draws[~np.isnan(draws)]
    if math.isnan(value):
        reason = f"the untouched model scores zero{where}, so there is nothing to retain"
    elif min(len(s.image_ids) for s in sheets) < FEWEST:
        reason = TOO_FEW
    else:
        alike = np.ptp(defined) < 1e-9 * scale
        low, high = (
            _unanimous(value, n_images, level, scale, ends) if alike else _quantiles(defined, level)
        )
        if defined.size < draws.size:
            reason = f"{draws.size - defined.size} of {draws.size} draws are undefined"
    return Estimate(value, low, high, n_questions, n_images, reason, draws)


def _quantiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _unanimous(
    value: float, pictures: int, level: float, scale: float, ends: tuple[float, float]
) -> tuple[float, float]:
    """Interval of a value that no picture contradicts: by how many might it be, none seen?"""
    most = scale * binomtest(0, pictures).proportion_ci(level, "exact").high
    return max(ends[0], value - most), min(ends[1], value + most)
