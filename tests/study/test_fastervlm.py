"""FasterVLM's layouts, claims, efficiency table, and its analysis of attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import decoder_attention, tower_states
from tiny_hosts import IMAGE, PATCHES, Picture, model_for, prompt

from frugalvlm import measure
from frugalvlm.benchmarks import asking
from frugalvlm.door import beside
from frugalvlm.hosts import host_for
from frugalvlm.methods import METHODS, VARIANTS
from frugalvlm.papers import Paper, load_paper
from frugalvlm.report import tables
from frugalvlm.reproduce import command as reproduce
from frugalvlm.runs.attention import eager_attention
from frugalvlm.runs.costs import visual_flops
from frugalvlm.runs.layout import pocket_table, rows_of
from frugalvlm.runs.options import Options
from frugalvlm.runs.setting import Silent
from frugalvlm.studies.fastervlm import report as fastervlm_report
from frugalvlm.studies.fastervlm.analysis import curves, dispersion, shift
from frugalvlm.verdicts.verdicts import verdicts

HD = "pocket-llava-hd"
CONTROLS = ("random", "uniform", "avgpool", "downsample")


@pytest.fixture(scope="module")
def paper() -> Paper:
    return load_paper("fastervlm")


# -- data ------------------------------------------------------------------------------------------


def test_the_pocket_table_has_the_papers_reductions_and_the_free_controls(paper):
    layout = pocket_table(paper)
    assert layout.id == "main"
    rows = rows_of(layout, Options())
    assert {method for method, _ in rows} >= {*CONTROLS, "fastervlm", "fastv", "visionzip"}
    assert {method for method, _ in rows} <= {*METHODS, *VARIANTS}
    removed = [1 - b.paper_tokens / 576 for b in layout.budgets]
    assert removed == pytest.approx([0.25, 0.5, 0.75, 0.9, 0.95], abs=0.002)
    asked = dict.fromkeys(b for method, b in rows if method == "fastervlm")
    removed = [1 - tokens / 144 for tokens in asked]
    assert removed == pytest.approx([0.25, 0.5, 0.75, 0.9, 0.95], abs=0.005)


def test_layouts_resolve_to_printed_numbers(paper):
    def printed(layout: str, method: str, budget: int) -> list[float | None]:
        table = paper.table(layout)
        (row,) = [r for r in table.rows if r.method == method]
        return [paper.printed(table, row, c, table.budgets[budget]) for c in table.columns]

    assert printed("main", "fastervlm", 2) == [76.19, 58.34, 67.92, 57.07, 83.46, 1433.76]
    assert printed("main", "fastervlm", 4)[1] == 51.51
    assert printed("main", "uniform", 1) == [None] * 6
    assert printed("llava15-13b", "fastervlm", 4)[:2] == [67.85, 52.62]
    assert printed("next", "fastv", 4)[:2] == [61.84, 49.83]
    assert printed("video", "fastervlm", 4) == [14.0, 65.3, 53.8, 43.7]
    for layout in ("next", "video"):
        for model in paper.table(layout).models:
            assert all(b.per_crop * model.crops == b.paper_tokens for b in model.budgets)


def test_claims_quote_the_tables(paper, quoted):
    names = [c.paper_benchmark for c in paper.table("main").columns]
    numbers = quoted(paper, "main LLaVA-1.5-7B", names)
    value, over_columns = numbers.value, numbers.over_columns
    tokens = {"1/2": 288, "1/4": 144, "1/10": 58, "1/20": 29}
    checked = 0
    for claim in paper.claims:
        q = claim.quantity or {}
        if q.get("kind") == "retention" and q["over"] == "mean" and "model" not in q:
            kept = tokens[q["tokens_fraction"]]
            assert claim.reported == value("FasterVLM", kept, "Average")
            assert claim.threshold == claim.reported_on_columns
            assert claim.threshold == pytest.approx(over_columns("FasterVLM", kept), abs=0.006)
            checked += 1
        elif claim.id.startswith("beats-fastv"):
            kept = tokens[q["a"]["tokens_fraction"]]
            sides = [(value(m, kept, "Average"), over_columns(m, kept))
                     for m in ("FasterVLM", "FastV")]  # fmt: skip
            assert claim.reported == pytest.approx(sides[0][0] - sides[1][0])
            assert claim.reported_on_columns == pytest.approx(sides[0][1] - sides[1][1], abs=0.01)
            checked += 1
    assert checked == 6


def test_claims_about_tiles_quote_the_table(paper):
    table = paper.table("tiles")
    ids = [c.id for c in table.columns]
    assert [c.removesuffix("-hd") for c in ids] == [c.id for c in paper.table("main").columns]
    budget = table.budgets[-1]

    def printed(method: str) -> tuple[float, float]:
        average = paper.reported(
            table="LLaVA-NeXT-7B", method=method, tokens=budget.paper_tokens, benchmark="Average"
        )
        rows = {r.paper_method: r for r in table.rows}
        own = [paper.printed(table, rows[method], c, budget) for c in table.columns]
        whole = [paper.printed(table, rows["Vanilla"], c) for c in table.columns]
        return average, float(np.mean([100 * a / b for a, b in zip(own, whole, strict=True)]))

    faster, fastv = printed("FasterVLM"), printed("FastV")
    kept, lead = paper.claim("retention-next"), paper.claim("next-beats-fastv")
    assert kept.quantity["over"] == lead.quantity["over"] == ids
    assert (kept.reported, kept.threshold) == (faster[0], kept.reported_on_columns)
    assert kept.reported_on_columns == pytest.approx(faster[1], abs=0.006)
    assert lead.reported == pytest.approx(faster[0] - fastv[0])
    assert lead.reported_on_columns == pytest.approx(faster[1] - fastv[1], abs=0.006)


def test_pictures_in_tiles_have_runs_and_verdicts_of_their_own(
    paper, tmp_path, monkeypatch, beside_model
):
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    options = Options(n=4, benchmarks=("pocket-gqa",), budgets=1)
    other = Options(model="pocket-llava-tiny")
    assert beside.beside_runs("fastervlm", "tiles", other) == []
    monkeypatch.setattr(beside, "models_dir", lambda: tmp_path / "none")
    assert beside.beside_runs("fastervlm", "tiles", options) == [], "not installed"

    beside_model(HD)
    made = beside.beside_runs("fastervlm", "tiles", options)
    assert [(r["request"]["method"]["method"], r["request"]["budget"]) for r in made] == [
        ("vanilla", 144), ("blank", 144), ("no_image", 0),
        *((key, 72) for key in (*CONTROLS, "fastv", "fastervlm")),
    ]  # fmt: skip
    folder = tmp_path / "pocket" / "fastervlm" / HD / "records"
    assert made[0]["request"]["n"] == 2, "half of n"
    assert len(list(folder.glob("*.json"))) == len(made)
    assert not (tmp_path / "pocket" / "fastervlm" / "records").exists()
    assert made[-1]["tokens"]["per_layer"] == [5 * 72] * 12
    assert made[0]["tokens"]["per_layer"] == [744] * 12, "five crops, and newlines"
    assert made[-1]["request"]["benchmark"] == "pocket-gqa-hd"
    shown = tables.accuracy_table(paper, "tiles", made).data
    cell = shown.query("method == 'fastervlm' and benchmark == 'pocket-gqa-hd' and budget == 72")
    assert cell[["paper_score", "n"]].to_numpy().tolist() == [[62.66, len(made[-1]["answers"])]]
    parts = reproduce.answer_parts("fastervlm", options)
    assert [(p.benchmark, p.table) for p in parts] == [
        ("pocket-gqa-hd", "tiles"), ("pocket-gqa", None), (None, None)
    ]  # fmt: skip
    monkeypatch.setattr(asking, "answer", None)  # nothing is answered twice
    reproduce.do_part(options, parts[0], Silent())
    status = {v.claim.id: v.status for v in verdicts(paper, made, "pocket")}
    assert status["retention-next"] == status["retention-half"] == "not measured"


# -- cost ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_printed_efficiency_table_is_counted_again_within_one_percent():
    table = fastervlm_report.cost_table()
    rows = table.data
    assert len(rows) == 11
    assert rows["tflops_off_%"].abs().max() < 0.5
    assert rows["kv_off_%"].abs().max() < 0.5
    (last,) = rows[(rows["method"] == "FasterVLM") & (rows["tokens"] == 145)].to_dict("records")
    assert (round(last["printed_tflops"], 2), last["printed_kv"]) == (3.80, 72.5)
    assert "3.80" in table.to_markdown()


def test_visual_flops_are_those_of_the_decoder_on_these_tokens():
    model = model_for("llava_gqa")
    decoder = host_for(model).language_model
    embeds = torch.randn(1, 11, decoder.config.hidden_size).double()
    counted = measure.count_flops(lambda: decoder(inputs_embeds=embeds, use_cache=False)).total
    assert visual_flops(model, [11.0] * len(decoder.layers)) == counted
    assert visual_flops(model, [11.0, 0, 0, 0]) == counted / 4


# -- attention -------------------------------------------------------------------------------------


def slow_curves(model, host: str, picture: Picture, before: int, after: int) -> dict:
    """The released script's sums, one number at a time, for one prompt."""
    inputs = prompt(host, [[before, picture, after]])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    image = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds[inputs["input_ids"] == IMAGE] = torch.cat(list(image))
    start, length = before + 1, embeds.shape[1]  # 1: the beginning-of-sequence token
    places = range(start, start + PATCHES)
    answer: dict[str, list] = {"image": [], "text": [], "last": []}
    for layer in range(len(model.model.language_model.layers)):
        weights = decoder_attention(model, embeds, layer).mean(0)
        answer["image"].append(
            [float(sum(weights[q, k] for q in places if q >= k)) / (start + PATCHES - k)
             for k in places]
        )  # fmt: skip
        text = range(start + PATCHES, length - 1)
        answer["text"].append([float(sum(weights[q, k] for q in text)) / len(text) for k in places])
        answer["last"].append([float(weights[length - 1, k]) for k in places])
    _, maps, _, _ = tower_states(model, picture.pixels(host))
    answer["cls"] = maps[0, :, 0, 1:].mean(0).tolist()
    return answer


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
def test_curves_are_those_of_the_released_script(host):
    """In a padded batch; the reference runs each prompt alone, in float64."""
    rows = [(2, Picture(1), 4), (5, Picture(2), 7)]
    inputs = prompt(host, [list(row) for row in rows], dtype=torch.float32)
    model = model_for(host, "sdpa", torch.float32)
    with torch.no_grad(), eager_attention(model):
        found = curves(host_for(model), inputs)
    assert host_for(model).language_model.config._attn_implementation == "sdpa"
    for i, (before, picture, after) in enumerate(rows):
        expected = slow_curves(model_for(host), host, picture, before, after)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name][i], values, rtol=2e-3, atol=1e-5, err_msg=name)
    assert not np.allclose(found["last"][0], found["text"][0], rtol=2e-3), "last is not text"
    assert not np.allclose(found["last"][:, 0], found["last"][:, 1], rtol=2e-3), "layers differ"


def made_up(seed: int = 0, prompts: int = 40, tokens: int = 50) -> dict[str, np.ndarray]:
    """Attention that rises with the index in the decoder, and has no slope but peaks in [CLS]."""
    rng = np.random.default_rng(seed)
    rising = np.linspace(1, 2, tokens) * rng.uniform(0.5, 1.5, (prompts, 3, tokens))
    peaked = rng.exponential(1, (prompts, tokens)) ** 3
    return {"cls": peaked, "last": rising, "text": rising**2, "image": rising[..., ::-1]}


def test_shift_and_dispersion_of_made_up_attention():
    found, spread = shift(made_up()), dispersion(made_up())
    assert found["last"]["low"] > 0.9
    assert found["image"]["high"] < -0.9
    assert found["cls"]["low"] < 0 < found["cls"]["high"]
    assert found["last_minus_cls"]["low"] > 0
    assert found["last"]["n"] == 40
    assert np.shape(found["per_layer"]["last"]) == (3,)
    data = made_up()
    order = np.sort(data["cls"], -1)[:, ::-1]
    top = 100 * np.mean([row[:10].sum() / row.sum() for row in order])
    assert spread["cls"]["value"] == pytest.approx(top)
    assert spread["cls"]["low"] < top < spread["cls"]["high"]
    assert spread["cls_minus_last"]["low"] > 20
    for total in spread["cumulative"].values():
        assert (np.diff(total) >= 0).all()
        assert total[-1] == pytest.approx(1)


def test_a_shift_by_values_or_by_the_wrong_end_is_rejected():
    """Spearman, not Pearson; of the mean curve, not the mean of correlations; index ascending."""
    data = made_up()
    index = np.arange(50)
    true = shift(data)["last"]["value"]
    mean = data["last"].mean(0)
    pearson = np.mean([np.corrcoef(row, index)[0, 1] for row in mean])
    each = np.mean([np.corrcoef(np.argsort(np.argsort(row)), index)[0, 1]
                    for prompt in data["last"] for row in prompt])  # fmt: skip
    for wrong in (pearson, each, -true):
        assert wrong != pytest.approx(true, abs=1e-3)
    by_hand = np.mean([np.corrcoef(np.argsort(np.argsort(row)), index)[0, 1] for row in mean])
    assert true == pytest.approx(by_hand)


@pytest.fixture
def record():
    data = made_up()
    return {
        "schema": 1, "kind": "analysis", "status": "complete", "prompts": 40,
        "request": {"scale": "pocket", "analysis": "attention", "model": "made-up"},
        "curves": {name: values.mean(0) for name, values in data.items()},
        "shift": shift(data), "dispersion": dispersion(data),
        "provenance": {"machine": "m", "created": "2026-01-01T00:00:00+00:00"},
    }  # fmt: skip


def test_claims_about_attention_are_decided_by_the_record(record):
    found = {v.claim.id: v for v in verdicts("fastervlm", [record], "pocket")}
    for name in ("attention-shift", "attention-shift-text", "cls-has-no-shift"):
        assert found[name].status == "holds", found[name].sentence
        assert found[name].n == 40
    assert found["attention-dispersion"].status in ("holds", "holds in direction")
    assert found["retention-tenth"].status == "not measured"
    data = made_up()
    record["shift"] = shift({**data, "last": data["last"][..., ::-1]})
    found = {v.claim.id: v for v in verdicts("fastervlm", [record], "pocket")}
    assert found["attention-shift"].status == "refused"


def test_figures(record):
    left, right = fastervlm_report.shift_plot(record).axes
    assert len(left.lines) == 5
    assert len(right.lines) == 5
    (ax,) = fastervlm_report.dispersion_plot(record).axes
    assert any("top fifth holds" in t.get_text() for t in ax.get_legend().get_texts())
