"""The speed benchmark: scores by rows equal those of maps, in linear memory; whole records."""

import copy
import io
import math

import matplotlib
import pandas as pd
import pytest
import torch
from rich.console import Console

from frugalvlm import measure
from frugalvlm.bench import command as bench
from frugalvlm.bench import score_costs, tax
from frugalvlm.pocket.models import build_model
from frugalvlm.runs import records

matplotlib.use("Agg")


@pytest.mark.parametrize("score", score_costs.SCORES)
def test_every_way_gives_the_scores_of_the_maps(score):
    runs = score_costs.arms(score, 5)
    assert list(runs) == list(score_costs.ARMS)
    assert runs.pop("none")() is None
    found = {name: run() for name, run in runs.items()}
    assert found["maps"].shape == (1, 25)
    for name in ("rows", "map"):
        torch.testing.assert_close(found[name], found["maps"], msg=f"{name} differs")
    uniform = torch.full_like(found["maps"], found["maps"].mean())
    assert not torch.allclose(found["rows"], uniform, rtol=1e-3), "any scores would pass"
    again = runs["rows"]()
    assert torch.equal(again, found["rows"])


@pytest.mark.parametrize("score", score_costs.SCORES)
def test_memory_of_rows_is_linear_and_that_of_maps_quadratic(score):
    rows = []
    for side in (12, 24):
        peaks = {
            name: measure.peak_memory_bytes(run).mib
            for name, run in score_costs.arms(score, side).items()
        }
        rows += [
            {"score": score, "way": name, "visual_tokens": side**2, "peak_mib": peak,
             "more_mib": peak - peaks["none"]}
            for name, peak in peaks.items()
        ]  # fmt: skip
    data = pd.DataFrame(rows)
    peak = score_costs.growth(data)
    more = score_costs.growth(data, "more_mib")
    assert peak[score, "rows"] < 1.05
    assert more[score, "rows"] < 1.1 or data[data["way"] == "rows"]["more_mib"].max() < 0.1
    assert 1.85 < more[score, "map"] < 2.1
    assert 1.85 < more[score, "maps"] < 2.1
    largest = data[data["visual_tokens"] == 576].set_index("way")["more_mib"]
    assert largest["maps"] > 3 * largest["map"] > 3 * largest["rows"]


def test_growth_is_the_power_between_the_two_largest_sizes():
    sizes = (10, 100, 200)
    data = pd.DataFrame(
        {"score": "cls", "way": way, "visual_tokens": n, "peak_mib": cost(n)}
        for way, cost in (("rows", lambda n: 3 * n), ("maps", lambda n: 1e-3 * n * n))
        for n in sizes
    )
    powers = score_costs.growth(data)
    assert powers["cls", "rows"] == pytest.approx(1)
    assert powers["cls", "maps"] == pytest.approx(2)
    assert math.isnan(score_costs.growth(data.assign(peak_mib=0.0))["cls", "rows"])


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """Both benchmarks on tiny models and in one or two rounds: their folder and what was shown."""
    torch.manual_seed(0)
    model = build_model("pocket-llava-tiny").eval()
    shown, folder = io.StringIO(), tmp_path_factory.mktemp("results")
    measured, scored = bench.run_tax, bench.run_score_costs
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRUGALVLM_RESULTS", str(folder))
        patch.setattr(bench, "load_vlm", lambda name, device: (copy.deepcopy(model), None))
        patch.setattr(tax, "clip_sized_model", lambda *size: copy.deepcopy(model))
        patch.setattr(bench, "run_tax", lambda device: measured(device, rounds=4))
        patch.setattr(bench, "run_score_costs", lambda device: scored(device, sides=(3, 4)))
        bench.print_bench(console=Console(file=shown, width=120))
    return folder / "benchmark", shown.getvalue()


@pytest.mark.parametrize("name", [tax.RECORD, score_costs.RECORD])
def test_records_are_whole(benched, name):
    folder, _ = benched
    assert {p.name for p in folder.iterdir()} == {tax.RECORD, score_costs.RECORD}
    record = records.read_record(folder / name)
    assert record["status"] == "complete"
    assert record["other_work_cores"] >= 0
    assert set(record["request"]) >= {"device", "dtype", "threads"}
    made = record["provenance"]
    assert {"cpu", "gpu", "torch", "threads"} <= set(made["hardware"])
    assert made["versions"]["transformers"]
    assert made["created"]
    assert made["code"]
    assert made["seconds"] > 0


def test_the_tax_record_holds_every_method_at_both_sizes(benched, monkeypatch):
    folder, shown = benched
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(folder.parent))
    table = tax.tax_table()
    for _, own in table.data.groupby("model"):
        assert list(own["method"]) == list(tax.MEASURED)
    assert table.data["model"].nunique() == len(table.blocks) == 2
    assert (table.data["within_aim"] == (table.data["ratio"] <= tax.AIM)).all()
    assert all(f"{key} " in shown for key in tax.MEASURED)
    assert "other programs used" in shown


def test_the_score_record_holds_every_way_at_every_size(benched, monkeypatch):
    folder, shown = benched
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(folder.parent))
    data = score_costs.score_table().data
    cells = data.groupby(["score", "visual_tokens"])["way"].agg(list)
    assert list(cells.index) == [(s, n) for s in score_costs.SCORES for n in (9, 16)]
    assert all(ways == list(score_costs.ARMS) for ways in cells)
    assert data.loc[data["way"] != "none", "difference"].max() < 1e-5
    assert all(label in shown for label in score_costs.ARMS.values())
    figure = score_costs.score_plot()
    assert all(len(ax.lines) == len(score_costs.ARMS) for ax in figure.axes)
