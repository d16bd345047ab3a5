"""The study of cegi: two sizes measured on tiny models, and its tables on planted records."""

from __future__ import annotations

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from frugalvlm import carbon, measure
from frugalvlm.benchmarks import load_benchmark
from frugalvlm.benchmarks.asking import Batches, answer, answer_all, prepare
from frugalvlm.door.papers import Bench
from frugalvlm.loading import load_vlm
from frugalvlm.pocket.installed import save_vlm
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.runs.options import Options
from frugalvlm.runs.setting import Silent
from frugalvlm.studies import study_of
from frugalvlm.studies.cegi import analysis
from frugalvlm.studies.cegi import report as cegi_report


def _small_and_large(folder):
    paths = []
    for seed, name in enumerate(("pocket-llava-tiny", "pocket-llava-small")):
        torch.manual_seed(seed)
        save_vlm(build_model(name), build_processor(), folder / name)
        paths.append(str(folder / name))
    return paths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Options, bench and record of tiny models that are not trained."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("cegi")
    patch.setenv("FRUGALVLM_RESULTS", str(folder / "results"))
    patch.setattr(analysis, "TASKS", ("pocket-gqa",))
    small, large = _small_and_large(folder)
    options = Options(n=6, model=large, guide=small, repeats=2, energy_window_s=0.05)
    bench = Bench.of("cegi", options)
    [record] = bench.analysis(Silent())
    yield options, bench, record
    patch.undo()


def test_the_record_holds_scores_and_costs_of_whole_answers(made):
    options, _, record = made
    own = record["tasks"]["pocket-gqa"]
    task = load_benchmark("pocket-gqa")
    for size, name in (("small", options.guide), ("large", options.model)):
        model, processor = load_vlm(name)
        batches = Batches(task, processor, "test", 6, "cpu")
        sheet = task.sheet(batches.rows, answer_all(model, batches, task.max_new_tokens))
        assert own["scores"][size]["value"] == pytest.approx(sheet.headline)
        data = task.dataset("dev", 8)
        rows = [data[i] for i in range(8)]
        inputs = prepare(
            processor, [r["image"] for r in rows], [r["question"] for r in rows], "cpu"
        )
        prefill = measure.count_flops(lambda m=model, i=inputs: m(**i, logits_to_keep=1)).total
        whole = measure.count_flops(
            lambda m=model, p=processor, i=inputs: answer(m, p, i, task.max_new_tokens)
        ).total
        assert own["costs"][size]["flops"] == whole / 8 > prefill / 8
        assert len(own["costs"][size]["seconds"]) == 2
        assert record["parameters"][size] == sum(p.numel() for p in model.parameters())
    assert own["costs"]["large"]["flops"] > own["costs"]["small"]["flops"]
    energy = own["costs"]["small"]["energy"]
    assert not (energy["modelled"] and energy["rankable"])
    assert energy["joules"]


def test_a_record_that_is_there_is_used_again(made):
    _, bench, record = made
    [again] = bench.analysis(Silent())
    assert json.loads(json.dumps(record["tasks"])) == again["tasks"]
    assert len(list(bench.setting.folder.glob("*.json"))) == 1


def test_where_no_time_may_be_measured_there_is_no_record(made):
    _, bench, _ = made
    apart = replace(bench, setting=replace(bench.setting, timed=False))
    assert apart.analysis(Silent()) == []


def test_one_picture_has_no_interval_and_a_record_all_the_same(made):
    _, bench, _ = made
    alone = replace(bench, setting=replace(bench.setting, n=1))
    [record] = alone.analysis(Silent())
    assert record["tasks"]["pocket-gqa"]["points"]["low"] is None
    assert "fewer than 10 pictures" in record["tasks"]["pocket-gqa"]["points"]["reason"]
    assert "pocket-gqa" in cegi_report.sizes_table(record).to_html()


def test_the_tables_show_the_record(made):
    _, _, record = made
    for table in (cegi_report.sizes_table(record), cegi_report.break_even_table(record)):
        assert "pocket-gqa" in table.to_html() or "No training log" in table.to_html()


# -- planted records -------------------------------------------------------------------------------


def _estimate(value, half):
    return {"value": value, "low": value - half, "high": value + half, "n_questions": 200,
            "n_images": 100, "reason": ""}  # fmt: skip


def _planted(rankable=False):
    """The large model scores 8 points more, for four times the FLOPs and twice the seconds."""
    energy = {"methods": {}, "reasons": [], "rankable": rankable, "modelled": not rankable}
    costs = {
        "small": {"flops": 1e9, "seconds": [0.01] * 3, "energy": {**energy, "joules": [1.0]}},
        "large": {"flops": 4e9, "seconds": [0.02] * 3, "energy": {**energy, "joules": [3.0]}},
    }
    task = {"metric": "exact match", "max": 100.0, "costs": costs, "points": _estimate(8.0, 4.0),
            "scores": {"small": _estimate(77.0, 3.0), "large": _estimate(85.0, 3.0)}}  # fmt: skip
    return {
        "kind": "analysis", "tasks": {"pocket-gqa": task},
        "parameters": {"small": 1_200_000, "large": 5_000_000},
        "request": {"scale": "pocket", "model": "pocket-llava-base", "small": "pocket-llava-small",
                    "n": 200, "batch_size": 8, "split": "test", "dtype": "float32"},
        "provenance": {"machine": "0123456789ab"},
    }  # fmt: skip


def test_what_a_further_point_costs_by_hand():
    table = cegi_report.sizes_table(_planted(rankable=True))
    line = table.to_frame().set_index("size").loc["per point"]
    assert line["TFLOPs"] == pytest.approx(1000 * 3e9 / 1e12 / 8)
    assert line["s"] == pytest.approx(1000 * 0.01 / 8)
    assert line["g"] == pytest.approx(1000 * 2 / 3.6e6 * 475 / 8)
    cells = [c.short for c in table.blocks[0].rows[2]]
    assert cells[3] == "0.375 [0.25, 0.75]"  # 3 TFLOPs over 8 [4, 12] points
    assert cells[4] == "1.25 [0.833, 2.5]"


def test_modelled_grams_are_not_shown():
    table = cegi_report.sizes_table(_planted())
    assert all(row[-1].short == "not measured" for row in table.blocks[0].rows)
    assert "modelled, and not shown" in table.caption[-1]


def test_the_small_models_training_is_paid_by_the_seconds_it_saves(tmp_path):
    (tmp_path / "training_log.json").write_text(
        json.dumps({"seconds": 50.0, "sessions": [{"seconds": 50.0, "joules": {}, "methods": {}}]})
    )
    record = _planted()
    record["request"]["small"] = str(tmp_path)
    [line] = cegi_report.break_even_table(record).to_frame().to_dict("records")
    assert line["questions"] == pytest.approx(50 / 0.01)
    assert line["training_s"] == 50.0
    record["request"]["small"] = "no-such-model"
    assert "No training log" in str(cegi_report.break_even_table(record).caption)


# -- the page's made-up runs -----------------------------------------------------------------------


def test_the_made_up_adapters_are_reversed_by_the_index():
    results = cegi_report.made_up(build_model("pocket-llava-tiny"))
    assert carbon.agreement(results) == -1
    millions = [r.parameters_m for r in results.values()]
    assert millions == pytest.approx([millions[0] * r / 4 for r in cegi_report.RANKS])
    table = cegi_report.paradox_table(results)
    assert [row[-1].short for row in table.blocks[0].rows] == ["4", "3", "2", "1"]
    assert [row[5].short for row in table.blocks[0].rows] == ["1", "2", "3", "4"]
    assert all("Made-up" in t.caption[0] for t in (table, cegi_report.grid_table(results)))
    plt.close(cegi_report.paradox_plot(results))


def test_the_claim_across_grids_holds():
    """The grid table's caption says that any order can be had across columns."""
    frame = cegi_report.grid_table(cegi_report.made_up(build_model("pocket-llava-tiny"))).to_frame()
    dearest_clean = frame[(frame["grid"] == "clean")]["index"].max()
    assert dearest_clean < frame[(frame["grid"] == "coal")]["index"].min()


def test_options_change_what_they_say():
    table = cegi_report.options_table(60.0, 72.0, 3.6e6, 2_000_000)
    frame = table.to_frame().set_index("run")
    usual = frame.loc["as this kit reads it"]
    assert usual["index"] == pytest.approx(475 / 20 / 2)
    assert frame.loc["gain in points, not in percent of the base", "index"] == pytest.approx(
        usual["index"] * 20 / 12
    )
    assert frame["index"].iloc[3] == pytest.approx(1.1 * usual["index"])
    assert frame["index"].iloc[4] == pytest.approx(1.5 * usual["index"])
    assert frame["index"].iloc[5] == pytest.approx(usual["index"] * 25 / 475)


def test_the_noise_figure_is_of_the_planted_run():
    """Its gain and its spread are those that its captions and its dashed curve say."""
    rng = np.random.default_rng(0)
    base = rng.random(200_000) < 0.6
    after = np.where(base, rng.random(200_000) >= 0.03, rng.random(200_000) < 0.25)
    change = after.astype(float) - base
    figure = cegi_report.noise_plot(items=(50, 400))
    left, right = figure.axes
    [curve] = [line for line in right.lines if line.get_linestyle() == "--"]
    want = 100 * change.std() / change.mean() / np.sqrt([50, 400])
    assert curve.get_ydata() == pytest.approx(want, rel=0.05)
    [true] = [line for line in left.lines if line.get_label() == "true value"]
    gain = 100 * change.mean() / base.mean()
    assert true.get_ydata()[0] == pytest.approx(4e5 / 3.6e6 * 475 / gain, rel=0.03)
    plt.close(figure)


def test_the_study_is_found():
    assert study_of("cegi").analysis is analysis.run
