"""A paper's table through the front door: on any number of patches, the same records."""

from __future__ import annotations

import pytest

import frugalvlm
from frugalvlm.benchmarks import asking
from frugalvlm.door import RequestError, papers
from frugalvlm.papers import load_paper
from frugalvlm.reproduce.runners import run_pocket
from frugalvlm.runs import records
from frugalvlm.runs.layout import rows_of
from frugalvlm.runs.options import Options


@pytest.mark.parametrize(
    ("paper", "table", "patches", "kept"),
    [
        ("visionzip", "table1", 144, [48, 32, 16]),
        ("visionzip", "table1", 576, [192, 128, 64]),
        ("visionzip", "table1", 729, [243, 162, 81]),
        ("visionzip", "table1", 64, [21, 14, 7]),
        ("fastervlm", "main", 144, [108, 72, 36, 14, 7]),
        ("fastervlm", "main", 576, [432, 288, 144, 58, 29]),  # the paper's own, not 14/144 of 576
        ("aim", "image", 576, [252, 72]),
        ("sgl", "table1", 256, [102, 51, 13]),
        ("gsearch", "table3", 144, [84, 49, 39]),
        ("gsearch", "table3", 288, [168, 98, 78]),  # means over another depth: our share
    ],
)
def test_budgets_are_scaled_by_share(paper, table, patches, kept):
    layout = load_paper(paper).table(table)
    rows = rows_of(layout, Options(), patches)
    assert rows[0] == (layout.baseline, patches)
    asked = dict.fromkeys(budget for method, budget in rows if method == "random")
    assert list(asked) == kept


def test_no_budget_is_ever_nothing():
    layout = load_paper("fastervlm").table("main")
    rows = rows_of(layout, Options(), 4)
    assert min(budget for method, budget in rows if method == "fastervlm") == 1


@pytest.fixture
def asked(folder_of_64):
    return {
        "paper": "visionzip", "model": folder_of_64, "data": "pocket-gqa", "budgets": 2, "n": 6,
        "progress": False,
    }  # fmt: skip


def test_a_papers_table_on_64_patches(asked):
    result = frugalvlm.compare(**asked, costs=False)
    frame = result.frame
    assert [*dict.fromkeys(frame["budget"])] == [64, 0, 21, 14, 7]
    # The first two of the paper's budgets, and what stands above all.
    asked_for = (frame["budget"] > 7) | frame["once"]
    assert (frame.loc[~asked_for, "n"] == 0).all()
    frame = frame[asked_for]
    cells = frame[(frame["method"] == "visionzip") & (frame["benchmark"] == "pocket-gqa")]
    assert list(cells["n"]) == [6, 6]
    assert list(cells["tokens_mean"]) == [21, 14]
    printed = load_paper("visionzip").reported
    wanted = {"table": "Table 1", "method": "VisionZip", "benchmark": "GQA"}
    assert list(cells["paper_score"]) == [printed(**wanted, tokens=t) for t in (192, 128)]
    assert "paper" in result.table.to_html()
    assert "14 of 64 visual tokens" in result.table.to_html()
    assert "paper: 128 of 576" in result.table.to_html()
    assert {records.method_key(r) for r in result.records} == {
        row.method for row in load_paper("visionzip").table("table1").rows if not row.at
    }
    assert len(result.records) == 1 + 3 + 2 * 8
    assert "n = 6" in repr(result)
    assert "VisionZip, printed" in result.plot().get_legend_handles_labels()[1]
    with pytest.raises(RequestError, match="costs=True"):
        _ = result.costs


def test_reproducing_finds_the_records_of_the_front_door(asked, monkeypatch):
    result = frugalvlm.compare(**asked, repeats=2, energy_window_s=0.01)
    monkeypatch.setattr(asking, "answer", lambda *a: pytest.fail("asked again"))
    options = Options(
        n=6, model=asked["model"], benchmarks=("pocket-gqa",), budgets=2, repeats=2,
        energy_window_s=0.01,
    )  # fmt: skip
    again = run_pocket("visionzip", options)
    assert [r["provenance"] for r in again] == [r["provenance"] for r in result.records]
    assert {r["kind"] for r in again} == {"accuracy", "efficiency", "attention"}
    assert result.frame.columns.is_unique
    costs = result.costs
    shown = [row[0].short for block in costs.blocks for row in block.rows]
    assert shown[0] == "untouched"
    assert shown[-1] == "VisionZip"
    own = result.frame[result.frame["method"] == "visionzip"]
    assert list(own["flops_share"].notna()) == list(own["budget"] > 7)
    assert (own["flops_share"].dropna() < 100).all()


def test_rows_that_the_model_cannot_serve_are_said(no_cls, monkeypatch):
    monkeypatch.setattr(papers, "open_model", lambda *a: no_cls)
    monkeypatch.setattr(papers, "model_hash", lambda *a: "made-up")
    result = frugalvlm.compare(
        paper="visionzip", data="pocket-gqa", budgets=1, n=3, costs=False, progress=False
    )
    assert [(line.key, line.budget) for line in result.skipped] == [("fastervlm", 48)]
    assert "no [CLS]" in result.table.to_html()
    assert len(result.records) == 1 + 3 + 7


def test_the_table_of_another_model_says_what_it_needs(folder_of_64):
    result = frugalvlm.compare(
        paper="aim", table="video", model=folder_of_64, data="pocket-gqa", n=2, progress=False
    )
    assert not result.records
    assert not result.frame["n"].any()
    assert "is about pocket-siglip-base" in result.table.to_html()
    assert "not measured" in result.table.to_html()
