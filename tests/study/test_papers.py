"""The papers' data: complete, consistent with itself, and guarded against silent edits."""

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from frugalvlm import papers, paths
from frugalvlm.methods import METHODS, VARIANTS
from frugalvlm.papers import EQUALS, SCALES, Paper, all_papers, keys, load_paper
from frugalvlm.paths import project_root
from frugalvlm.report.display import labels_of, method_labels
from frugalvlm.verdicts.decision import decide
from frugalvlm.verdicts.quantity import Measured

KEYS = keys()
# The survey: papers from the turn of November to December 2024. Others may join them.
SURVEYED = (
    "dyvte", "atp_llava", "gsearch", "early_exit", "fastervlm", "vlsi", "cegi", "aim", "sgl",
    "safe", "flashsloth", "visionzip", "nvila",
)  # fmt: skip
AVERAGE_TOLERANCE = 0.15  # cells and averages are printed to one decimal
SECOND_HAND = re.compile(
    r"secondary|not checked|unverified|read off|re-run by others|third-party|inferred|presum"
    r"|reassembled|re-quoted|user measurement|least-squares|translation",
    re.IGNORECASE,
)


@pytest.fixture(scope="module", params=KEYS)
def paper(request: pytest.FixtureRequest) -> Paper:
    return load_paper(request.param)


@pytest.fixture(scope="module")
def visionzip() -> Paper:
    return load_paper("visionzip")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    folder = tmp_path / "papers"
    shutil.copytree(paths.data_dir() / "papers", folder)
    return folder


# --- every paper ---------------------------------------------------------------------------


def test_the_surveyed_papers_and_no_stray_file() -> None:
    names = Counter(p.name for p in (paths.data_dir() / "papers").iterdir())
    assert names == Counter([f"{k}.csv" for k in KEYS] + [f"{k}.yaml" for k in KEYS])
    assert [p.key for p in papers.all_papers()] == list(KEYS)
    assert tuple(key for key in KEYS if key in SURVEYED) == SURVEYED
    numbers = [load_paper(key).arxiv for key in KEYS]
    assert numbers == sorted(numbers)


def test_figures_are_numbers_with_a_source(paper: Paper) -> None:
    frame = paper.figures
    assert tuple(frame.columns) == papers.COLUMNS
    assert set(frame["paper"]) <= {paper.key}
    assert paper.key not in SURVEYED or len(frame)
    assert frame["value"].map(math.isfinite).all()
    assert frame["verified"].dtype == bool
    tokens = frame["visual_tokens"].dropna()
    assert ((tokens >= 0) & (tokens == tokens.round())).all()
    for column in ("table", "model", "method", "setting", "benchmark", "metric", "unit"):
        assert (frame[column].str.strip() != "").all(), column
    assert (frame["source"].str.len() > 15).all()
    identity = [c for c in papers.COLUMNS if c not in ("value", "source", "verified")]
    assert not frame.duplicated(identity).any()


def test_unverified_figures_are_those_described(paper: Paper) -> None:
    frame = paper.figures
    counted = Counter(frame.loc[~frame["verified"], "table"])
    assert counted == Counter({u.table: u.figures for u in paper.unverified})
    assert all(u.why for u in paper.unverified)


def test_second_hand_sources_never_count_as_verified(paper: Paper) -> None:
    frame = paper.figures
    text = frame["source"] + " " + frame["setting"] + " " + frame["model"]
    second_hand = text.str.contains(SECOND_HAND) | frame["table"].str.startswith("external")
    wrong = frame[second_hand & frame["verified"]]
    assert wrong.empty, wrong[["table", "source"]].drop_duplicates().to_string()


@pytest.mark.parametrize(
    ("key", "verified", "unverified"),
    [
        ("cegi", 0, 6),  # tables not readable
        ("early_exit", 0, 1),
        ("safe", 3, 6),  # the abstract's three numbers
        ("visionzip", 766, 95),
        ("sgl", 132, 61),  # Table 1 only
        ("gsearch", 269, 209),
    ],
)
def test_what_was_read_and_what_was_not(key: str, verified: int, unverified: int) -> None:
    flags = load_paper(key).figures["verified"]
    assert (int(flags.sum()), int((~flags).sum())) == (verified, unverified)


def test_description_is_complete(paper: Paper) -> None:
    assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
    assert paper.url.startswith(f"https://arxiv.org/abs/{paper.arxiv}")
    assert paper.year == 2024 or paper.key not in SURVEYED
    assert len(paper.authors) >= (4 if paper.key in SURVEYED else 1)
    assert 300 < len(paper.summary) < 1000
    assert paper.kind
    assert len(paper.evidence) > 60
    if paper.code is not None:
        assert paper.code.url.startswith("https://github.com/")
        assert re.fullmatch(r"[0-9a-f]{7,40}", paper.code.commit or "")


COMPUTED = {
    "visionzip": {"pocket", "blueprint", "full"},
    "gsearch": {"pocket", "blueprint", "full"},
    "early_exit": {"pocket"},
    "sgl": {"pocket", "blueprint"},
    "fastervlm": {"pocket", "blueprint", "full"},
    "aim": {"pocket", "blueprint", "full"},
    "dyvte": {"pocket", "blueprint"},
    "cegi": {"pocket"},
}


def test_what_is_computed(paper: Paper) -> None:
    done = {scale for scale, state in paper.status.items() if state != "planned"}
    assert done == COMPUTED.get(paper.key, set()) or paper.key not in SURVEYED


def test_computed_tables_hold_methods_that_the_kit_knows(paper: Paper) -> None:
    for table in paper.tables:  # others hold what a study makes of methods
        if table is paper.pocket_table or table.pocket_model or table.id == "blueprint":
            assert {row.method for row in table.rows} <= METHODS.keys() | VARIANTS.keys(), table.id


def test_what_counts_as_published_has_records(paper: Paper) -> None:
    for scale, state in paper.status.items():
        published = list((project_root() / "results" / scale / paper.key).glob("records/*.json"))
        assert (state == "published") == bool(published), scale


def test_claims_say_where_they_can_be_tested(paper: Paper) -> None:
    ids = [claim.id for claim in paper.claims]
    assert len(ids) == len(set(ids)) >= (4 if paper.key in SURVEYED else 1)
    for claim in paper.claims:
        assert claim.text, claim.id
        assert claim.where, claim.id
        assert {*claim.scales, *claim.why_not} == set(SCALES), claim.id
        assert all(claim.why_not.values()), claim.id
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\dZ", claim.written), claim.id
        assert datetime.fromisoformat(claim.written) < datetime.now(UTC), claim.id


def test_the_papers_own_numbers_pass_their_own_test(paper: Paper) -> None:
    """Whatever a paper prints, on our columns where we know it, meets what its claim asks."""
    for claim in paper.claims:
        own = claim.reported if claim.reported_on_columns is None else claim.reported_on_columns
        if claim.quantity is None or own is None or claim.origin == "kit":
            continue
        status = decide(Measured(own, own, own), claim)
        assert status in ("holds", "by construction"), f"{claim.id}: {own} gives {status}"
        if claim.reported_on_columns is not None and claim.relation in (">=", "<="):
            assert claim.threshold == claim.reported_on_columns, claim.id


def test_no_claim_is_held_against_another_methods_number(paper: Paper) -> None:
    """A level is tested against the paper's own, within a margin that is small and has a reason."""
    for claim in paper.claims:
        assert bool(claim.margin) == bool(claim.why_margin), claim.id
        if claim.about == "accuracy" and claim.relation in (">=", "<="):
            assert 0 <= claim.margin <= 3, claim.id
        if claim.relation in (">", "<"):
            assert claim.margin == 0, claim.id


def test_a_comparison_of_methods_says_by_what_they_are_alike(paper: Paper) -> None:
    for claim in paper.claims:
        q = claim.quantity or {}
        if q.get("kind") == "difference" and claim.about == "accuracy":
            sides = [{**q.get("each", {}), **q}[side]["method"] if "method" in q[side] else None
                     for side in ("a", "b")]  # fmt: skip
            assert sides[0] == sides[1] or q["equal"] in EQUALS, claim.id


def test_anomalies_name_one_printed_figure(paper: Paper) -> None:
    for anomaly in paper.anomalies:
        assert anomaly.note
        if anomaly.select:
            assert [float(v) for v in _select(paper, **anomaly.select)["value"]] == [
                anomaly.printed
            ], anomaly.where


# --- printed averages, recomputed from the cells -------------------------------------------


def _select(paper: Paper, **wanted: object) -> pd.DataFrame:
    frame = paper.figures
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame


def _recomputed(paper: Paper) -> list[tuple[dict[str, object], float, float, int]]:
    """(row, printed average, average of the cells, number of cells) for every printed average."""
    found = []
    records = paper.figures.to_dict("records")
    same = ("table", "model", "method", "setting")
    for average in paper.averages:
        for mean in records:
            if (mean["table"], mean["benchmark"]) != (average.table, average.benchmark):
                continue
            cells = []
            for cell in records:
                if any(cell[c] != mean[c] for c in same) or cell["metric"] == mean["metric"]:
                    continue
                if str(cell["visual_tokens"]) != str(mean["visual_tokens"]):
                    continue
                want = {"table": mean["table"], "model": mean["model"], **average.baseline}
                want |= {"benchmark": cell["benchmark"], "metric": cell["metric"]}
                base = [r["value"] for r in records if all(r[c] == v for c, v in want.items())]
                if cell["benchmark"] not in average.exclude and base:
                    assert len(base) == 1, want
                    cells.append(100 * cell["value"] / base[0])
            own = {c: mean[c] for c in (*same, "visual_tokens")}
            found.append((own, mean["value"], sum(cells) / len(cells), len(cells)))
    return found


def _surprises(paper: Paper) -> list[str]:
    """Averages that recompute although listed as anomalies, or do not although not listed."""
    out = []
    listed = [a for a in paper.anomalies if a.recomputed is not None]
    for own, printed, ours, _ in _recomputed(paper):
        hits = [a for a in listed if all(own.get(c, v) == v for c, v in a.select.items())]
        hits = [a for a in hits if a.select["table"] == own["table"]]
        off = abs(printed - ours) > AVERAGE_TOLERANCE
        if off != bool(hits):
            out.append(f"{own}: printed {printed}, cells give {ours:.2f}, listed: {bool(hits)}")
        out += [f"{a.where}: cells give {ours:.2f}" for a in hits if abs(a.recomputed - ours) > 0.1]
    return out


@pytest.mark.parametrize(
    ("key", "averages"), [("visionzip", 72), ("fastervlm", 53), ("sgl", 17), ("atp_llava", 8)]
)
def test_printed_averages_recompute_except_the_anomalies(key: str, averages: int) -> None:
    paper = load_paper(key)
    rows = _recomputed(paper)
    assert len(rows) == averages
    assert min(n for *_, n in rows) >= 3
    assert _surprises(paper) == []


def test_an_edited_cell_is_noticed(copied: Path) -> None:
    path = copied / "visionzip.csv"
    text = path.read_text(encoding="utf-8")
    cell = "Table 1,LLaVA-1.5-7B,VisionZip,retain 64 (54+10),64,POPE,score as printed,77.0,"
    assert text.count(cell) == 1
    path.write_text(text.replace(cell, cell.replace("77.0", "70.7")), encoding="utf-8")
    surprises = _surprises(load_paper("visionzip", folder=copied))
    assert len(surprises) == 1
    assert "retain 64 (54+10)" in surprises[0]


def test_gsearch_average_divides_mme_by_2800() -> None:
    table = _select(load_paper("gsearch"), table="Table 3")
    blocks = table.groupby(["model", "method"])
    assert len(blocks) == 10
    for name, block in blocks:
        values = dict(zip(block["benchmark"], block["value"], strict=True))
        printed = values.pop("Average (12 benchmarks)")
        values.pop("efficiency")
        values["MME"] *= 100 / 2800
        assert len(values) == 12
        assert sum(values.values()) / 12 == pytest.approx(printed, abs=0.02), name


def test_vlsi_headline_is_a_ratio_of_means() -> None:
    paper = load_paper("vlsi")
    mean = _select(paper, table="Table 3b").groupby("model")["value"].mean()
    for model, printed in (("Qwen2-VL-2B", 11.0), ("Qwen2-VL-7B", 17.4)):
        gain = 100 * (mean[model] / mean["GPT-4V (0409)"] - 1)
        assert gain == pytest.approx(printed, abs=0.05)


def test_dyvte_attention_gate_average_is_off() -> None:
    paper = load_paper("dyvte")
    (anomaly,) = [a for a in paper.anomalies if a.recomputed is not None]
    select = {k: v for k, v in anomaly.select.items() if k != "benchmark"}
    cells = _select(paper, **select)
    cells = cells[cells["benchmark"] != "Average"]["value"]
    assert len(cells) == 4
    assert cells.mean() == pytest.approx(anomaly.recomputed, abs=0.05)
    assert abs(cells.mean() - anomaly.printed) > AVERAGE_TOLERANCE


# --- asking for a reported figure ----------------------------------------------------------


def test_known_figures_of_visionzip(visionzip: Paper) -> None:
    def table1(method: str, tokens: int, benchmark: str) -> float | None:
        return visionzip.reported(
            table="Table 1", method=method, tokens=tokens, benchmark=benchmark
        )

    assert table1("VisionZip", 64, "POPE") == 77.0
    assert table1("Vanilla", 576, "POPE") == 85.9
    assert table1("VisionZip", 64, "MME") == 1690
    assert table1("VisionZip", 64, "Avg") == 94.0
    assert table1("VisionZip", 192, "Avg") == 98.5
    assert table1("FastV", 64, "Avg") == 75.6
    assert table1("FasterVLM", 64, "POPE") is None
    assert table1("VisionZip", 63, "POPE") is None


def test_ambiguous_question_names_what_to_add(visionzip: Paper) -> None:
    with pytest.raises(papers.AmbiguousFigureError, match=r"table: Table 1, .*Table 12"):
        visionzip.reported(method="VisionZip", benchmark="POPE")
    with pytest.raises(papers.AmbiguousFigureError, match="metric: accuracy, TFLOPs"):
        load_paper("dyvte").reported(
            table="Table 2", model="LLaVA-1.5-7B", method="DyVTE", benchmark="GQA"
        )


def test_misspelt_name_is_not_taken_for_unreported(visionzip: Paper) -> None:
    with pytest.raises(ValueError, match="did you mean 'VQAv2'"):
        visionzip.reported(table="Table 1", benchmark="VQAV2")
    with pytest.raises(ValueError, match=r"did you mean 'LLaVA-1\.5-7B'"):
        visionzip.reported(table="Table 1", model="llava-1.5-7b")


def test_figures_can_be_edited_without_changing_the_paper(visionzip: Paper) -> None:
    frame = visionzip.figures
    frame.loc[:, "value"] = 0.0
    assert visionzip.reported(table="Table 4", method="Vanilla", metric="prefill time") == 218


def test_unknown_paper_lists_the_known_ones() -> None:
    with pytest.raises(papers.UnknownPaperError) as error:
        load_paper("vision_zip")
    assert "did you mean 'visionzip'" in str(error.value)
    assert all(key in str(error.value) for key in KEYS)
    assert isinstance(error.value, ValueError)


# --- layouts and claims of VisionZip -------------------------------------------------------


def test_names_are_those_of_the_pocket_tables() -> None:
    names = labels_of("gsearch")
    assert names["gsearch"] == "P-Sigmoid", "the blueprint table says more"
    assert names["gsearch_greedy"] == "G-Search (found rates)", "it stands in no table"


def test_every_method_of_a_claim_has_a_name() -> None:
    asked = {
        part["method"]
        for paper in all_papers()
        if set(paper.status.values()) != {"planned"}
        for claim in paper.claims
        for part in _parts(claim.quantity)
        if "method" in part
    }
    assert {"sgl_small", "sgl_exit"} <= asked
    assert not asked - method_labels().keys()


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _parts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _parts(inner)


def test_table1_layout_resolves_to_printed_numbers(visionzip: Paper) -> None:
    table = visionzip.table("table1")
    rows = {row.method: row for row in table.rows}
    assert next(iter(rows)) == "vanilla"
    assert {"blank", "no_image", "no_image_after", "random", "random_fastv", "uniform"} < set(rows)
    controls = ("random", "uniform", "avgpool", "downsample")
    assert {*controls, "fastv", "sparsevlm", "fastervlm", "visionzip"} < set(rows)
    assert [c.label for c in table.columns] == ["GQA", "POPE", "MME", "TextVQA", "SQA", "VQAv2"]
    assert [c.id for c in table.columns] == [f"pocket-{c.label.lower()}" for c in table.columns]

    def printed(method: str, budget: papers.Budget | None = None) -> list[float | None]:
        return [visionzip.printed(table, rows[method], c, budget) for c in table.columns]

    assert printed("vanilla") == [61.9, 85.9, 1862, 58.2, 69.5, 78.5]
    assert printed("vanilla", table.budgets[0]) == printed("vanilla")
    assert printed("visionzip", table.budgets[2]) == [55.1, 77.0, 1690, 55.5, 69.0, 72.4]
    assert printed("fastv", table.budgets[1]) == [49.6, 59.6, 1490, 50.6, 60.2, 61.8]
    for budget in table.budgets:
        assert all(printed(name, budget) == [None] * 6 for name in controls)
        assert printed("fastervlm", budget) == [None] * 6  # its paper has other budgets
    with pytest.raises(ValueError, match="needs a budget"):
        printed("visionzip")


def test_rows_that_a_paper_names_by_a_setting_resolve_too() -> None:
    """SGL prints no token counts; details in brackets behind the setting may be left out."""
    paper = load_paper("sgl")
    table = paper.table("table1")
    rows = {row.method: row for row in table.rows}
    columns = [c for c in table.columns if c.paper_benchmark]
    assert [c.label for c in columns] == ["GQA", "MME", "TextVQA"]

    def printed(method: str, budget: papers.Budget | None = None) -> list[float | None]:
        return [paper.printed(table, rows[method], c, budget) for c in columns]

    assert printed("vanilla") == [64.89, 2270, 82.45]
    assert printed("sgl", table.budgets[2])[::2] == [62.10, 78.98]
    assert printed("fastv", table.budgets[2])[::2] == [44.90, 43.84]
    assert printed("sgl", table.budgets[0]) != printed("sgl", table.budgets[1])
    assert printed("random", table.budgets[0]) == [None] * 3
    sources = paper.table("sources")
    (row,) = [r for r in sources.rows if r.method == "sgl_last_prompt"]
    assert paper.printed(sources, row, sources.columns[0], sources.budgets[0]) == 79.4
    assert (
        paper.reported(
            table="Table 1", method="FastV", setting="average retention", benchmark="GQA"
        )
        is None
    )


def test_number_of_another_paper_only_where_comparable(visionzip: Paper) -> None:
    """Without visual tokens FasterVLM's table prints a score, and VisionZip's does not."""
    table = visionzip.table("table1")
    (row,) = [row for row in table.rows if row.method == "no_image"]
    numbers = [visionzip.printed(table, row, column) for column in table.columns]
    assert numbers[:2] == [37.38, 47.21]
    assert numbers[2] is None  # MME there is the perception score
    assert numbers[4] == 63.06  # ScienceQA under that paper's name


def test_budgets_keep_the_same_share_at_both_scales(visionzip: Paper) -> None:
    table = visionzip.table("table1")
    shares = [table.model.fraction(b) for b in table.budgets]
    assert shares == [Fraction(1, 3), Fraction(2, 9), Fraction(1, 9)]
    for budget, share in zip(table.budgets, shares, strict=True):
        assert budget.pocket_tokens is not None
        assert table.model.pocket_tokens is not None
        assert Fraction(budget.pocket_tokens, table.model.pocket_tokens) == share


def test_budget_splits_are_those_of_tables_8_and_9(visionzip: Paper) -> None:
    seen = 0
    for table in visionzip.tables:
        for model in table.models:
            csv_table, name = (
                ("Table 9", "LLaVA-NeXT") if model.crops > 1 else ("Table 8", "LLaVA-1.5")
            )
            for budget in model.budgets:
                assert sum(budget.split.values()) * model.crops == budget.paper_tokens
                assert budget.per_crop in (None, sum(budget.split.values()))
                for part, metric in (
                    ("dominant", "dominant tokens (incl. CLS)"),
                    ("contextual", "contextual tokens"),
                ):
                    assert budget.split[part] * model.crops == visionzip.reported(
                        table=csv_table, model=name, tokens=budget.paper_tokens, metric=metric
                    )
                    seen += 1
    assert seen == 2 * sum(len(m.budgets) for table in visionzip.tables for m in table.models) > 26


def test_efficiency_layout_resolves(visionzip: Paper) -> None:
    table = visionzip.table("efficiency")
    (budget,) = table.budgets
    numbers = {
        row.method: [visionzip.printed(table, row, c, budget) for c in table.columns]
        for row in table.rows
    }
    assert numbers["vanilla"] == [2293, 218]
    assert numbers["visionzip"] == [756, 27.8]
    assert numbers["fastv"] == [1792, 119]
    with pytest.raises(ValueError, match="3 models"):
        _ = visionzip.table("blueprint").model


def test_retention_claims_quote_the_table(visionzip: Paper, quoted: Any) -> None:
    table = visionzip.table("table1")
    numbers = quoted(visionzip, "Table 1", [c.paper_benchmark for c in table.columns])
    value, over_columns = numbers.value, numbers.over_columns
    tokens = {Fraction(b.paper_tokens, 576): b.paper_tokens for b in table.budgets}
    checked = 0
    for claim in visionzip.claims:
        if claim.quantity is None or claim.quantity["kind"] != "retention":
            continue
        if "model" in claim.quantity:  # another model's table
            continue
        kept = tokens[Fraction(claim.quantity["tokens_fraction"])]
        assert claim.reported == value("VisionZip", kept, "Avg")
        assert claim.threshold == claim.reported_on_columns
        assert claim.threshold == pytest.approx(over_columns("VisionZip", kept), abs=0.05)
        checked += 1
    assert checked == 3
    lead = visionzip.claim("beats-fastv")
    assert lead.reported == pytest.approx(94.0 - 75.6)
    assert lead.reported_on_columns == pytest.approx(
        over_columns("VisionZip", 64) - over_columns("FastV", 64), abs=0.05
    )
    third = visionzip.claim("beats-fastv-third")
    assert third.reported == pytest.approx(98.5 - 88.2)
    assert third.reported_on_columns == pytest.approx(
        over_columns("VisionZip", 192) - over_columns("FastV", 192), abs=0.05
    )
    five = {"GQA", "MME", "SQA", "VQAv2", "TextVQA"}
    rows = _select(visionzip, table="Table 2", visual_tokens=160, method="VisionZip")
    whole = _select(visionzip, table="Table 2", method="Vanilla").set_index("benchmark")["value"]
    kept = [100 * r.value / whole[r.benchmark] for r in rows.itertuples() if r.benchmark in five]
    assert len(kept) == 5
    assert visionzip.claim("next-retention").threshold == pytest.approx(sum(kept) / 5, abs=0.05)


def test_sgl_claims_are_about_the_columns_that_both_tables_have() -> None:
    paper = load_paper("sgl")
    names = {"pocket-textvqa": "TextVQA", "pocket-gqa": "GQA", "pocket-mme": "MME"}
    rows = _select(paper, table="Table 1", model="InternVL2-26B")
    whole = rows[rows["method"] == "Vanilla"].set_index("benchmark")["value"]

    def kept(method: str, share: str) -> float:
        own = rows[(rows["method"] == method) & rows["setting"].str.contains(f"retention {share}%")]
        own = own.set_index("benchmark")["value"]
        return float(sum(100 * own[name] / whole[name] for name in names.values()) / len(names))

    sgl = {share: kept("SGP (2B guides 26B)", share) for share in ("64", "35", "9")}
    for claim, share in (("two-fifths", "64"), ("fifth", "35"), ("nine", "9")):
        level = paper.claim(f"score-ratio-{claim}")
        assert level.quantity is not None
        assert level.quantity["over"] == list(names)
        assert level.threshold == pytest.approx(sgl[share], abs=0.006)
    lead = paper.claim("beats-one-layer")
    assert lead.reported_on_columns == pytest.approx(sgl["9"] - kept("FastV", "9"), abs=0.006)


def test_visionzip_claims_cover_what_each_scale_can_show(visionzip: Paper) -> None:
    testable = {s: [c for c in visionzip.claims if s in c.scales and c.quantity] for s in SCALES}
    kinds = {s: {c.quantity["kind"] for c in cs if c.quantity} for s, cs in testable.items()}
    assert kinds["pocket"] >= {
        "retention",
        "difference",
        "prefill_speedup",
        "attention_concentration",
        "token_count",
    }
    assert kinds["blueprint"] == {"flops_ratio", "kv_ratio", "token_count"}
    assert {"tuned", "training-cost"} <= {c.id for c in visionzip.claims if not c.scales}
    rivals = {
        c.quantity["b"]["method"]
        for c in testable["pocket"]
        if c.quantity and c.quantity["kind"] == "difference" and c.relation == ">"
    }
    assert rivals >= {"fastv", "fastervlm", "random"}


# --- the format is checked, and the folder is found ----------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("claims", 0, "quantity", "kind"), "retentoin", "retentoin"),
        (("claims", 0, "relation"), "=>", "=>"),
        (("claims", 0, "scales"), ["pocket"], "each scale"),
        (("claims", 0, "treshold"), 1, "did you mean 'threshold'"),
        (("claims", 0, "threshold"), None, "needs a threshold"),
        (("status", "full"), "done", "status"),
        (("kind",), ["token reducer"], "token reducer"),
        (("tables", 0, "baseline"), "none", "baseline"),
    ],
)
def test_a_broken_description_is_refused(
    copied: Path, path: tuple[str | int, ...], value: object, complaint: str
) -> None:
    file = copied / "visionzip.yaml"
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    *parents, last = path
    target = raw
    for step in parents:
        target = target[step]
    target[last] = value
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=r"visionzip\.yaml") as error:
        load_paper("visionzip", folder=copied)
    assert complaint in str(error.value)


def test_data_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FRUGALVLM_DATA", raising=False)
    monkeypatch.delenv("FRUGALVLM_RESULTS", raising=False)
    root = paths.project_root()
    assert (root / "pyproject.toml").is_file()
    assert paths.data_dir() == root / "data"
    assert paths.published_dir() == root / "results"
    assert paths.work_dir() == root / "results" / ".work"
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path / "later"))
    assert paths.work_dir() == tmp_path / "later"
    monkeypatch.setenv("FRUGALVLM_DATA", str(tmp_path))
    assert paths.data_dir() == tmp_path
    with pytest.raises(FileNotFoundError, match=r"visionzip\.yaml"):
        load_paper("visionzip")
    monkeypatch.setenv("FRUGALVLM_DATA", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="point it at the data/ folder"):
        paths.data_dir()


def test_package_without_its_repository_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Another project with a pyproject.toml and a data folder above us must not be mistaken for ours
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(paths, "PACKAGE", tmp_path / "site-packages" / "frugalvlm")
    with pytest.raises(FileNotFoundError, match=r"clone.*pip install -e"):
        paths.project_root()
