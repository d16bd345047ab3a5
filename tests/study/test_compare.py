"""The comparison: what belongs together, which differences are told apart, what a gap needs."""

import itertools

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

from frugalvlm.benchmarks import load_benchmark
from frugalvlm.benchmarks.base import without_pictures
from frugalvlm.papers import load_paper
from frugalvlm.report import comparison as compare
from frugalvlm.report import comparison_plots as compare_plots
from frugalvlm.report import comparison_tables as compare_tables
from frugalvlm.report.comparison import CLOSE, DOMINATED, FRONT, Comparison, NothingRecordedError
from frugalvlm.runs import records
from frugalvlm.verdicts import ranking
from frugalvlm.verdicts.guard import Guard

COLUMNS = ("pocket-gqa", "pocket-pope", "pocket-mme", "pocket-textvqa", "pocket-sqa",
           "pocket-vqav2")  # fmt: skip
TOTAL = 144
GOOD, BAD = 0.9, 0.4  # shares of right answers
N = 120
# About as many as GOOD, but other ones.
ALIKE = [bool(x < 0.85) for x in np.random.default_rng(1).random(N)]


def _answers(make, method, budget, right, names=COLUMNS, **more):
    hyper = {} if method == "vanilla" else {"kept_tokens": budget}
    return [make.accuracy(method, budget, name, right, hyper=hyper, n=N, **more) for name in names]


def _costs(make, flops, threads=1, **energy):
    """An efficiency record; `flops` in percent of the untouched model's, by method and budget."""
    record = make.efficiency(**energy)
    row = record["rows"][0]
    record["rows"] = [
        {**row, "method": m, "budget": b, "flops": int(1e7 * share), "kv_visual_bytes": 1e3 * share,
         "prefill_speedup": {"median": 100 / share, "low": 98 / share, "high": 102 / share, "n": 9}}
        for (m, b), share in {("vanilla", TOTAL): 100, **flops}.items()
    ]  # fmt: skip
    record["request"] |= {"threads": threads, "decode_steps": 8, "methods": [
        {"method": m, **({} if m == "vanilla" else {"kept_tokens": b}), "budget": b}
        for m, b in [("vanilla", TOTAL), *flops]
    ]}  # fmt: skip
    return record


@pytest.fixture
def found(make):
    """Two papers: VisionZip is good, FastV about as good, random is bad; SGL has a study's run."""
    vanilla = _answers(make, "vanilla", TOTAL, 1.0)
    return {
        "visionzip": [
            *vanilla, *_answers(make, "visionzip", 16, GOOD), *_answers(make, "fastv", 16, ALIKE),
            *_answers(make, "random", 16, BAD),
            _costs(make, {("visionzip", 16): 30, ("fastv", 16): 40, ("random", 16): 30.1}),
        ],
        "sgl": [*vanilla, *_answers(make, "random", 16, BAD),
                *_answers(make, "sgl_first_10", 16, 0.5, COLUMNS[:3])],
    }  # fmt: skip


def _compared(make, found, **more):
    return Comparison(found, benchmarks=make.benchmarks, guard=Guard(), **more)


@pytest.fixture
def compared(make, found):
    return _compared(make, found)


# -- what belongs together -------------------------------------------------------------------------


def test_a_run_of_two_papers_is_one_run(compared):
    runs = {run.key: run for run in compared.runs}
    assert len(runs) == len(compared.runs) == 4
    assert runs["random"].papers == ("visionzip", "sgl")
    assert compared.total == TOTAL
    assert compared.benchmarks == list(COLUMNS)
    assert {r.key: r.family for r in compared.runs} == {
        "random": "no choice", "visionzip": "before the decoder", "fastv": "inside the decoder",
        "sgl_first_10": "other",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [({"model_hash": "older"}, "model_hash older"), ({"machine": "ffff"}, "machine ffff"),
     ({"n": 8}, "n 8"), ({"dtype": "bfloat16"}, "dtype bfloat16"), ({"scale": "full"}, "full")],
)  # fmt: skip
def test_records_of_another_setting_are_left_out_and_named(change, says, make, found):
    changed = make.accuracy(
        "divprune",
        16,
        hyper={"kept_tokens": 16},
        n=change.get("n", N),
        **{k: v for k, v in change.items() if k in ("dtype", "scale")},
    )
    changed["provenance"] |= {k: v for k, v in change.items() if k in ("model_hash", "machine")}
    compared = _compared(make, {**found, "aim": [changed]})
    assert "divprune" not in {run.key for run in compared.runs}
    (line,) = compared.left_out_lines()
    assert line.startswith("1 accuracy records")
    assert says in line
    assert any(says in text for text in compare_tables.missing_table(compared).caption)


def test_another_setting_can_be_asked_for(make, found):
    trial = make.accuracy("vanilla", TOTAL, n=8), make.accuracy("random", 7, right=0.5, n=8)
    compared = _compared(make, {**found, "aim": trial}, n=8)
    assert [run.key for run in compared.runs] == ["random"]
    assert compared.setting["n"] == 8
    with pytest.raises(NothingRecordedError, match=r"n 9.*invoke reproduce"):
        _compared(make, found, n=9)
    with pytest.raises(NothingRecordedError, match=r"yet: run .*--all"):
        _compared(make, {})


def test_the_installed_weights_come_first(make, found, monkeypatch):
    few = [*_answers(make, "vanilla", TOTAL, 1.0), *_answers(make, "random", 16, BAD)]
    for record in few:
        record["provenance"]["model_hash"] = "new"
    monkeypatch.setattr(compare, "model_hash", lambda name: "new")
    compared = _compared(make, {**found, "aim": few})
    assert compared.setting["model_hash"] == "new"
    assert [run.key for run in compared.runs] == ["random"]


def test_times_of_other_threads_are_not_mixed_in(make, found):
    for paper, threads in (("aim", 1), ("gsearch", 2)):
        found[paper] = [_costs(make, {("random", 7): 20}, threads=threads)]
    compared = _compared(make, found)
    assert compared.other_clocks == ["gsearch"]
    assert compared.clock["threads"] == 1
    assert any("gsearch" in line for line in compared.left_out_lines())


def test_gaps_name_the_command_that_fills_them(compared):
    gaps = compared.missing().set_index("paper")
    cells = 6 * (3 + 8 * 3 + 3)  # benchmarks; rows that stand once, at every budget, at one
    assert gaps.loc["visionzip", ["cells", "missing", "cost"]].tolist() == [
        cells, cells - 18, "recorded"]  # fmt: skip
    assert gaps.loc["sgl", "cost"] == "missing"
    assert gaps.loc["aim", "command"] == f"invoke reproduce --paper aim -n {N}"
    assert set(gaps.index) == {"visionzip", "sgl", "aim", "fastervlm", "gsearch", "dyvte"}


def test_a_part_of_the_suite_has_no_mean_and_no_rank(compared):
    (run,) = compared.partial
    assert run.key == "sgl_first_10"
    line = compared.frame().set_index("method").loc["sgl_first_10"]
    assert np.isnan(line["mean"])
    assert line["pocket-gqa"] == pytest.approx(50, abs=2)
    assert "sgl_first_10" not in set(compare_tables.ranking_table(compared).data["method"])
    assert "not on the" in compare_tables.accuracy_table(compared).to_html()


# -- what is told apart ----------------------------------------------------------------------------


def test_draws_are_those_of_the_tables(compared):
    for run in compared.whole:
        estimate, draws = run.retention(COLUMNS), run.draws(COLUMNS)
        assert len(draws) == ranking.RESAMPLES
        low, high = np.quantile(draws[: ranking.SHOWN], [0.025, 0.975])
        assert (low, high) == pytest.approx((estimate.low, estimate.high))


def test_the_ranking_says_where_it_is_none(compared):
    table = compare_tables.ranking_table(compared)
    (block,) = table.blocks
    assert "VisionZip, 16 tokens" in block.heading
    assert "1 of 1 pairs cannot be told apart" in block.heading
    data = table.data.set_index("method")
    assert data["rank"].to_dict() == {"visionzip": 1, "fastv": 2}, "a control has no rank"
    assert data["letters"].to_dict() == {"visionzip": "a", "fastv": "a"}
    assert data.loc["fastv", "behind"] == pytest.approx(
        data.loc["visionzip", "mean"] - data.loc["fastv", "mean"]
    )
    text = table.to_markdown()
    for said in ("pocket", f"n = {N}", "95 %", "Holm"):
        assert said in text


def test_controls_stand_apart_from_methods(compared):
    table = compare_tables.accuracy_table(compared)
    names = {block.heading: [row[0].short for row in block.rows] for block in table.blocks}
    assert names["controls"] == ["random"]
    (methods,) = [rows for heading, rows in names.items() if heading.startswith("16 of")]
    assert set(methods) == {"VisionZip", "FastV", "first 10 % of the guide's layers"}
    assert [h.split("\n")[0] for h in table.headers[4:-1]] == ["pocket-"] * 6
    shares = {row[0].short: row[2].short for block in table.blocks for row in block.rows}
    assert (shares["VisionZip"], shares["FastV"]) == ("30", "40")


def test_pairing_tells_apart_what_separate_intervals_do_not(make):
    """One method is right wherever the other is, and on a few more questions."""
    rows = len(make.benchmarks[COLUMNS[0]].dataset("test", N))
    some = [i // 2 % 2 == 0 for i in range(rows)]
    more = [right or i % 24 == 2 for i, right in enumerate(some)]
    found = [*_answers(make, "vanilla", TOTAL, 1.0), *_answers(make, "visionzip", 16, more),
             *_answers(make, "fastv", 16, some)]  # fmt: skip
    compared = _compared(make, {"visionzip": found})
    best, other = (run.retention(COLUMNS) for run in compared.blocks()["visionzip", 16])
    assert best.low < other.high, "their own intervals overlap"
    assert set(compare_tables.ranking_table(compared).data["letters"]) == {"a", "b"}


@pytest.mark.parametrize("seed", range(30))
def test_two_share_a_letter_exactly_when_not_told_apart(seed):
    rng = np.random.default_rng(seed)
    names = list(range(rng.integers(1, 8)))
    differ = {pair: bool(rng.random() < 0.5) for pair in itertools.combinations(names, 2)}
    given = ranking.letters(names, differ)
    assert all(given.values())
    for (a, b), different in differ.items():
        assert (not set(given[a]) & set(given[b])) is different


def test_holm_of_many_pairs_is_the_step_down_rule_to_the_last_bit():
    p = {i: float(x) for i, x in enumerate(np.random.default_rng(0).random(200) ** 4)}
    p |= {200 + i: p[i] for i in range(20)}  # ties
    expected, largest = {}, 0.0
    for i, name in enumerate(sorted(p, key=lambda k: p[k])):
        largest = max(largest, min(1.0, (len(p) - i) * p[name]))
        expected[name] = largest
    assert ranking.holm(p) == expected
    assert ranking.holm({}) == {}


def test_holm_by_hand():
    assert ranking.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert ranking.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_p_values_are_two_sided_and_never_zero():
    assert ranking.two_sided(np.full(999, 0.5)) == pytest.approx(0.002)
    assert ranking.two_sided(np.full(999, -0.5)) == pytest.approx(0.002)
    assert ranking.two_sided(np.zeros(999)) == 1
    assert ranking.two_sided(np.array([-1.0] * 100 + [1.0] * 899)) == pytest.approx(0.202)


# -- the front -------------------------------------------------------------------------------------


def test_the_front_and_what_is_not_told_apart_from_it(compared):
    front = compared.front().set_index("method")
    assert front["state"].to_dict() == {
        "visionzip": FRONT,
        "fastv": CLOSE,  # dearer and a little worse, but that may be chance
        "random": DOMINATED,  # surely worse, at FLOPs that are the same within a percent
    }
    assert front.loc["visionzip", "flops_share"] == pytest.approx(30)


@pytest.mark.parametrize(("share", "state"), [(29.9, DOMINATED), (29.0, FRONT)])
def test_a_hair_of_flops_is_no_advantage(share, state, make, found):
    found["visionzip"][-1] = _costs(
        make, {("visionzip", 16): 30, ("fastv", 16): 40, ("random", 16): share})  # fmt: skip
    front = _compared(make, found).front().set_index("method")
    assert front.loc["random", "state"] == state


# -- costs -----------------------------------------------------------------------------------------


def test_costs_are_those_of_the_record(compared):
    line = compared.frame().set_index("method").loc["visionzip"]
    assert line["flops"] == 3e8
    assert (line["speedup"], line["speedup_low"]) == pytest.approx((100 / 30, 98 / 30))
    assert line["kv_share"] == pytest.approx(30)
    assert np.isnan(compared.frame().set_index("method").loc["sgl_first_10", "flops"])
    html = compare_tables.cost_table(compared).to_html()
    for said in ("1 thread,", "batches of 8", "counted", "measured", "guided"):
        assert said in html


def _energy_cells(make, found, **energy):
    found["visionzip"][-1] = _costs(make, {("visionzip", 16): 30, ("fastv", 16): 40}, **energy)
    table = compare_tables.energy_table(_compared(make, found), 100.0)
    return table, {row[0].short: [c.short for c in row] for b in table.blocks for row in b.rows}


def test_modelled_energy_is_marked_and_never_compared(make, found):
    table, cells = _energy_cells(make, found)
    assert all("modelled" in own[2] and own[3] == "not compared" for own in cells.values())
    assert "neither ranked nor compared" in " ".join(table.caption)
    budgets = list(dict.fromkeys(row[1].short for b in table.blocks for row in b.rows))
    assert budgets[0].startswith("144/"), "in the order of tokens"


def test_measured_energy_is_compared_and_grams_follow_the_grid(make, found):
    measured = {"modelled": False, "reliable": True, "joules_per_question": 7.2,
                "methods": {"gpu": "none", "cpu": "rapl", "ram": "none"}}  # fmt: skip
    table, cells = _energy_cells(make, found, **measured)
    assert cells["VisionZip"][2:] == ["7.2", "1.00", "0.2", "cpu: rapl"]  # 7.2 J x 1000 = 2 Wh
    assert "100 g CO2e per kWh, an assumption and not your grid" in " ".join(table.caption)


def test_figures_say_what_they_show(compared):
    for draw in (compare_plots.tokens_plot, compare_plots.benchmarks_plot,
                 compare_plots.pareto_plot, compare_plots.speed_plot,
                 compare_plots.energy_plot):  # fmt: skip
        figure = draw(compared)
        said = (figure._suptitle or figure.axes[0].title).get_text()
        said += figure.axes[0].get_title(loc="left")
        for word in ("pocket scale", f"n = {N}", "interval"):
            assert word in said, draw.__name__
        plt.close(figure)


def test_every_method_has_a_panel_of_its_own_and_the_rest_is_grey(compared):
    figure = compare_plots.tokens_plot(compared)
    labels = {run.label for run in compared.whole}
    assert {ax.get_title(loc="left") for ax in figure.axes} == labels
    for ax in figure.axes:
        strong = [line for line in ax.lines if line.get_color() not in ("0.4", "0.82")]
        assert {tuple(line.get_xdata()) for line in strong if len(line.get_xdata())} >= {
            tuple(run.tokens for run in compared.whole if run.label == ax.get_title(loc="left"))
        }
    plt.close(figure)


def test_few_methods_are_in_colour_one_for_each_place(compared):
    strong = compare_plots.leaders(compared)
    assert len(strong) == len(set(strong.values()))
    assert set(strong.values()) == {run.family for run in compared.whole}
    figure = compare_plots.benchmarks_plot(compared)
    said = [text.get_text() for text in figure.legends[0].texts]
    assert said[-1] == "all other methods"
    assert len(said) == len(strong) + 1
    plt.close(figure)


def test_the_front_is_numbered_and_its_methods_are_named(compared):
    figure = compare_plots.pareto_plot(compared)
    front = compared.front()
    best = front[front["state"] == FRONT]["label"]
    said = [text.get_text() for legend in figure.legends for text in legend.texts]
    named = [text for text in said if text[0].isdigit()]
    assert {text.split("  ", 1)[1] for text in named} == set(best)
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert {text.split("  ")[0] for text in named} <= shown
    plt.close(figure)


def test_flops_and_time_are_compared_by_their_ratio(make, found):
    record = found["visionzip"][-1]
    speeds = {"visionzip": 3.0, "fastv": 1.25, "random": 100 / 30.1}
    for row in record["rows"][1:]:
        speed = speeds[row["method"]]
        row["prefill_speedup"] = {"median": speed, "low": speed, "high": speed, "n": 9}
    compared = _compared(make, found)
    table = compare_tables.realised_table(compared)
    (block,) = table.blocks
    # FastV promises 100 / 40 = 2.5 and gives 1.25; VisionZip 3 of 100 / 30; random all of it.
    # By the difference of both FastV (1.25) would also stand first; by the ratio the order is sure.
    assert [(row[0].short, row[-1].short) for row in block.rows] == [
        ("FastV", "50 %"), ("VisionZip", "90 %"), ("random", "100 %"),
    ]  # fmt: skip
    shown = {row[0].short: row[6].short for b in compare_tables.cost_table(compared).blocks
             for row in b.rows}  # fmt: skip
    assert shown == {"FastV": "50 %", "VisionZip": "90 %", "random": "100 %"}


def test_a_method_named_by_markup_is_a_text_in_every_table(make, found):
    hostile = "<b onclick=x>zip</b>"
    run = [make.accuracy(hostile, 16, name, 0.5, n=N) for name in COLUMNS]
    compared = _compared(make, {**found, "visionzip": [*found["visionzip"], *run]})
    for table in (compare_tables.accuracy_table(compared), compare_tables.ranking_table(compared)):
        page = table.to_html()
        assert "&lt;b onclick=x&gt;zip" in page
        assert "<b onclick" not in page


def test_labels_are_those_of_the_papers(compared):
    labels = {run.key: run.label for run in compared.runs}
    assert labels["visionzip"] == "VisionZip"
    assert labels["sgl_first_10"] == next(
        row.label for row in load_paper("sgl").table("sources").rows if row.method == "sgl_first_10"
    )


# -- notebooks -------------------------------------------------------------------------------------


@pytest.fixture
def nothing_published(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("frugalvlm.paths.published_dir", lambda: tmp_path / "published")


@pytest.mark.usefixtures("nothing_published")
def test_nothing_recorded_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    with pytest.raises(NothingRecordedError, match="invoke reproduce"):
        compare.build()
    assert not list(tmp_path.rglob("*.ipynb"))


@pytest.mark.notebook
def test_notebooks_are_built_from_records_alone(make, tmp_path, monkeypatch):
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    monkeypatch.setattr("frugalvlm.loading.load_vlm", None)
    runs = {("vanilla", TOTAL): 1.0, ("visionzip", 16): GOOD, ("random", 16): BAD,
            ("aim", 18): 0.7, ("fastv", 18): 0.8}  # fmt: skip
    for name in COLUMNS:
        rows = list(without_pictures(load_benchmark(name).dataset("test", 12)))
        for (method, budget), right in runs.items():
            hyper = {} if method == "vanilla" else {"kept_tokens": budget}
            record = make.accuracy(method, budget, name, right, n=12, rows=rows, hyper=hyper)
            paper = "aim" if budget == 18 else "visionzip"
            stem = records.record_name(record["request"], "code", "machine")
            records.write(tmp_path / "pocket" / paper / "records" / f"{stem}.json", record)
    cost = _costs(make, {("visionzip", 16): 30, ("random", 16): 30})
    records.write(tmp_path / "pocket" / "visionzip" / "records" / "cost.json", cost)
    pages = compare.build({"n": 12})  # nothing of so few questions is published
    assert [page.name for page in pages] == ["accuracy.html", "efficiency.html", "emissions.html"]
    for page in pages:
        text = page.read_text()
        assert "Traceback" not in text
        assert str(tmp_path) not in text
        assert "n = 12 questions per benchmark" in text
        assert "invoke reproduce --paper sgl -n 12" in text
        executed = nbformat.read(page.with_suffix(".ipynb"), as_version=4)
        assert any(c.get("outputs") for c in executed.cells if c.cell_type == "code")
    assert "VisionZip" in (tmp_path / "compare" / "runs.csv").read_text()
    assert "letters" in (tmp_path / "compare" / "ranking.csv").read_text()
    assert "lost_per_TFLOPs" in (tmp_path / "compare" / "saved.csv").read_text()
    assert "How many questions pay for a training" in pages[1].read_text()
