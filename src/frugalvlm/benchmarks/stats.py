"""Intervals from a bootstrap over pictures.

Questions about one picture stand or fall together, so pictures are drawn, not questions. Two runs
on the same questions share every draw (paired), and different benchmarks are drawn independently.
A draw is a vector of weights, one count per picture, and a metric is computed from weighted sums;
nothing is scored twice. Intervals are percentile intervals (Efron and Tibshirani 1993, ch. 13); a
sheet without a single error has no spread to draw from, so its interval is a point.

scipy.stats.bootstrap is not used here: it draws the rows of its samples, builds every resample and
keeps no draw for the next call. Here a row is a picture with several sums (yes and no questions,
groups), one set of draws serves some hundred sheets, and the first 2000 of 10,000 draws are the
2000 of every table; as weights that is one matrix product. Tests hold both against each other.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from frugalvlm.benchmarks.base import Sheet

Pairs = Mapping[str, tuple[Sheet, Sheet]]


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval. What could not be computed is NaN, and `reason` says why."""

    value: float
    low: float
    high: float
    n_questions: int
    n_images: int
    reason: str = ""


def interval(sheet: Sheet, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Estimate:
    """The headline of one sheet, on its official scale."""
    draws = _draws(sheet, _weights(len(sheet.image_ids), resamples, [seed]))
    return _estimate(sheet.headline, draws, [sheet], level)


def paired_retention(
    method: Sheet, vanilla: Sheet, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Headline of a method as a percentage of the untouched model's, on the same pictures.

    Raises:
        ValueError: when the two sheets are not about the same questions.
    """
    return _paired(_retention, method, vanilla, resamples, [seed], level)


def paired_difference(
    a: Sheet, b: Sheet, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Headline of `a` minus headline of `b`, on the same pictures and their official scale.

    Raises:
        ValueError: when the two sheets are not about the same questions.
    """
    return _paired(np.subtract, a, b, resamples, [seed], level)


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
    return _mean(lambda m, v, _: _retention(m, v), pairs, resamples, seed, level)


def mean_difference(
    pairs: Pairs, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Mean over benchmarks of the difference, in percentage points of each `headline_max`.

    Arguments and errors as for `mean_retention`.
    """
    return _mean(lambda a, b, top: 100 * (a - b) / top, pairs, resamples, seed, level)


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
) -> Estimate:
    """Any figure that is computed from sums over pictures (or prompts).

    Args:
        statistic: from [..., columns] to [...]; NaN where it is undefined.
        sums: [pictures, columns].
        resamples: number of bootstrap draws.
        seed: of the draws.
        level: coverage of the interval.
    """
    draws = statistic(_weights(len(sums), resamples, [seed]) @ sums)
    draws, tail = draws[~np.isnan(draws)], (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]) if len(draws) else (math.nan, math.nan)
    value = float(statistic(sums.sum(0)))
    return Estimate(value, float(low), float(high), len(sums), len(sums))


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


def _paired(
    combine: Callable, a: Sheet, b: Sheet, resamples: int, seed: list[int], level: float
) -> Estimate:
    _same_questions(a, b)
    weights = _weights(len(a.image_ids), resamples, seed)
    value = float(combine(a.headline, b.headline))
    return _estimate(value, combine(_draws(a, weights), _draws(b, weights)), [a], level)


def _mean(combine: Callable, pairs: Pairs, resamples: int, seed: int, level: float) -> Estimate:
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
    return _estimate(float(np.mean(values)), np.mean(draws, axis=0), sheets, level, where)


def _same_questions(a: Sheet, b: Sheet, name: str = "") -> None:
    if a.image_ids != b.image_ids or len(a.correct) != len(b.correct):
        raise ValueError(
            f"{name + ': ' if name else ''}the sheets are about different questions "
            f"({len(a.correct)} on {len(a.image_ids)} pictures, "
            f"{len(b.correct)} on {len(b.image_ids)}); a paired comparison needs the same rows in "
            "the same order."
        )


def _estimate(
    value: float, draws: np.ndarray, sheets: list[Sheet], level: float, where: str = ""
) -> Estimate:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
    n_questions = sum(len(s.correct) for s in sheets)
    n_images = sum(len(s.image_ids) for s in sheets)
    low = high = math.nan
    reason = ""
    defined = draws[~np.isnan(draws)]
    if math.isnan(value):
        reason = f"the untouched model scores zero{where}, so there is nothing to retain"
    elif min(len(s.image_ids) for s in sheets) < 2:
        reason = "one picture gives no interval"
    else:
        tail = (1 - level) / 2
        low, high = (float(q) for q in np.quantile(defined, [tail, 1 - tail]))
        if defined.size < draws.size:
            reason = f"{draws.size - defined.size} of {draws.size} draws are undefined"
    return Estimate(value, low, high, n_questions, n_images, reason)
