"""Points lost for what is saved, and the questions that pay for a training, on made-up records."""

import json

import pandas as pd
import pytest

from frugalvlm.carbon import Spent
from frugalvlm.report import comparison_carbon as compare_carbon
from frugalvlm.report.comparison import Comparison
from frugalvlm.verdicts.guard import Guard

KWH = 3.6e6
TOTAL, N = 144, 120
GOOD, BAD = 0.9, 0.4  # shares of right answers
COLUMNS = ("pocket-gqa", "pocket-pope")


def _answers(make, method, budget, right):
    hyper = {} if method == "vanilla" else {"kept_tokens": budget}
    return [make.accuracy(method, budget, name, right, hyper=hyper, n=N) for name in COLUMNS]


def _costs(make, flops, **energy):
    """An efficiency record; `flops` in percent of the untouched model's; time goes with them."""
    record = make.efficiency(**energy)
    row = record["rows"][0]
    record["rows"] = [
        {**row, "method": m, "budget": b, "flops": int(1e7 * share),
         "prefill_speedup": {"median": 100 / share, "low": 98 / share, "high": 102 / share, "n": 9}}
        for (m, b), share in {("vanilla", TOTAL): 100, **flops}.items()
    ]  # fmt: skip
    record["request"] |= {"threads": 1, "decode_steps": 8, "methods": [
        {"method": m, **({} if m == "vanilla" else {"kept_tokens": b}), "budget": b}
        for m, b in [("vanilla", TOTAL), *flops]
    ]}  # fmt: skip
    return record


def _compared(make, found):
    return Comparison(found, benchmarks=make.benchmarks, guard=Guard())


@pytest.fixture
def found(make):
    """VisionZip loses little for 70 % of the FLOPs, random much for as many; FastV saves none."""
    return _found(make)


def _found(make, **energy):
    runs = {("visionzip", 16): 30, ("random", 16): 30.1, ("fastv", 16): 100}
    return {
        "visionzip": [
            *_answers(make, "vanilla", TOTAL, 1.0), *_answers(make, "visionzip", 16, GOOD),
            *_answers(make, "random", 16, BAD), *_answers(make, "fastv", 16, 0.8),
            _costs(make, runs, **energy),
        ]
    }  # fmt: skip


def _rows(table):
    return {line["method"]: line for line in table.to_frame().to_dict("records")}


def _cells(table):
    return {row[0].short: [c.short for c in row] for b in table.blocks for row in b.rows}


def test_points_lost_for_a_tflop_and_a_second(make, found):
    table = compare_carbon.saving_table(_compared(make, found))
    zip_, random, fastv = (_rows(table)[k] for k in ("visionzip", "random", "fastv"))
    # 1000 prefills of 1e9 FLOPs, of which 70 % are saved: 0.7 TFLOPs. 50 ms a batch of 8.
    assert zip_["saved_TFLOPs"] == pytest.approx(0.7)
    assert zip_["lost"] == pytest.approx(100 - 100 * GOOD, abs=1)
    assert zip_["lost_per_TFLOPs"] == pytest.approx(zip_["lost"] / 0.7)
    seconds = 1000 * 0.05 / 8
    assert zip_["saved_s"] == pytest.approx(seconds * (1 - 0.3), rel=1e-6)
    assert zip_["saved_s_low"] == pytest.approx(seconds * (1 - 30 / 98), rel=1e-6)
    assert zip_["lost_per_s_low"] == pytest.approx(
        zip_["lost_low"] / zip_["saved_s_high"], rel=1e-6
    )
    assert random["lost_per_TFLOPs"] > 4 * zip_["lost_per_TFLOPs"]
    assert pd.isna(fastv["lost_per_TFLOPs"])
    assert _cells(table)["FastV"][4] == "saves nothing"


def test_modelled_grams_are_not_compared(make, found):
    table = compare_carbon.saving_table(_compared(make, found))
    assert all(cells[-2:] == ["not compared"] * 2 for cells in _cells(table).values())
    assert pd.isna(_rows(table)["visionzip"]["saved_g"])


def test_measured_grams_are(make):
    measured = {
        "modelled": False, "reliable": True, "methods": {"gpu": "counter"}, "sd": 0.0,
        "window_s": [10.0] * 5,
    }  # fmt: skip
    found = _found(make, **measured)
    rows = found["visionzip"][-1]["rows"]
    for row, joules in zip(rows, (0.5, 0.2, 0.2, 0.5), strict=True):
        row["energy"] = {**row["energy"], "joules_per_question": joules}
    line = _rows(compare_carbon.saving_table(_compared(make, found), grid=360.0))["visionzip"]
    assert line["saved_g"] == pytest.approx(1000 * 0.3 / KWH * 360)
    assert line["lost_per_g"] == pytest.approx(line["lost"] / line["saved_g"])
    rows[1]["energy"]["methods"] = {"cpu": "rapl"}  # read in another way than the untouched model
    line = _rows(compare_carbon.saving_table(_compared(make, found)))["visionzip"]
    assert pd.isna(line["saved_g"])


def test_a_training_is_paid_for_by_what_it_saves(make, found):
    compared = _compared(make, found)
    trained = {"visionzip": Spent(seconds=700.0, flops=7e12)}
    table = compare_carbon.payback_table(compared, 100.0, trained)
    line = _rows(table)["visionzip"]
    each = 0.05 / 8
    assert line["questions"] == pytest.approx(700 / (0.7 * each))
    assert line["questions_low"] == pytest.approx(700 / (each * (1 - 30 / 102)))
    assert line["questions_by_flops"] == pytest.approx(1e4)
    assert line["rival"] == "random"
    assert line["recorded"]
    assert table.blocks[0].heading == "training recorded"
    assert "10,000" in _cells(table)["VisionZip"][5]


def test_against_a_free_method_that_saves_as_much_it_never_pays(make, found):
    found["visionzip"][-1]["rows"][2]["prefill_speedup"] |= {"median": 4.0, "low": 3.9, "high": 4.1}
    table = compare_carbon.payback_table(
        _compared(make, found), 100.0, {"visionzip": Spent(seconds=700.0)}
    )
    assert _cells(table)["VisionZip"][6] == "never\n(random)"
    assert pd.isna(_rows(table)["visionzip"]["against"])


def test_without_a_recorded_training_the_front_is_asked_what_if(make, found):
    table = compare_carbon.payback_table(_compared(make, found), 100.0, {})
    rows = _rows(table)
    assert set(rows) == {"visionzip"}  # random is dominated, FastV saves nothing
    assert rows["visionzip"]["questions"] == pytest.approx(100 / (0.7 * 0.05 / 8))
    assert "No method here has a recorded training" in table.caption[-1]


def test_trainings_are_found_beside_the_installed_weights(tmp_path):
    sessions = [{"seconds": 9.0, "joules": {"cpu": 4.0}, "methods": {"cpu": "rapl"}}]
    for key, model in (("dyvte", "pocket-llava-base"), ("dyvte", "pocket-siglip-base")):
        place = tmp_path / key / model
        place.mkdir(parents=True)
        log = {"seconds": 9.0, "sessions": sessions, "curve": []}
        (place / "training_log.json").write_text(json.dumps(log))
    costs = compare_carbon.learnt_costs("pocket-llava-base", tmp_path)
    assert costs == {"dyvte": Spent(4.0, 9.0, methods=(("cpu", "rapl"),))}
    assert compare_carbon.learnt_costs("pocket-llava-hd", tmp_path) == {}
