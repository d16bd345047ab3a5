"""Tables: the paper's layout, our numbers beside the paper's, nothing that was not measured."""

import math
import re

import numpy as np
import pytest
from rich.console import Console

from frugalvlm.benchmarks import load_benchmark
from frugalvlm.digest import request_hash
from frugalvlm.methods import VisionZip
from frugalvlm.papers import load_paper
from frugalvlm.report import tables
from frugalvlm.report.tables import NOT_MEASURED, accuracy_table
from frugalvlm.runs.options import QUESTIONS, sizes_for
from frugalvlm.runs.records import MixedSettingError, RecordError
from frugalvlm.verdicts.scored import Scored, contrast

VISIONZIP = load_paper("visionzip")
SHARE = {"random": 0.5, "fastv": 0.6, "fastervlm": 0.7, "visionzip": 0.9}


def cell(table, method: str, budget: int, benchmark: str = "pocket-gqa"):
    frame = table.data
    found = frame[
        (frame["method"] == method)
        & (frame["budget"] == budget)
        & (frame["benchmark"] == benchmark)
    ]
    assert len(found) == 1
    return found.iloc[0]


def shown(table, label: str, budget: int | str):
    """A row as it stands in the block of a budget, controls included."""
    at, found = "", []
    for block in table.blocks:
        at = at if block.minor else block.heading
        if at.startswith(f"{budget} of") or at.startswith(str(budget)):
            found += [row for row in block.rows if row[0].short == label]
    (row,) = found
    return row


def column(table, name: str) -> int:
    (place,) = [i for i, h in enumerate(table.headers) if h.replace("\n", " ").startswith(name)]
    return place


def on_terminal(table, width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as shown:
        console.print(table)
    return shown.get()


@pytest.fixture(scope="module")
def full(make):
    return accuracy_table(VISIONZIP, "table1", make.table1(SHARE), benchmarks=make.benchmarks)


# --- layout and the paper's numbers ----------------------------------------------------------


def test_blocks_stand_in_the_papers_order_with_vanilla_first(full) -> None:
    headings = [block.heading.split(" ")[0] for block in full.blocks]
    assert headings == [x for b in ("untouched:", "48", "32", "16") for x in (b, "controls")]
    assert [block.minor for block in full.blocks] == [False, True] * 4
    labels = [[row[0].short for row in block.rows] for block in full.blocks]
    controls = ["random", "even grid", "avg. pooling", "small picture"]
    methods = ["FastV", "SparseVLM", "FasterVLM", "VisionZip"]
    ablations = ["C = 0 (ablation)", "true means (ablation)"]
    assert labels[:2] == [["untouched"], ["blank picture", "0 tokens", "none behind layer 2"]]
    assert labels[2:6] == [methods, controls] * 2
    assert labels[6] == [*methods[:-1], *ablations, "VisionZip"]
    assert labels[7] == ["random", "random at FastV's cut", *controls[1:]]
    assert "paper: 64 of 576" in full.blocks[-2].heading
    assert [h.split("\nn=")[0] for h in full.headers] == [
        "method", "kept", "mean", "FLOPs\n%", "pocket-\nGQA", "pocket-\nPOPE", "pocket-\nMME",
        "pocket-\nTextVQA", "pocket-\nSQA", "pocket-\nVQAv2", "mean re-\ntention",
        "visual\ngain",
    ]  # fmt: skip


def test_official_names_never_stand_alone_in_a_column_head(full) -> None:
    official = ("GQA", "POPE", "MME", "TextVQA", "SQA", "VQAv2")
    texts = [full.to_markdown(), full.to_latex(), on_terminal(full), on_terminal(full, 80)]
    heads = [*full.headers, *full.narrow.headers.values()]
    for name in official:
        assert all("pocket" in head for head in heads if name in head)
    assert all("no official sets" in " ".join(text.split()) for text in texts)


def test_the_papers_numbers_stand_beside_ours(full) -> None:
    pope = cell(full, "visionzip", 16, "pocket-pope")
    assert (pope["paper_score"], round(pope["paper_retention"], 1)) == (77.0, 89.6)
    assert pope["paper_source"] == "arXiv:2412.04467 Table 1"
    assert round(cell(full, "visionzip", 16, "mean")["paper_retention"], 1) == 92.7
    assert round(cell(full, "visionzip", 48, "mean")["paper_retention"], 1) == 97.7
    assert cell(full, "vanilla", 144, "pocket-pope")["paper_score"] == 85.9
    text = shown(full, "VisionZip", 16)[column(full, "pocket- POPE")]
    assert text.short.endswith("(90)")
    assert "89.6 % (77)" in text.long
    assert any("arXiv:2412.04467 Table 1" in line for line in full.caption)
    assert "(paper 90)" in text.brief


def test_what_no_paper_printed_is_not_invented(full) -> None:
    for method in ("random", "fastervlm"):  # FasterVLM prints other token counts
        row = cell(full, method, 16, "pocket-mme")
        assert math.isnan(row["paper_score"])
        assert math.isnan(cell(full, method, 16, "mean")["paper_retention"])


def test_score_retention_and_interval_are_ours(full, make) -> None:
    row = cell(full, "visionzip", 16)
    assert row["n"] == 40
    assert row["images"] == 20
    assert row["score"] == row["retention"]  # the untouched model is always right here
    assert row["retention_low"] < row["retention"] < row["retention_high"]
    assert row["score"] == pytest.approx(90, abs=2.5)
    mean = cell(full, "visionzip", 16, "mean")
    assert mean["n"] == 240
    assert (
        mean["retention_high"] - mean["retention_low"]
        < row["retention_high"] - row["retention_low"]
    )


def test_retention_is_paired_and_not_a_ratio_of_strangers(make) -> None:
    """The same pictures fail in both runs, so their retention is exactly 100 %."""
    records = [make.accuracy("vanilla", 144, right=0.6), make.accuracy("visionzip", 16, right=0.6)]
    row = cell(accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks),
               "visionzip", 16)  # fmt: skip
    assert row["score_low"] < row["score"] < row["score_high"]
    assert row["retention"] == 100
    assert row["retention_low"] < 100 < row["retention_high"], "no picture differs: Clopper-Pearson"


def test_requested_and_actual_tokens(make) -> None:
    layers = [144.0, 144.0, 16.0, 16.0, 16.0, 16.0]
    records = [make.accuracy("vanilla", 144), make.accuracy("fastv", 16, per_layer=layers)]
    table = accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks)
    row = cell(table, "fastv", 16)
    assert (row["tokens_mean"], row["tokens_min"], row["tokens_max"]) == (
        pytest.approx(58.67, abs=0.01),
        16,
        144,
    )
    row = shown(table, "FastV", 16)
    assert [c.short for c in row[1:4]] == ["16", "58.7", "–"]
    assert "(16 asked)" in row[1].long
    assert "16 to 144 over layers" in row[2].long


def test_the_share_of_flops_is_that_of_the_cost_record_of_this_model(make, full) -> None:
    """Unlike pairs are seen: FastV asks for 16 tokens and has the FLOPs of many more."""
    cost = make.efficiency()
    records = [*make.table1(SHARE), cost]
    table = accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks)
    place = column(table, "FLOPs")
    for label, method in (("FastV", "fastv"), ("VisionZip", "visionzip")):
        counted = next(r for r in cost["rows"] if (r["method"], r["budget"]) == (method, 16))
        share = 100 * counted["flops"] / cost["rows"][0]["flops"]
        assert cell(table, method, 16)["flops_share"] == pytest.approx(share)
        assert shown(table, label, 16)[place].short == f"{share:.0f}"
    assert shown(full, "FastV", 16)[place].short == "–", "nothing was counted"
    cost["request"]["model"] = "pocket-llava-small"
    table = accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks)
    assert shown(table, "FastV", 16)[place].short == "–", "another model's"


# --- what must not enter -----------------------------------------------------------------------


def test_failed_answers_are_wrong_and_shown(make) -> None:
    whole = [make.accuracy("vanilla", 144), make.accuracy("visionzip", 16)]
    clean = accuracy_table(VISIONZIP, "table1", whole, benchmarks=make.benchmarks)
    assert "failed" not in clean.headers
    whole[1] = make.accuracy("visionzip", 16, failed=10)
    table = accuracy_table(VISIONZIP, "table1", whole, benchmarks=make.benchmarks)
    row = cell(table, "visionzip", 16)
    assert (row["score"], row["n"], row["failed"]) == (75.0, 40, 10)  # 30 of 40, not of 30
    assert table.headers[-1] == "failed"
    assert shown(table, "VisionZip", 16)[-1].short == "10/40"
    assert table.blocks[0].rows[0][-1].short == "0/40"


@pytest.mark.parametrize("status", ["partial", "failed"])
def test_unfinished_records_stay_out(make, status: str) -> None:
    records = [make.accuracy("vanilla", 144), make.accuracy("visionzip", 16, status=status)]
    table = accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks)
    assert math.isnan(cell(table, "visionzip", 16)["score"])
    assert shown(table, "VisionZip", 16)[4].short == NOT_MEASURED


def test_a_mean_over_some_benchmarks_is_not_shown(make) -> None:
    def lacking(request) -> bool:
        return (request["benchmark"], request["budget"]) == ("pocket-sqa", 16)

    records = [r for r in make.table1(SHARE) if not lacking(r["request"])]
    table = accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks)
    assert math.isnan(cell(table, "visionzip", 16, "mean")["retention"])
    assert not math.isnan(cell(table, "visionzip", 48, "mean")["retention"])
    assert shown(table, "VisionZip", 16)[-2].short == NOT_MEASURED


def test_no_records_gives_a_table_that_says_so() -> None:
    table = accuracy_table(VISIONZIP, "table1", [])
    assert {c.short for block in table.blocks for row in block.rows for c in row[4:]} == {
        NOT_MEASURED
    }
    assert table.data["paper_score"].notna().any()
    assert "No records yet" in table.caption[0]


def test_mixed_settings_are_refused(make) -> None:
    records = [make.accuracy("vanilla", 144), make.accuracy("visionzip", 16, n=20)]
    with pytest.raises(MixedSettingError, match="n: 20, 40"):
        accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks)


def test_answers_to_other_questions_are_refused(make) -> None:
    record = make.accuracy("vanilla", 144)
    record["answers"] = record["answers"][::-1]
    with pytest.raises(RecordError, match="other questions than pocket-gqa"):
        accuracy_table(VISIONZIP, "table1", [record], benchmarks=make.benchmarks)
    record = make.accuracy("vanilla", 144)
    record["provenance"]["data_hash"] = "before the questions were changed"
    with pytest.raises(RecordError, match="run it again"):
        accuracy_table(VISIONZIP, "table1", [record], benchmarks=make.benchmarks)


def test_of_two_runs_the_methods_own_hyper_parameters_count(make) -> None:
    usual = [make.accuracy("vanilla", 144)]
    own = {k: v for k, v in VisionZip.for_budget(16, 144).describe().items() if k != "method"}
    tweaked = own | {"dominant": 10, "contextual": 6}
    records = [
        *usual,
        make.accuracy("visionzip", 16, right=0.2, hyper=tweaked),
        make.accuracy("visionzip", 16, right=0.8, hyper=own),
    ]
    table = accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks)
    assert cell(table, "visionzip", 16)["score"] == pytest.approx(80, abs=2.5)
    records[-1] = make.accuracy("visionzip", 16, hyper=own | {"dominant": 12, "contextual": 4})
    with pytest.raises(MixedSettingError, match="2 runs of visionzip at 16 tokens"):
        accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks)


def test_a_model_that_scores_zero_retains_nothing_that_could_be_named(make) -> None:
    records = [make.accuracy("vanilla", 144, right=0.0), make.accuracy("visionzip", 16)]
    table = accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks)
    assert "undefined" in shown(table, "VisionZip", 16)[4].short


# --- renderings --------------------------------------------------------------------------------


def test_the_terminal_form_fits_its_width_unbroken(make) -> None:
    blank = [make.accuracy("blank", 144, name, 0.3) for name in make.benchmarks]
    for width, failed in ((130, 0), (140, 3)):  # a column more
        records = [*make.table1(SHARE, failed=failed), *blank]
        table = accuracy_table(VISIONZIP, "table1", records, benchmarks=make.benchmarks)
        lines = on_terminal(table, width).splitlines()
        assert max(len(line.rstrip()) for line in lines) <= width
        rows = [line for line in lines if line.startswith("VisionZip  ")]
        assert len(rows) == 3
        for row in rows:  # six scores, the mean and the gain, each in one piece
            assert len(re.findall(r"\d+(?:\.\d)? ±\d+(?:\.\d)?", row)) == 8
            assert "…" not in row


def test_html_is_self_contained_and_escaped(full) -> None:
    page = full.to_html()
    assert "<style>" in page
    assert not re.search(r"https?://|<script|<link", page)
    assert page.count("<tr>") == page.count("</tr>") == 1 + 8 + 31  # 1 + 3 + 3 x 8 + 3 rows
    assert "95 % bootstrap interval" in page
    assert "hardware: CPU Test CPU, 2 cores" in page
    hostile = tables.Table(
        "a<b", ("x<y",), (tables.Block("", ((tables.Cell("1<2"),),)),), (), full.data
    )
    assert "a&lt;b" in hostile.to_html()
    assert "1&lt;2" in hostile.to_html()


def test_markdown_has_equally_many_cells_in_every_row(full) -> None:
    rows = [line for line in full.to_markdown().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 8 + 31
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {13}


def test_the_caption_says_scale_model_hardware_and_interval(full) -> None:
    text = " ".join(full.caption)
    for needed in ("Scale: pocket", "pocket-llava-base", "test split", "Test CPU", "bootstrap"):
        assert needed in text
    assert "n=40" in full.headers[4]


# --- cost tables -------------------------------------------------------------------------------


def test_efficiency_is_relative_to_the_untouched_model(make) -> None:
    table = tables.efficiency_table([make.efficiency()], "visionzip")
    row = table.data[(table.data["method"] == "visionzip") & (table.data["budget"] == 16)].iloc[0]
    assert row["kv_visual_ratio"] == pytest.approx(16 / 144)
    assert row["flops_ratio"] == pytest.approx(2e9 / (4e8 + 1.6e9 / 9), rel=1e-6)
    assert row["prefill_speedup_low"] < row["prefill_speedup"] < row["prefill_speedup_high"]
    shown = on_terminal(table)
    assert f"{row['prefill_speedup']:.2f}x" in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 120
    assert "No records yet" in on_terminal(tables.efficiency_table([]))


def test_speed_up_stands_beside_what_the_flops_promise(make) -> None:
    record = make.efficiency()
    row = next(r for r in record["rows"] if r["method"] == "visionzip" and r["budget"] == 16)
    row["flops"], row["prefill_speedup"]["median"] = int(2e9 / 4), 3.0  # a quarter of the FLOPs
    table = tables.efficiency_table([record], "visionzip")
    line = table.data[(table.data["method"] == "visionzip") & (table.data["budget"] == 16)].iloc[0]
    assert line["realised"] == pytest.approx(75)
    row = shown(table, "VisionZip", 16)
    assert row[table.headers.index("of FLOPs\nratio")].short == "75 %"
    assert "FLOPs are not time" in " ".join(table.caption)


@pytest.mark.parametrize("name", ["accuracy", "efficiency", "energy", "blueprint"])
def test_80_columns_show_whole_rows_and_cut_nothing(make, full, name: str) -> None:
    records = [make.efficiency()]
    table = {
        "accuracy": lambda: full,
        "efficiency": lambda: tables.efficiency_table(records, "visionzip"),
        "energy": lambda: tables.energy_table(records, "visionzip"),
        "blueprint": lambda: tables.blueprint_table("visionzip", [make.blueprint()]),
    }[name]()
    lines = on_terminal(table, 80).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert "…" not in "".join(lines)
    rows = [line for line in lines if line.startswith(("VisionZip  ", "FastV  "))]
    assert len(rows) == sum(r[0].short in ("VisionZip", "FastV") for b in table.blocks
                            for r in b.rows)  # fmt: skip
    start = next(i for i, line in enumerate(lines) if line.startswith("VisionZip  "))
    assert not lines[start + 1].startswith(" ")  # one line a row
    text = " ".join(" ".join(lines).split())
    assert "A wider terminal (140 columns) and the page have everything." in text


def test_an_interval_stays_on_one_line_of_a_page(full) -> None:
    page = full.to_html()
    spans = re.findall(r"<span>([^<]+)</span>", page)
    assert all("[" in s or "±" in s for s in spans)
    assert len(re.findall(r"\[[\d.]+, [\d.]+\]", re.sub(r"<span>[^<]+</span>", "", page))) == 0
    assert "td span,.frugalvlm th span,.frugalvlm p span{white-space:nowrap}" in page


def test_a_trial_says_that_it_measured_less(make) -> None:
    assert sizes_for(QUESTIONS) == {"n": QUESTIONS, "repeats": 9, "energy_window_s": 1.0}
    whole, hundred, twenty = (sizes_for(n) for n in (QUESTIONS, 100, 20))
    for name in ("repeats", "energy_window_s"):
        assert whole[name] > hundred[name] > twenty[name]
    record = make.efficiency()
    said = " ".join(tables.efficiency_table([record]).caption)
    assert "A trial" not in said
    record["request"] |= {k: v for k, v in twenty.items() if k != "n"}
    for table in (tables.efficiency_table([record]), tables.energy_table([record])):
        text = " ".join(table.caption)
        assert "3 rounds instead of 9, modelled energy over 0.2 s instead of 1 s" in text


def test_efficiency_of_two_machines_is_refused(make) -> None:
    other = make.efficiency()
    other["provenance"]["machine"] = "other"
    with pytest.raises(MixedSettingError, match="machine"):
        tables.efficiency_table([make.efficiency(), other])


def test_modelled_energy_is_marked_and_never_compared(make) -> None:
    table = tables.energy_table([make.efficiency()], "visionzip")
    assert table.data["of_untouched"].isna().all()
    rows = [row for block in table.blocks for row in block.rows]
    assert all(row[2].short.endswith(" modelled") for row in rows)
    assert all(row[4].short.endswith(" modelled") for row in rows)
    assert {row[3].short for row in rows} == {"not compared"}
    assert list(table.data["method"][:3]) == ["vanilla", "random", "uniform"]  # not by energy
    assert "tdp_load_model" in on_terminal(table)
    assert "no counter" in table.caption[-1]


def test_measured_energy_is_compared_only_when_reliable_and_alike(make) -> None:
    read = {"gpu": "counter", "cpu": "rapl", "ram": "none"}
    record = make.efficiency(modelled=False, reliable=True, methods=read, reasons=[])
    record["rows"][1]["energy"]["reliable"] = False
    record["rows"][2]["energy"]["methods"] = {**read, "cpu": "none"}
    record["rows"][3]["energy"]["joules_per_question"] = None
    table = tables.energy_table([record])
    ratios = table.data["of_untouched"]
    assert ratios[0] == 1
    assert ratios[1:4].isna().all()
    assert ratios[4] == pytest.approx(48 / 144)
    shown = [row[2].short for block in table.blocks for row in block.rows]
    assert shown[1].endswith(" unreliable")
    assert shown[3] == NOT_MEASURED


def test_blueprint_counts_beside_the_printed_time_marked_as_another_quantity(make) -> None:
    table = tables.blueprint_table("visionzip", [make.blueprint()])
    frame = table.data.set_index(["model", "method", "budget"])
    row = frame.loc[("LLaVA-NeXT-7B", "visionzip", 160)]
    assert row["kv_visual_ratio"] == pytest.approx(160 / 2880)
    assert row["paper_prefill_time_ratio"] == pytest.approx(218 / 27.8)
    assert row["paper_prefill_ms"] == 27.8
    assert math.isnan(frame.loc[("LLaVA-NeXT-7B", "visionzip", 320)]["paper_prefill_time_ratio"])
    assert math.isnan(frame.loc[("LLaVA-1.5-7B", "visionzip", 64)]["paper_prefill_time_ratio"])
    assert "another quantity" in table.headers[-1]
    assert "reading notes" in table.caption[1]  # the printed times are second-hand
    assert max(len(line.rstrip()) for line in on_terminal(table).splitlines()) <= 120


def test_tokens_beyond_the_papers_count_are_explained(make) -> None:
    record = make.blueprint()
    assert "newline" not in " ".join(tables.blueprint_table(VISIONZIP, [record]).caption)
    row = next(r for r in record["rows"] if r["budget"] == 2880)
    row["tokens_mean"] = 2928.0
    assert (
        "holds 2928 visual tokens where the paper counts 2880"
        in (tables.blueprint_table(VISIONZIP, [record]).caption[-1])
    )


def test_a_blueprint_cell_without_record_says_so(make) -> None:
    record = make.blueprint()
    record["rows"] = [r for r in record["rows"] if r["method"] != "fastv"]
    table = tables.blueprint_table("visionzip", [record])
    rows = [row for block in table.blocks for row in block.rows if row[0].short == "FastV"]
    assert len(rows) == 9
    assert {row[1].short for row in rows} == {NOT_MEASURED}
    assert len(on_terminal(tables.blueprint_table("visionzip", []))) > 0


# --- combined figures ----------------------------------------------------------------------------


def test_contrast_agrees_with_a_slow_loop_over_the_same_draws(make) -> None:
    """Mean difference of retentions, recomputed picture by picture with its own bootstrap."""
    names = ("pocket-gqa", "pocket-pope")
    records = [make.accuracy("vanilla", 144, name, 0.8) for name in names]
    for method, right in (("visionzip", 0.7), ("random", 0.45)):
        records += [make.accuracy(method, 16, name, right) for name in names]
    scored = Scored(records, benchmarks=make.benchmarks)
    found = contrast(
        {
            name: [
                (0.5, scored.retention_terms("visionzip", 16, name)),
                (-0.5, scored.retention_terms("random", 16, name)),
            ]
            for name in names
        }
    )
    per_picture = {}
    for record in records:
        right = np.array([answer == "yes" for _, answer in record["answers"]], dtype=float)
        key = (record["request"]["method"]["method"], record["request"]["benchmark"])
        per_picture[key] = right.reshape(-1, 2).sum(1)

    def difference(drawn: dict[str, np.ndarray]) -> float:
        each = []
        for name in names:
            own, other, whole = (
                sum(per_picture[method, name][i] for i in drawn[name])
                for method in ("visionzip", "random", "vanilla")
            )
            each.append(100 * (own - other) / whole)
        return sum(each) / len(each)

    assert found.value == pytest.approx(difference({name: np.arange(20) for name in names}))
    rng = np.random.default_rng(5)
    draws = [difference({name: rng.integers(20, size=20) for name in names}) for _ in range(800)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.15 * (high - low))
    assert found.high == pytest.approx(high, abs=0.15 * (high - low))
    assert found.n_questions == 80


def test_end_to_end_with_the_real_questions(make) -> None:
    """Twelve real questions, nine answered right: 75 %, and the kit's own scoring says so."""
    data = load_benchmark("pocket-gqa").dataset("test", 12).remove_columns("image")
    rows = list(data)
    assert len(rows) == 12
    vanilla = make.accuracy("vanilla", 144, rows=rows, n=12, right=[True] * 12)
    zipped = make.accuracy("visionzip", 16, rows=rows, n=12, right=[True] * 9 + [False] * 3)
    for record in (vanilla, zipped):
        record["provenance"]["data_hash"] = request_hash(rows)
    table = accuracy_table(VISIONZIP, "table1", [vanilla, zipped])
    row = cell(table, "visionzip", 16)
    assert (row["score"], row["retention"], row["n"]) == (75.0, 75.0, 12)
    assert row["paper_score"] == 55.1
    zipped["provenance"]["data_hash"] = request_hash(rows[::-1])
    with pytest.raises(RecordError, match="other questions"):
        accuracy_table(VISIONZIP, "table1", [vanilla, zipped])
