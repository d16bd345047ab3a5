"""The searches on objectives with a known optimum, and the analysis on a tiny model."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from frugalvlm.benchmarks import asking, load_benchmark
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.methods.gsearch import GSearchBayes
from frugalvlm.papers import load_paper
from frugalvlm.pocket.installed import save_vlm
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.runs.options import Options
from frugalvlm.runs.setting import Setting, Silent
from frugalvlm.studies import gsearch, study_of
from frugalvlm.verdicts.decision import DECIDED
from frugalvlm.verdicts.verdicts import verdicts

STEP = 1 / 16


def needs(*least: float):
    """Harmless where every layer keeps at least its share, harmful elsewhere."""
    return lambda rates: float(all(r >= n for r, n in zip(rates, least, strict=True)))


def smallest(rate: float) -> float:
    return math.ceil(rate / STEP) * STEP


def test_g_search_finds_each_layers_smallest_rate():
    least = (0.5, 0.5, 0.8, 0.8, 0.43, 0.2, 0.05, 0.01)
    found = gsearch.g_search(needs(*least), 8, 0.01, STEP)
    assert found == (1.0, 1.0, *(smallest(n) for n in least[2:]))


def test_a_deep_layer_that_needs_more_lifts_all_before_it():
    """Rates do not grow with depth, so what layer 5 needs is kept from the first cut on."""
    found = gsearch.g_search(needs(0, 0, 0.3, 0.1, 0.6, 0.2), 6, 0.01, STEP)
    assert found == (1.0, 1.0, *[smallest(0.6)] * 3, smallest(0.2))


def alone(effect, layers, tolerated, step):
    """The wrong twin: each layer searched with all others full, as if harms did not add up."""
    rates = [1.0, 1.0]
    for layer in range(2, layers):
        for n in range(1, round(1 / step) + 1):
            tried = tuple(n * step if i == layer else 1.0 for i in range(layers))
            if effect(tried) >= 1 - tolerated:
                rates.append(n * step)
                break
    return tuple(rates)


def test_harms_add_up_and_the_twin_forgets_it():
    asked = []

    def effect(rates):
        asked.append(rates)
        return 1 - 0.02 * sum(1 - r for r in rates)

    found = gsearch.g_search(effect, 8, 0.01, STEP)
    assert effect(found) >= 0.99
    assert all(a >= b for rates in asked for a, b in pairwise(rates))
    assert effect(alone(effect, 8, 0.01, STEP)) < 0.99


def test_g_search_keeps_everything_where_everything_is_needed():
    assert gsearch.g_search(needs(*[1.0] * 5), 5, 0.0, STEP) == (1.0,) * 5
    assert gsearch.g_search(lambda rates: 0.3, 5, 0.0, STEP) == (1.0, 1.0, STEP, STEP, STEP)


@pytest.mark.parametrize("best", [0.4, 1.5, 4.0])
def test_the_optimisation_finds_the_best_k(best):
    def effect(k):
        return -abs(math.log(k / best))

    k, tried = gsearch.search_p_sigmoid(effect, 12, 0.5, trials=40)
    assert math.exp(-effect(k)) < 1.15, "more than 15 % away from the optimum"
    assert len(tried) == 40
    assert tried[0][0] == 0.5, "the paper's is tried first"
    assert effect(k) == max(value for _, value in tried) >= tried[0][1]
    assert all(0.05 * 32 / 12 <= k <= 2 * 32 / 12 for k, _ in tried)
    assert gsearch.search_p_sigmoid(effect, 12, 0.5, trials=40) == (k, tried), "the seed is fixed"


def test_of_equal_ks_the_papers_wins():
    assert gsearch.search_p_sigmoid(lambda k: 1.0, 32, 0.4808, trials=5)[0] == 0.4808


def test_kendall_by_hand():
    """Orders 1234 and 1243 differ in one pair of six; 4321 in all."""
    tau = gsearch.kendall(np.array([[4.0, 3, 2, 1], [4.0, 3, 1, 2], [1.0, 2, 3, 4]]))
    assert tau == pytest.approx(np.array([[1, 2 / 3, -1], [2 / 3, 1, -2 / 3], [-1, -2 / 3, 1]]))


# -- on a tiny model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gsearch")
    model = build_model("pocket-llava-tiny")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight *= 20  # attention far from uniform
    save_vlm(model, build_processor(), folder / "tiny")
    vlm, processor = load_vlm(str(folder / "tiny"))
    setting = Setting("pocket", "tiny", model_hash(str(folder / "tiny")), folder / "records", n=6)
    options = Options(n=6, benchmarks=("pocket-gqa", "pocket-pope"), budgets=2)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CALIBRATION": 6, "STEP": 1 / 4, "TRIALS": 3}.items():
            patch.setattr(gsearch, name, value)
        first = gsearch.run(setting, vlm, processor, options, Silent())
        again = gsearch.run(setting, vlm, processor, options, Silent())
    made_at = [[r["provenance"]["created"] for r in group] for group in (first, again)]
    assert made_at[0] == made_at[1]
    assert len(list(setting.folder.glob("*.json"))) == len(first), "records are used again"
    return vlm, processor, setting, first


def test_the_analysis_leaves_records_of_what_it_found(made):
    _, _, _, records = made
    search = gsearch.analysis(records, "search")
    assert study_of("gsearch").analysis is gsearch.run
    assert search["rates"][:2] == [1.0, 1.0]
    assert len(search["rates"]) == 8
    assert search["agreement"] >= 0.99
    assert set(search["k"]) == {"84", "49"}
    for budget, found in search["k"].items():
        assert len(found["tried"]) == 3
        assert found["agreement"] == max(value for _, value in found["tried"])
        mean = 144 * sum(found["rates"]) / 8
        assert int(budget) - 1.5 < mean <= int(budget) + 0.5
    keys = [r["request"]["method"]["method"] for r in records if r["kind"] == "accuracy"]
    assert set(keys) >= {"gsearch_greedy", "gsearch_bayes", "random", "fastv"}
    assert all(r["request"]["split"] == "test" for r in records if r["kind"] == "accuracy")


def test_only_dev_questions_are_calibrated_on(made, monkeypatch):
    vlm, processor, _, _ = made
    splits = []
    original = asking.Batches.__init__

    def init(self, benchmark, processor, split, n, device):
        splits.append(split)
        original(self, benchmark, processor, split, n, device)

    monkeypatch.setattr(asking.Batches, "__init__", init)
    monkeypatch.setattr(gsearch, "CALIBRATION", 4)
    calibration = gsearch.Calibration(vlm, processor, ["pocket-gqa"], "cpu")
    assert splits == ["dev"]
    assert calibration.agreement(GSearchBayes(144)) == 1.0


def test_agreement_counts_answers_that_stay(made):
    vlm, processor, _, _ = made
    calibration = gsearch.Calibration(vlm, processor, ["pocket-gqa"], "cpu")
    calibration._untouched[0] = "another answer"
    n = len(calibration._untouched)
    assert calibration.agreement(GSearchBayes(144)) == pytest.approx(1 - 1 / n)


def test_rankings_are_those_of_the_eager_maps(made):
    vlm, processor, _, records = made
    ranking = gsearch.analysis(records, "ranking")
    assert np.shape(ranking["neighbours"]) == (6, 7)
    benchmark = load_benchmark("pocket-gqa")
    row = benchmark.dataset("test", 6 * benchmark.per_image)[0]
    inputs = asking.prepare(processor, [row["image"]], [row["question"]], "cpu")
    vlm.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = vlm(**inputs, output_attentions=True).attentions
    finally:
        vlm.set_attn_implementation("sdpa")
    visual = (inputs["input_ids"][0] == vlm.config.image_token_id).nonzero()[:, 0]
    scores = np.stack([
        weights[0, :, int(visual[-1]) + 1 :][:, :, visual].mean((0, 1)).numpy() for weights in maps
    ])  # fmt: skip
    expected = np.diagonal(gsearch.kendall(scores), offset=1)
    assert ranking["neighbours"][0] == pytest.approx(expected, abs=1e-3)
    assert np.ptp(expected) > 0.01


def test_the_claim_about_rankings_is_decided(made):
    *_, records = made
    found = {v.claim.id: v for v in verdicts("gsearch", records, "pocket")}["rankings-agree"]
    tau = np.array(gsearch.analysis(records, "ranking")["neighbours"])
    assert found.value == pytest.approx(tau[:, 1:].mean(0).min())
    assert found.low <= found.value <= found.high
    assert found.n == 6
    assert found.status in DECIDED


def test_what_the_notebook_shows(made):
    *_, records = made
    shown = gsearch.paper_rates(load_paper("gsearch"))
    depth, rates = shown["LLaVA-1.5-7B"]
    assert len(depth) == 32
    assert rates[:4] == [1.0, 1.0, 1.0, 0.648]
    assert len(shown["InternVL2-1B"][0]) == 8
    assert shown["InternVL2-8B"][0][0] == pytest.approx(3.5 / 32)
    assert set(shown) == {"LLaVA-1.5-7B", *gsearch.DEPTHS}
    assert gsearch.found_frame(records).empty, "no record of the untouched model, no retention"
