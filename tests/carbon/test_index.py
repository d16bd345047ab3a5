"""CEGI against slow references, planted numbers, and every open choice of the paper."""

import json
import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from frugalvlm import carbon
from frugalvlm.benchmarks import load_benchmark
from frugalvlm.benchmarks.base import without_pictures
from frugalvlm.carbon import CarbonError, Spent, cegi
from frugalvlm.errors import FrugalError
from frugalvlm.measure import Energy, EnergyResult

KWH = 3.6e6
ONE = Spent(joules=2 * KWH, seconds=600.0, flops=3e15)  # 2 kWh


def _items(n=60, seeds=3, seed=0):
    """Planted scores in 0..1: base, and a better model of each seed on the same items."""
    rng = np.random.default_rng(seed)
    base = (rng.random(n) < 0.5).astype(float)
    tuned = np.maximum(base, rng.random((seeds, n)) < 0.4) * (rng.random((seeds, n)) < 0.95)
    return base, tuned.astype(float)


def test_by_hand():
    found = cegi(50.0, 60.0, ONE, 4_000_000, grid_g_per_kwh=400.0)
    assert found.emission["carbon"].value == pytest.approx(800.0)  # 2 kWh of 400 g
    assert found.gain.value == pytest.approx(20.0)  # 10 of 50
    assert found.parameters_m == 4.0
    assert found.value == pytest.approx(800 / (20 * 4))
    assert found.per_percent["carbon"].value == pytest.approx(40.0)
    assert found.index["s"].value == pytest.approx(600 / 80)
    assert found.index["TFLOPs"].value == pytest.approx(3000 / 80)
    assert found.index["J"].value == pytest.approx(2 * KWH / 80)
    assert found.rankable
    text = str(found)
    for part in ("G 20 %", "P 4 million", "E 800 g CO2e", "E/G 40 g CO2e per %", "CEGI 10 g CO2e"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"gain": "points"}, 950 / (10 * 4)),
        ({"unit": "kg"}, 0.95 / 80),
        ({"grid_g_per_kwh": 47.5}, 95 / 80),
        ({"pue": 1.5}, 1425 / 80),
        ({"scope": "training+evaluation", "evaluation": KWH}, 3 * 475 / 80),
        ({"evaluation": KWH}, 950 / 80),  # known, but not asked for
    ],
)
def test_every_open_choice_is_an_option(options, value):
    """475 g a kWh unless told otherwise: 950 g, gain 20 % or 10 points, 4 million parameters."""
    found = cegi(50.0, 60.0, 2 * KWH, 4_000_000, **options)
    assert found.value == pytest.approx(value)
    asked = {k: v for k, v in options.items() if k != "evaluation"}
    assert found.options.items() >= asked.items()


def test_points_are_of_a_hundred_whatever_the_metrics_scale():
    share = cegi(0.5, 0.6, ONE, 10, gain="points", best=1.0)
    percent = cegi(50.0, 60.0, ONE, 10, gain="points")
    assert share.gain.value == pytest.approx(percent.gain.value) == pytest.approx(10.0)
    assert cegi(0.5, 0.6, ONE, 10).gain.value == pytest.approx(20.0)  # relative needs no scale


def test_parts_of_the_machine_can_be_left_out():
    energy = Energy(
        {"gpu": 3 * KWH, "cpu": KWH, "ram": None}, {"gpu": "counter", "cpu": "rapl"}, 10
    )
    whole, gpu = (
        cegi(50.0, 60.0, energy, 10**6, grid_g_per_kwh=100.0, **more)
        for more in ({}, {"parts": ["gpu"]})
    )
    assert whole.emission["carbon"].value == pytest.approx(400.0)
    assert gpu.emission["carbon"].value == pytest.approx(300.0)


# -- what is undefined -----------------------------------------------------------------------------


@pytest.mark.parametrize("tuned", [50.0, 40.0])
def test_without_a_gain_it_is_undefined_and_the_rest_stands(tuned):
    found = cegi(50.0, tuned, ONE, 10**6)
    assert found.value is None
    assert "no gain" in found.reason
    assert found.emission["carbon"].value == pytest.approx(950.0)
    assert found.gain.value == pytest.approx(2 * (tuned - 50))
    assert found.per_percent["carbon"].value is None
    assert "undefined" in str(found)
    assert "inf" not in str(found)


def test_without_trainable_parameters_it_is_undefined_but_the_cost_of_a_percent_is_not():
    found = cegi(50.0, 60.0, ONE, 0)
    assert found.value is None
    assert "Nothing was trained" in found.reason
    assert found.per_percent["carbon"].value == pytest.approx(950 / 20)


def test_a_base_of_zero_has_no_relative_gain():
    found = cegi(0.0, 10.0, ONE, 10**6)
    assert found.value is None
    assert found.gain.value is None
    assert "gain='points'" in found.reason
    assert cegi(0.0, 10.0, ONE, 10**6, gain="points").value == pytest.approx(95.0)


def test_energy_that_is_modelled_is_told_and_not_rankable():
    modelled = Energy({"cpu": KWH}, {"cpu": "tdp_load_model"}, 30.0, modelled=True)
    found = cegi(50.0, 60.0, modelled, 10**6)
    assert found.value == pytest.approx(475 / 20)
    assert not found.rankable
    assert "modelled: never ranked" in str(found)
    windows = (Energy({"gpu": 5.0}, {"gpu": "counter"}, 1.0),) * 3
    shaky = EnergyResult(windows, (1, 1, 1), {"gpu": "counter"}, False, None, ("too short",))
    assert not cegi(50.0, 60.0, shaky, 10**6).rankable


def test_without_energy_seconds_and_flops_are_left():
    found = cegi(50.0, 60.0, Spent(seconds=40.0, flops=2e12), 10**6)
    assert found.value is None
    assert set(found.index) == {"s", "TFLOPs"}
    assert (found.index["s"].value, found.index["TFLOPs"].value) == (2.0, 0.1)
    assert not found.rankable
    assert "per second or per FLOP" in found.reason


# -- intervals -------------------------------------------------------------------------------------


def _slow(base, tuned, joules, millions, resamples, kind):
    """The bootstrap written out: loops, a sort, and the two draws of the implementation."""
    n, seeds = len(base), len(tuned)
    places = np.random.default_rng([0, zlib.crc32(b"cegi")]).integers(n, size=(resamples, n))
    chosen = np.random.default_rng([0, 1]).integers(seeds, size=(resamples, seeds))
    values = []
    for items, runs in zip(places, chosen, strict=True):
        before = sum(base[i] for i in items) / n
        after = sum(sum(tuned[s][i] for i in items) / n for s in runs) / seeds
        gain = 100 * (after - before) / (before if kind == "relative" else 1.0)
        emission = sum(joules[s] for s in runs) / seeds / KWH * 475
        values.append(emission / gain / millions if gain > 0 else math.inf)
    values.sort()
    return values[math.floor(0.025 * (resamples - 1))], values[math.ceil(0.975 * (resamples - 1))]


@pytest.mark.parametrize("kind", ["relative", "points"])
def test_bootstrap_over_items_and_seeds_is_the_slow_one(kind):
    base, tuned = _items()
    joules = [KWH, 1.5 * KWH, 0.8 * KWH]
    found = cegi(base, tuned, joules, 2_000_000, best=1.0, gain=kind, resamples=400)
    low, high = _slow(base, tuned, joules, 2.0, 400, kind)
    assert found.index["carbon"].low == pytest.approx(low)
    assert found.index["carbon"].high == pytest.approx(high)
    assert found.index["carbon"].low < found.value < found.index["carbon"].high
    assert (found.n_items, found.n_seeds) == (60, 3)


def test_items_are_paired():
    """The same few items differ, so the interval is far narrower than that of unpaired items."""
    base = np.tile([0.0, 1.0], 50)
    tuned = base.copy()
    tuned[::2][:15] = 1.0
    found = cegi(base, tuned, ONE, 10**6, best=1.0, gain="points")
    assert found.gain.value == pytest.approx(15.0)
    spread = math.sqrt(0.15 * 0.85 / 100) * 100  # of 15 of 100 items that changed
    assert found.gain.high - found.gain.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_trainings_vary_and_one_alone_shows_nothing_of_it():
    base, tuned = _items(200, 1)
    apart = np.concatenate([tuned, np.minimum(tuned + (np.arange(200) < 60), 1)])
    one = cegi(base, apart[0], ONE, 10**6, best=1.0, gain="points")
    both = cegi(base, apart, ONE, 10**6, best=1.0, gain="points")
    assert both.gain.high - both.gain.low > 1.5 * (one.gain.high - one.gain.low)


def test_a_gain_that_may_be_nothing_leaves_the_upper_end_open():
    rng = np.random.default_rng(3)
    base = (rng.random(50) < 0.5).astype(float)
    tuned = base.copy()
    tuned[base == 0] = (np.arange((base == 0).sum()) < 4).astype(float)
    tuned[np.flatnonzero(base)[:2]] = 0.0
    found = cegi(base, tuned, ONE, 10**6, best=1.0)
    assert found.value > 0
    assert found.index["carbon"].high is None
    assert found.index["carbon"].low > 0
    assert found.no_gain > 0.025
    assert "no upper end" in found.reason


def test_noise_is_the_gains_standard_error_over_the_gain():
    n, p = 400, 0.1
    base = np.tile([0.0, 1.0], n // 2)
    tuned = base.copy()
    tuned[::2][: int(p * n)] = 1.0
    found = cegi(base, tuned, ONE, 10**6, best=1.0, gain="points")
    assert found.noise == pytest.approx(math.sqrt(p * (1 - p) / n) / p, rel=0.06)


# -- what goes in ----------------------------------------------------------------------------------


def _record(name, wrong, n=30):
    """An accuracy record of a pocket benchmark whose first `wrong` answers are wrong."""
    rows = without_pictures(load_benchmark(name).dataset("dev", n))
    answers = [[r["question_id"], "none" if i < wrong else r["answer"]] for i, r in enumerate(rows)]
    return {
        "kind": "accuracy", "request": {"benchmark": name, "split": "dev", "n": n},
        "provenance": {"data_hash": None}, "answers": answers,
    }  # fmt: skip


def test_two_records():
    base, tuned = _record("pocket-gqa", 15), _record("pocket-gqa", 6)
    found = cegi(base, tuned, KWH, 10**6)
    assert found.gain.value == pytest.approx(60.0)  # 24 of 30 after 15 of 30
    assert found.n_items == len({r.rpartition("-")[0] for r, _ in base["answers"]}) > 1
    seeds = cegi(base, [tuned, _record("pocket-gqa", 9)], [KWH, KWH], 10**6)
    assert seeds.gain.value == pytest.approx(50.0)
    assert seeds.n_seeds == 2


def test_records_of_other_questions_are_refused():
    base = _record("pocket-gqa", 15)
    with pytest.raises(CarbonError, match="different items"):
        cegi(base, _record("pocket-vqav2", 6), KWH, 10**6)
    with pytest.raises(CarbonError, match="different items"):
        cegi(base, _record("pocket-gqa", 6, n=27), KWH, 10**6)
    base["answers"] = base["answers"][::-1]
    with pytest.raises(CarbonError, match="run it again"):
        cegi(base, base, KWH, 10**6)
    with pytest.raises(CarbonError, match="scores per item"):
        cegi({"kind": "efficiency"}, base, KWH, 10**6)


def test_training_log_is_read_session_by_session():
    session = {"seconds": 50.0, "joules": {"gpu": KWH, "cpu": None}, "methods": {"gpu": "counter"}}
    log = {"seconds": 100.0, "sessions": [session, session]}
    found = carbon.spent_of(log)
    assert (found.joules, found.seconds, found.rankable) == (2 * KWH, 100.0, True)
    assert found.methods == (("gpu", "counter"),)
    killed = carbon.spent_of(log | {"seconds": 150.0})  # a session left no entry
    assert (killed.joules, killed.seconds, killed.rankable) == (None, 150.0, False)
    unread = carbon.spent_of({"sessions": [{"seconds": 5.0, "joules": {}, "methods": {}}]})
    assert (unread.joules, unread.seconds) == (None, 5.0)
    half = [session, session | {"joules": {"gpu": KWH, "cpu": 1.0}}]
    assert carbon.spent_of({"sessions": half}).joules is None


def test_the_log_of_a_shipped_model_can_be_read():
    from frugalvlm.paths import data_dir

    log = json.loads((data_dir() / "models/pocket-llava-small/training_log.json").read_text())
    assert carbon.spent_of(log).seconds == pytest.approx(log["seconds"])


def test_parameters_of_a_model_are_those_that_take_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert carbon.trainable_parameters(model) == 4 * 2 + 2
    assert cegi(50.0, 60.0, ONE, model).parameters_m == pytest.approx(1e-5)
    packed = nn.Parameter(torch.zeros(3, 4, dtype=torch.uint8), requires_grad=False)
    model.register_parameter("packed", packed)
    assert carbon.trainable_parameters(model) == 10


def test_parameters_of_adapters_are_those_of_real_ones():
    class Lora(nn.Module):
        def __init__(self, layer, rank):
            super().__init__()
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)

    block = nn.ModuleDict({"q_proj": nn.Linear(12, 12), "up_proj": nn.Linear(12, 30)})
    model = nn.ModuleList([block, nn.Linear(12, 5)])
    for rank in (1, 4, 8):
        real = sum(p.numel() for layer in block.values() for p in Lora(layer, rank).parameters())
        assert carbon.lora_parameters(model, rank, ["q_proj", "up_proj"]) == real
    with pytest.raises(CarbonError, match=r"q_proj, up_proj; got \['k_proj'\]"):
        carbon.lora_parameters(model, 4, ["k_proj"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"gain": "error"}, "relative, points"),
        ({"unit": "t"}, "g, kg"),
        ({"scope": "life"}, "training, training"),
        ({"scope": "training+evaluation"}, "needs evaluation="),
        ({"pue": 0.0}, "pue is a number above 0"),
        ({"grid_g_per_kwh": -1}, "grid_g_per_kwh"),
        ({"parts": ["disk"]}, "gpu, cpu, ram"),
        ({"tuned": [60.0, 61.0]}, "different items"),
        ({"tuned": float("nan")}, "finite number"),
        ({"spent": -1.0}, "cannot be negative"),
        ({"spent": [1.0, 2.0]}, "2 costs for 1 trainings"),
        ({"spent": Spent()}, "joules, seconds or FLOPs"),
        ({"spent": {"joules": 3}}, "sessions"),
        ({"trainable_parameters": 1.5}, "whole one"),
        ({"trainable_parameters": -1}, "whole one"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(more, says):
    given = {"base": 50.0, "tuned": 60.0, "spent": ONE, "trainable_parameters": 10, **more}
    with pytest.raises(FrugalError, match=says):
        cegi(**given)
