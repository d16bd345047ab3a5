"""How far a ranking by CEGI can be trusted: the parameter paradox, the grid, the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from frugalvlm.carbon.figure import CarbonError, product_of
from frugalvlm.carbon.index import Cegi

__all__ = ["Measure", "agreement", "by_grid", "by_parameters", "greener", "ranking"]

Measure: TypeAlias = Literal["index", "per_percent", "emission"]
ALIKE = ("gain", "scope", "unit", "grid_g_per_kwh", "pue", "parts")


def by_parameters(
    result: Cegi, millions: Sequence[float], currency: str = "carbon"
) -> pd.DataFrame:
    """The paradox: E and G as they are, and other numbers of trainable parameters.

    Nothing is saved from one row to the next, yet the index falls as 1 / P.

    Args:
        result: whose E and G.
        millions: numbers of trainable parameters.
        currency: of the cost, as in `Cegi.index`.

    Returns:
        Columns: parameters_m, index, per_percent (which stays).
    """
    each = result.per_percent[currency].value
    return pd.DataFrame([
        {"parameters_m": p, "index": None if each is None else each / p, "per_percent": each}
        for p in millions
    ])  # fmt: skip


def by_grid(result: Cegi, factors: Mapping[str, float]) -> pd.DataFrame:
    """The same run on other grids: every gram times one constant, so ranks within a grid stay.

    Args:
        result: with known energy.
        factors: by name grams of CO2e per kWh.

    Returns:
        Columns: grid, g_per_kwh, emission, index.

    Raises:
        CarbonError: no energy is known.
    """
    if "carbon" not in result.index:
        raise CarbonError("Without energy there is no gram that a grid's factor could change.")
    own = result.options["grid_g_per_kwh"]
    return pd.DataFrame([
        {"grid": name, "g_per_kwh": factor,
         "emission": product_of(result.emission["carbon"], factor / own).value,
         "index": product_of(result.index["carbon"], factor / own).value}
        for name, factor in factors.items()
    ])  # fmt: skip


def ranking(
    results: Mapping[str, Cegi], by: Measure = "index", currency: str = "carbon"
) -> pd.Series:
    """Ranks from 1, the lowest cost first; results without a value have none (NaN).

    Ranks in seconds or FLOPs are ranks in seconds or FLOPs, not in carbon.

    Args:
        results: by name; one task and metric, one grid, one definition of gain and scope.
        by: the index, the cost per percent, or the cost alone.
        currency: of the cost.

    Raises:
        CarbonError: carbon or joules of which some are modelled; options that differ; a currency
            that some result lacks.
    """
    _comparable(results, currency)
    return _values(results, by, currency).rank(method="average")


def agreement(
    results: Mapping[str, Cegi], a: Measure = "index", b: Measure = "per_percent",
    currency: str = "carbon",
) -> float:  # fmt: skip
    """Kendall's tau between two rankings of the same results: 1 the same order, -1 reversed.

    Raises:
        CarbonError: as by `ranking`, or fewer than two results have both values.
    """
    ranks = pd.concat([ranking(results, by, currency) for by in (a, b)], axis=1).dropna()
    if len(ranks) < 2:
        raise CarbonError("Two results with a value are needed to compare two orders.")
    return float(kendalltau(ranks.iloc[:, 0], ranks.iloc[:, 1]).statistic)


def greener(a: Cegi, b: Cegi, currency: str = "carbon") -> float:
    """In which share of draws `a` has the lower index; both on the same items, ties halved.

    Far from 0 and 1 the order of the two is clear; in between it is noise.

    Raises:
        CarbonError: as by `ranking`; they rest on different numbers of items or draws; nothing was
            trained in one of them.
    """
    _comparable({"a": a, "b": b}, currency)
    own, other = (result.draws.get(currency) for result in (a, b))
    if own is None or other is None:
        raise CarbonError("Where nothing was trained there is no index to compare.")
    if a.n_items != b.n_items or len(own) != len(other):
        raise CarbonError("Only results on the same items and with as many draws are compared.")
    return float(np.mean((own < other) + 0.5 * (own == other)))


def _values(results: Mapping[str, Cegi], by: Measure, currency: str) -> pd.Series:
    if by not in ("index", "per_percent", "emission"):
        raise CarbonError(f"by is one of index, per_percent, emission; got {by!r}.")
    return pd.Series({n: getattr(r, by)[currency].value for n, r in results.items()}, dtype=float)


def _comparable(results: Mapping[str, Cegi], currency: str) -> None:
    for name, result in results.items():
        if currency not in result.index:
            raise CarbonError(f"{name} has no figure in {currency!r}; it has "
                              f"{', '.join(result.index)}.")  # fmt: skip
    modelled = [name for name, result in results.items() if not result.rankable]
    if modelled and currency in ("carbon", "J"):
        raise CarbonError(
            f"The energy of {', '.join(modelled)} is modelled or unreliable, and modelled energy "
            "is never ranked: rank seconds (currency='s') or FLOPs ('TFLOPs') as such."
        )
    options = [tuple(result.options[name] for name in ALIKE) for result in results.values()]
    if len(set(options)) > 1:
        raise CarbonError(
            "Results of different grids, units or definitions are not ranked: compute all of them "
            "with the same options."
        )
