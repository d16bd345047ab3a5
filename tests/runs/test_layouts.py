"""From layouts to runs: rows that stand once, at some budgets, or with parameters of their own."""

from dataclasses import replace

import pytest
import yaml

from frugalvlm.methods import CONTROLS, method_class
from frugalvlm.methods.base import LayerReducer
from frugalvlm.papers import PaperFormatError, all_papers, load_paper
from frugalvlm.papers.classes import Budget, Row
from frugalvlm.paths import data_dir
from frugalvlm.runs.layout import planned, rows_of
from frugalvlm.runs.options import Options
from frugalvlm.views import Shape

SHAPE = Shape(144, (12, 12), 12, True)
ACCURACY = [(paper.key, table.id) for paper in all_papers() for table in paper.tables
            if "pocket" in table.scales and table.id != "sources"]  # fmt: skip
# Who cuts inside the decoder, and the random choice at the same cut.
TWINS = {"fastv": "random_fastv", "gsearch": "random_gsearch", "sgl": "random_sgl",
         "aim": "random_aim", "pyramiddrop": "random_pyramiddrop"}  # fmt: skip


def run_of(key, table_id, method, tokens):
    table = load_paper(key).table(table_id)
    row = next(r for r in table.rows if r.method == method)
    budget = next(
        (b for b in table.budgets if row.once is None and b.pocket_tokens == tokens), None
    )
    return planned(table, row, budget, tokens, SHAPE)


def test_rows_that_stand_once_are_run_once_and_first():
    rows = rows_of(load_paper("visionzip").table("table1"), Options(), 144)
    assert rows[:4] == [("vanilla", 144), ("blank", 144), ("no_image", 0), ("no_image_after", 0)]
    assert [b for m, b in rows if m == "fastv"] == [48, 32, 16]
    assert [b for m, b in rows if m == "random_fastv"] == [16]
    assert len(set(rows)) == len(rows), "a run is told by its method and budget"
    first = rows_of(load_paper("visionzip").table("table1"), Options(budgets=1), 144)
    assert {b for _, b in first} == {144, 0, 48}
    assert "visionzip_dominant" not in dict(first)


def test_a_row_may_have_parameters_of_its_own():
    assert run_of("aim", "image", "vtw", 63).layers(12) == (3,), "8 of 32"
    assert run_of("aim", "image", "vtw", 18).layers(12) == (1,), "3 of 32"
    assert [run_of("sgl", "table1", "tome", t).kept_tokens for t in (58, 29, 7)] == [86, 48, 19]
    pruned = run_of("aim", "image", "pyramiddrop", 63)
    assert sum(pruned.counts(144, 12)) / 12 < 0.3 * 144, "as cheap as AIM, see the note"
    assert [run_of("sgl", "table1", "vtw", t).layers(12)[0] for t in (58, 29, 7)] == [4, 2, 1]
    cuts = [run_of("sgl", "table1", "random_sgl", t).layers(12)[0] for t in (58, 29, 7)]
    assert cuts == [4, 2, 1], "none and random at the same cuts"


@pytest.mark.parametrize(("key", "table_id"), ACCURACY)
def test_every_accuracy_table_has_its_null_rows(key, table_id):
    table = load_paper(key).table(table_id)
    rows = {row.method: row for row in table.rows}
    assert rows["no_image"].once == "none"
    if table.pocket_model == "pocket-siglip-base":  # clips: what works before the projector cannot
        assert "vtw" in rows
        return
    assert rows["blank"].once == "all", "the visual gain refers to it"
    assert {"random", "uniform", "downsample"} <= rows.keys()
    if table.pocket_model is None:
        inside = {
            m for m in rows if m not in CONTROLS and issubclass(method_class(m), LayerReducer)
        }
        assert {TWINS[m] for m in inside & TWINS.keys()} - rows.keys() <= {"random_pyramiddrop"}
        assert {"no_image_after", "vtw"} & rows.keys()


def test_printed_numbers_stand_beside_the_new_rows():
    def printed(key, table_id, method, place, column):
        paper = load_paper(key)
        table = paper.table(table_id)
        row = next(r for r in table.rows if r.method == method)
        names = [c for c in table.columns if c.id == column]
        return paper.printed(table, row, names[0], table.budgets[place])

    assert printed("visionzip", "table1", "sparsevlm", 2, "pocket-gqa") == 52.7
    assert printed("aim", "image", "vtw", 0, "pocket-gqa") == 42.5
    assert printed("aim", "image", "pyramiddrop", 1, "pocket-gqa") is None, "one budget only"
    assert printed("sgl", "table1", "tome", 2, "pocket-gqa") == 57.52
    table = load_paper("fastervlm").table("main")
    none = next(r for r in table.rows if r.method == "no_image")
    assert load_paper("fastervlm").printed(table, none, table.columns[1]) == 37.38


def test_where_a_row_stands():
    large, small = Budget(192), Budget(64)
    assert [Row("a", "A").stands_at(b) for b in (None, large, small)] == [False, True, True]
    assert [Row("a", "A", at=(64,)).stands_at(b) for b in (None, large, small)] == [
        False, False, True,
    ]  # fmt: skip
    once = Row("a", "A", once="none")
    assert [once.stands_at(b) for b in (None, large, small)] == [True, False, False]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"once": "never"}, "none of all, none"),
        ({"once": "all", "at": [64]}, "once goes with none of"),
        ({"at": [65]}, "65"),
        ({"values": {"k": [1]}}, "needs 3 entries"),
        ({"settings": ["x"]}, "needs 3 entries"),
    ],
)
def test_rows_that_cannot_be_are_refused(change, says, tmp_path):
    source = data_dir() / "papers"
    raw = yaml.safe_load((source / "visionzip.yaml").read_text())
    row = next(r for r in raw["tables"][0]["rows"] if r["method"] == "fastv")
    row.update(change)
    (tmp_path / "visionzip.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "visionzip.csv").write_bytes((source / "visionzip.csv").read_bytes())
    with pytest.raises(PaperFormatError, match=says):
        load_paper("visionzip", tmp_path)


def test_once_asks_for_all_tokens_whatever_the_table_means_by_a_budget():
    table = load_paper("gsearch").table("table3")
    assert table.mean_budgets
    row = next(r for r in table.rows if r.method == "no_image")
    assert planned(table, row, None, 0, SHAPE).describe() == {"method": "no_image"}
    assert planned(replace(table, mean_budgets=False), row, None, 0, SHAPE).key == "no_image"
