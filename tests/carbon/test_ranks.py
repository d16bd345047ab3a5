"""The parameter paradox, the grid and the noise, on planted runs whose true order is known."""

import itertools

import numpy as np
import pytest

from frugalvlm.carbon import (
    CarbonError,
    Spent,
    agreement,
    by_grid,
    by_parameters,
    cegi,
    greener,
    ranking,
)

KWH = 3.6e6
RANKS = (4, 8, 16, 32)


def _planted():
    """Adapters of four ranks, each a little dearer and no better: the smallest is the best buy."""
    return {
        f"rank {r}": cegi(50.0, 60.0, Spent((1 + r / 100) * KWH, 60.0 + r), r * 100_000)
        for r in RANKS
    }


def test_the_index_rewards_parameters():
    results = _planted()
    assert list(ranking(results)) == [4, 3, 2, 1]  # the largest adapter looks greenest
    assert list(ranking(results, "per_percent")) == [1, 2, 3, 4]
    assert list(ranking(results, "emission")) == [1, 2, 3, 4]
    assert agreement(results) == pytest.approx(-1.0)
    assert agreement(results, "emission", "per_percent") == pytest.approx(1.0)


def test_kendalls_tau_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    results = {
        str(i): cegi(50.0, 50 + g, Spent(e * KWH), int(p))
        for i, (g, e, p) in enumerate(zip(rng.uniform(1, 9, 8), rng.uniform(1, 3, 8),
                                          rng.integers(1, 99, 8), strict=True))
    }  # fmt: skip
    pairs = list(itertools.combinations(results.values(), 2))
    signs = [
        np.sign(a.value - b.value)
        * np.sign(a.per_percent["carbon"].value - b.per_percent["carbon"].value)
        for a, b in pairs
    ]
    assert agreement(results) == pytest.approx(np.mean(signs))


def test_at_equal_emission_and_gain_the_index_is_one_over_the_parameters():
    result = cegi(50.0, 60.0, Spent(KWH), 10**6)
    frame = by_parameters(result, [1, 2, 4, 16])
    assert list(frame["index"] * frame["parameters_m"]) == pytest.approx([result.value] * 4)
    assert frame["per_percent"].nunique() == 1
    again = [cegi(50.0, 60.0, Spent(KWH), p * 10**6).value for p in (1, 2, 4, 16)]
    assert list(frame["index"]) == pytest.approx(again)


def test_a_grid_scales_every_gram_and_no_rank():
    results = _planted()
    factors = {"clean": 25.0, "own": 475.0, "dirty": 800.0}
    frames = {name: by_grid(result, factors) for name, result in results.items()}
    for name, frame in frames.items():
        again = cegi(50.0, 60.0, Spent((1 + int(name[5:]) / 100) * KWH), int(name[5:]) * 100_000,
                     grid_g_per_kwh=25.0)  # fmt: skip
        assert frame.loc[0, "index"] == pytest.approx(again.value)
        assert frame.loc[1, "index"] == pytest.approx(results[name].value)
    for row in range(3):
        values = [frame.loc[row, "index"] for frame in frames.values()]
        assert sorted(values, reverse=True) == values
    with pytest.raises(CarbonError, match="Without energy"):
        by_grid(cegi(50.0, 60.0, Spent(seconds=3.0), 10), factors)


def test_undefined_results_have_no_rank():
    results = {**_planted(), "worse": cegi(50.0, 40.0, Spent(KWH), 10**6)}
    assert np.isnan(ranking(results)["worse"])
    assert ranking(results)["rank 32"] == 1
    assert agreement(results) == pytest.approx(-1.0)
    with pytest.raises(CarbonError, match="Two results"):
        agreement({k: results[k] for k in ("worse", "rank 4")})


def test_modelled_energy_is_never_ranked():
    results = {**_planted(), "laptop": cegi(50.0, 60.0, Spent(KWH, 50.0, modelled=True), 10**6)}
    for currency in ("carbon", "J"):
        with pytest.raises(CarbonError, match=r"energy of laptop is modelled .*currency='s'"):
            ranking(results, currency=currency)
    with pytest.raises(CarbonError, match="modelled"):
        greener(results["laptop"], results["rank 4"])
    assert len(ranking(results, currency="s")) == 5
    with pytest.raises(CarbonError, match="no figure in 'TFLOPs'"):
        ranking(results, currency="TFLOPs")


@pytest.mark.parametrize(
    "other", [{"grid_g_per_kwh": 25.0}, {"gain": "points"}, {"pue": 1.2}, {"unit": "kg"}]
)
def test_results_of_other_definitions_are_not_ranked(other):
    results = {**_planted(), "elsewhere": cegi(50.0, 60.0, Spent(KWH, 60.0), 10**6, **other)}
    with pytest.raises(CarbonError, match="same options"):
        ranking(results)


def test_how_sure_an_order_is_depends_on_the_number_of_items():
    """Two planted adapters at equal cost, right on 70 and on 74 % of the items, base on 60."""
    sure = {}
    for n in (50, 5000):
        walk = np.random.default_rng(1).random((3, n))
        base, low, high = (w < p for w, p in zip(walk, (0.6, 0.7, 0.74), strict=True))
        a, b = (
            cegi(base.astype(float), t.astype(float), Spent(KWH), 10**6, best=1.0)
            for t in (high, low)
        )
        sure[n] = greener(a, b)
        assert greener(a, b) + greener(b, a) == pytest.approx(1.0)
    assert sure[5000] > 0.99
    assert 0.01 < sure[50] < 0.99
    with pytest.raises(CarbonError, match="same items"):
        greener(a, cegi(50.0, 60.0, Spent(KWH), 10**6))
    with pytest.raises(CarbonError, match="nothing was trained"):
        greener(a, cegi(50.0, 60.0, Spent(KWH), 0))


def test_an_order_is_asked_for_in_one_currency():
    """A is cheaper in joules, B in seconds: neither answer is taken for the other."""
    a = cegi(50.0, 60.0, Spent(KWH, 90.0), 10**6)
    b = cegi(50.0, 60.0, Spent(2 * KWH, 30.0), 10**6)
    assert (greener(a, b), greener(a, b, "s")) == (1.0, 0.0)
    timed = cegi(50.0, 60.0, Spent(seconds=30.0), 10**6)
    assert greener(a, timed, "s") == 0.0
    with pytest.raises(CarbonError, match="no figure in 'carbon'"):
        greener(a, timed)
