"""Visual gain against slow arithmetic, and retention by what is asked against a hand-made split."""

import math

import numpy as np
import pytest

from frugalvlm.benchmarks import stats
from frugalvlm.benchmarks.base import mean_sheet
from frugalvlm.report.tables import accuracy_table
from frugalvlm.verdicts.categories import part_of, scored_parts
from frugalvlm.verdicts.gains import visual_gain
from frugalvlm.verdicts.guard import Guard
from frugalvlm.verdicts.scored import Scored

NAMES = ("pocket-gqa", "pocket-pope")
RIGHT = {("vanilla", 144): (0.9, 0.8), ("blank", 144): (0.3, 0.5), ("fastv", 16): (0.6, 0.65)}


@pytest.fixture
def records(make):
    return [make.accuracy(key, budget, name, share)
            for (key, budget), shares in RIGHT.items()
            for name, share in zip(NAMES, shares, strict=True)]  # fmt: skip


def scored(records, make):
    return Scored(records, benchmarks=make.benchmarks, guard=Guard())


def test_the_gain_is_the_way_from_blank_to_untouched(records, make):
    own = scored(records, make)
    gains = []
    for name in NAMES:
        whole, blank, kept = (own.sheet(k, b, name).headline for k, b in RIGHT)
        gains.append(100 * (kept - blank) / (whole - blank))
        found = visual_gain(own, "fastv", 16, [name])
        assert found.value == pytest.approx(gains[-1])
    mean = visual_gain(own, "fastv", 16, NAMES)
    assert mean.value == pytest.approx(sum(gains) / 2)
    assert mean.low < mean.value < mean.high
    assert (mean.n_questions, mean.n_images) == (80, 40)
    assert visual_gain(own, "vanilla", 144, NAMES).value == pytest.approx(100)
    zero = visual_gain(own, "blank", 144, NAMES)
    assert (zero.low, zero.value, zero.high) == (0, 0, 0), "paired: the same pictures"


def test_the_interval_draws_the_three_runs_together(records, make):
    own, draws = scored(records, make), []
    for name in NAMES:
        whole, blank, kept = (stats.draws(own.sheet(k, b, name), name) for k, b in RIGHT)
        draws.append([100 * (k - b) / (w - b) for w, b, k in zip(whole, blank, kept, strict=True)])
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    found = visual_gain(own, "fastv", 16, NAMES)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_without_a_blank_run_there_is_no_gain(records, make):
    seen = [r for r in records if r["request"]["method"]["method"] != "blank"]
    assert visual_gain(scored(seen, make), "fastv", 16, NAMES) is None
    assert visual_gain(scored(records[:-1], make), "fastv", 16, NAMES) is None, "over some only"
    assert visual_gain(scored([], make), "fastv", 16, NAMES) is None


def test_pictures_that_are_worth_nothing_give_no_share(make):
    same = [make.accuracy(key, budget, "pocket-gqa", 0.6) for key, budget in RIGHT]
    found = visual_gain(scored(same, make), "fastv", 16, ["pocket-gqa"])
    assert math.isnan(found.value)
    assert "pocket-gqa" in found.reason


def test_the_table_shows_gain_beside_retention_and_exports_it(records, make):
    table = accuracy_table("visionzip", "table1", records, benchmarks=make.benchmarks)
    line = table.data[(table.data["method"] == "fastv") & (table.data["budget"] == 16)
                      & (table.data["benchmark"] == "pocket-gqa")].iloc[0]  # fmt: skip
    expected = visual_gain(scored(records, make), "fastv", 16, ["pocket-gqa"])
    assert (line["gain"], line["gain_low"]) == (expected.value, expected.low)
    for text in (table.to_html(), table.to_latex(), table.to_markdown()):
        assert "visual" in text
        assert "gain" in text


def test_the_papers_gain_is_that_of_its_printed_numbers():
    table = accuracy_table("fastervlm", "main", [])
    rows = table.data[table.data["benchmark"] == "pocket-gqa"].set_index(["method", "paper_tokens"])
    whole, kept, floor = (rows.loc[at, "paper_score"] for at in
                          (("vanilla", 576), ("fastervlm", 29), ("no_image", 0)))  # fmt: skip
    assert rows.loc[("fastervlm", 29), "paper_gain"] == pytest.approx(
        100 * (kept - floor) / (whole - floor)
    )
    assert rows.loc[("no_image", 0), "paper_gain"] == 0
    assert rows.loc[("vanilla", 576), "paper_gain"] == 100
    means = table.data[table.data["benchmark"] == "mean"].set_index(["method", "paper_tokens"])
    assert 50 < means.loc[("fastervlm", 29), "paper_gain"] < 75, "as the paper's six columns give"
    assert math.isnan(means.loc[("random", 29), "paper_gain"])


# -- by what is asked ------------------------------------------------------------------------------


class Split:
    """Two questions a picture, one about what stands out; right where the answer is "yes"."""

    def __init__(self, categories=("salient/main", "fine/far")):
        self.categories = categories

    def dataset(self, split, n):
        return [{"question_id": f"{split}-{i}", "image_id": f"{i // 2}", "answer": "yes",
                 "category": self.categories[i % 2]} for i in range(n)]  # fmt: skip

    def sheet(self, rows, answers):
        pairs = zip(rows, answers, strict=True)
        return mean_sheet(rows, [float(a == r["answer"]) for r, a in pairs])


def split_records(make, maker):
    """Untouched: all right. FastV: salient ones right, of the fine ones every second."""
    rows = maker.dataset("test", 40)
    salient = [part_of(row) == "salient" for row in rows]
    fine = [i % 4 == 1 for i in range(40)]
    right = {("vanilla", 144): [True] * 40, ("blank", 144): [i % 8 == 0 for i in range(40)],
             ("fastv", 16): [a or b for a, b in zip(salient, fine, strict=True)]}  # fmt: skip
    return [make.accuracy(k, b, "pocket-gqa", mask, rows=rows) for (k, b), mask in right.items()]


def test_parts_are_scored_by_their_own_questions(make):
    maker = Split()
    parts = scored_parts(split_records(make, maker), benchmarks={"pocket-gqa": maker})
    assert list(parts) == ["salient", "fine"]
    kept = {p: own.retention("fastv", 16, names) for p, (own, names) in parts.items()}
    assert (kept["salient"].value, kept["fine"].value) == (100, 50)
    assert kept["fine"].n_questions == 20
    gain = {p: visual_gain(own, "fastv", 16, names).value for p, (own, names) in parts.items()}
    assert gain == {"salient": 100, "fine": 50}


def test_a_small_table_by_what_is_asked_stands_below(make):
    maker = Split()
    (below,) = accuracy_table(
        "visionzip", "table1", split_records(make, maker), benchmarks={"pocket-gqa": maker}
    ).more
    line = next(r for b in below.blocks for r in b.rows if r[0].short == "FastV"
                and r[1].short != "not measured")  # fmt: skip
    assert [c.short.split()[0] for c in line[1:3]] == ["100.0", "100.0"]
    assert all(c.short.startswith("50.0 ±") for c in line[3:])
    assert "what stands out" in below.headers[1]
    assert "n=20" in below.headers[1]


def test_questions_that_do_not_say_it_have_no_such_table(make, records):
    assert accuracy_table("visionzip", "table1", records, benchmarks=make.benchmarks).more == ()
    assert scored_parts(records, benchmarks=make.benchmarks) == {}
    assert [part_of({"category": c}) for c in ("salient/x", "fine", "finely/x", "all")] == [
        "salient", "fine", None, None,
    ]  # fmt: skip
