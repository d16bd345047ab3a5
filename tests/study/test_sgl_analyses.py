"""SGL's analyses on tiny models of random weights: what their records say is what happened."""

import dataclasses

import numpy as np
import pytest
import torch

from frugalvlm import methods
from frugalvlm.benchmarks import asking, load_benchmark
from frugalvlm.engine.guidance import Guide
from frugalvlm.loading import load_vlm, model_hash
from frugalvlm.papers import load_paper
from frugalvlm.pocket.installed import WeightsError, save_vlm
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.report import tables
from frugalvlm.runs import accuracy
from frugalvlm.runs.guides import with_guide
from frugalvlm.runs.options import Options
from frugalvlm.runs.records import method_key
from frugalvlm.runs.setting import Setting, Silent
from frugalvlm.studies import sgl
from frugalvlm.verdicts.verdicts import verdicts
from frugalvlm.views import UnsupportedError

N, NAME = 21, "pocket-gqa"  # three questions a picture


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for name in ("pocket-llava-tiny", "pocket-llava-small"):
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("models") / name
        save_vlm(build_model(name), build_processor(), folders[name])
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def options(folders):
    return Options(
        n=N, benchmarks=(NAME,), model=folders["pocket-llava-tiny"],
        guide=folders["pocket-llava-small"], repeats=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def large(options):
    return load_vlm(options.model)


@pytest.fixture(scope="module")
def setting(tmp_path_factory, options):
    folder = tmp_path_factory.mktemp("records")
    return Setting("pocket", "tiny", model_hash(options.model), folder, n=N)


@pytest.fixture(scope="module")
def made(setting, large, options):
    return sgl.run(setting, *large, options, Silent())


@pytest.fixture(scope="module")
def by_key(made):
    return {method_key(r): r for r in made if r["kind"] == "accuracy"}


def answers(record):
    return [answer for _, answer in record["answers"]]


def test_every_variant_is_a_record_of_its_own(made, by_key, options):
    (layout,) = [t for t in load_paper("sgl").tables if t.id == "sources"]
    wanted = {row.method for row in layout.rows} - {"vanilla", "sgl"}
    exits = {"sgl_small", "sgl_exit", "sgl_exit_confidence", "sgl_exit_consistency"}
    assert set(by_key) == wanted | exits
    name = f"pocket-llava-small@{model_hash(options.guide)[:8]}"
    assert by_key["sgl_prompt"]["request"]["method"]["guide"] == name
    for key in wanted:  # one cut, one budget
        assert by_key[key]["tokens"]["per_layer"] == [144.0] + [7.0] * 7, key
    small = load_vlm(options.guide)[0].config.text_config.num_hidden_layers
    assert small != 8
    assert by_key["sgl_small"]["tokens"]["per_layer"] == [144.0] * small, "of the guide's layers"
    assert len({tuple(answers(by_key[k])) for k in wanted}) > 4, "rankings make no difference"


def test_the_guide_alone_answers_as_it_does_without_us(by_key, options, large):
    batches = asking.Batches(load_benchmark(NAME), large[1], "test", N, "cpu")
    small, _ = load_vlm(options.guide)
    assert answers(by_key["sgl_small"]) == asking.answer_all(small, batches, 10)


def test_the_guide_answers_the_same_prompts_once(large, options, monkeypatch):
    calls, forward = [], Guide.forward
    monkeypatch.setattr(Guide, "forward", lambda *args: (calls.append(1), forward(*args))[1])
    guide = sgl.load_guide(options, large[1])
    method = dataclasses.replace(methods.SGL.for_budget(7, 144), guide=sgl._Remembering(guide, {}))
    plan = [method, *(v for v in sgl.variants(method, large[0]) if isinstance(v, methods.SGL))]
    plan = [own for own in plan if own.key != "sgl_oracle"]
    batches = asking.Batches(load_benchmark(NAME), large[1], "test", 40, "cpu")
    assert len(batches.batches) == 2
    told = {}
    for own in plan:
        with own.on(large[0]):
            told[own.key] = asking.answer_all(large[0], batches, 3)
    assert calls == [1, 1]
    for own in plan[:3]:
        with dataclasses.replace(own, guide=guide).on(large[0]):
            assert asking.answer_all(large[0], batches, 3) == told[own.key]
    blank = {**batches.batches[0][1]}
    blank["pixel_values"] = torch.zeros_like(blank["pixel_values"])
    method.guide(blank)
    assert len(calls) == 2 + 2 * 3 + 1, "another picture is another prompt"


def test_exits_take_the_surest_answers(made, by_key, setting, large, options):
    leave = sgl.find(made, "exit")
    batches = asking.Batches(load_benchmark(NAME), large[1], "test", N, "cpu")
    guide = sgl.load_guide(options, large[1])
    method = dataclasses.replace(methods.SGL.for_budget(7, 144), guide=guide)
    args = (setting, large[0], load_benchmark(NAME), batches, method, 7, Silent())
    guided, small = answers(accuracy.accuracy_run(*args)), answers(by_key["sgl_small"])
    assert guided != small
    sure, stable = (np.array(leave["questions"][NAME][k]) for k in ("confidence", "consistency"))
    assert ((sure > 0) & (sure <= 1)).all()
    assert ((stable > 0) & (stable <= 1)).all()
    for key, score in (("sgl_exit", sure + stable), ("sgl_exit_confidence", sure),
                       ("sgl_exit_consistency", stable)):  # fmt: skip
        out = set(np.argsort(-score, kind="stable")[: round(0.4 * len(score))].tolist())
        assert answers(by_key[key]) == [small[i] if i in out else guided[i] for i in range(N)]
    curve = [row for row in leave["curve"] if row["criterion"] == "mean"]
    assert [row["share"] for row in curve] == list(sgl.SHARES)
    flops, thresholds = ([row[k] for row in curve] for k in ("flops", "threshold"))
    assert flops == sorted(flops, reverse=True)
    assert thresholds[0] is None
    assert thresholds[1:] == sorted(thresholds[1:], reverse=True)
    parts = sgl.find(made, "guide cost")["flops"]
    assert flops[0] == parts["guide"] + parts["consistency"] + parts["large"]
    assert flops[-1] == parts["guide"] + parts["consistency"]
    plain = [row["flops"] for row in leave["curve"] if row["criterion"] == "confidence"]
    assert plain[-1] == parts["guide"], "confidence needs no second look"
    assert curve[-1]["score"] == by_key["sgl_small"]["metrics"]["headline"]["value"]
    frame = sgl.exit_frame(leave)
    assert len(frame) == len(sgl.CRITERIA) * len(sgl.SHARES)


def test_costs_add_up(made):
    flops = (cost := sgl.find(made, "guide cost"))["flops"]
    assert flops["guided"] == flops["large"] + flops["guide"]
    assert 0 < flops["large"] < flops["untouched"]
    assert (
        0 < flops["guide without reading"] < flops["guide"] < 1.5 * flops["guide without reading"]
    )
    assert cost["consistency_share"]["value"] == flops["consistency"] / flops["guide"]
    assert 0 < cost["consistency_share"]["value"] < 1
    assert sgl.cost_frame(cost).loc["untouched", "of untouched"] == 1


def test_agreement_of_rankings(made, setting, large, tmp_path):
    rankings = sgl.find(made, "agreement")["rankings"]
    for quantities in rankings.values():
        for found in quantities.values():
            assert -2 <= found["low"] <= found["value"] <= found["high"] <= 2
            assert found["n"] == N
    assert rankings["small_all"]["spearman"]["value"] < 0.99
    # A guide with the large model's own weights agrees with it in everything.
    batches = asking.Batches(load_benchmark(NAME), large[1], "test", N, "cpu")
    method = dataclasses.replace(methods.SGL.for_budget(7, 144), guide=Guide(large[0], "itself"))
    elsewhere = dataclasses.replace(setting, folder=tmp_path)
    itself = sgl._agreement_run(elsewhere, large[0], method, batches, Silent())["rankings"]
    assert itself["small_all"]["spearman"]["value"] == pytest.approx(1)
    assert itself["small_all"]["overlap"]["value"] == 1
    assert itself["large_one"]["overlap"]["value"] < 1
    assert len(sgl.agreement_frame({"rankings": itself})) == 8


def test_records_are_used_again(made, setting, large, options, monkeypatch):
    def stop(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(asking, "answer", stop)
    monkeypatch.setattr(Guide, "forward", stop)
    again = sgl.run(setting, *large, options, Silent())
    assert len(again) == len(made)
    assert [r["provenance"]["created"] for r in again] == [r["provenance"]["created"] for r in made]


def test_tables_and_verdicts_read_them(made, setting, large, options):
    batches = asking.Batches(load_benchmark(NAME), large[1], "test", N, "cpu")
    vanilla = accuracy.accuracy_run(
        setting, large[0], load_benchmark(NAME), batches, methods.Vanilla(), 144, Silent()
    )
    table = tables.accuracy_table("sgl", "sources", [vanilla, *made])
    frame = table.to_frame() if hasattr(table, "to_frame") else table.data
    own = frame[frame["benchmark"] == NAME].set_index("method")
    assert own.loc["sgl_oracle", "score"] is not None
    printed = frame[frame["benchmark"] == "pocket-textvqa"].set_index("method")["paper_score"]
    assert printed["sgl_generated"] == 79.38
    assert printed["sgl_prompt"] == 76.15
    found = {v.claim.id: v for v in verdicts("sgl", [vanilla, *made], "pocket")}
    assert found["consistency-is-cheap"].value == pytest.approx(
        sgl.find(made, "guide cost")["consistency_share"]["value"]
    )
    assert found["rankings-agree"].status != "not measured"
    assert found["beats-random-ranking"].status == "not measured"  # over three benchmarks


def test_a_plan_gets_its_guide_only_where_one_is_needed(large, options):
    missing = dataclasses.replace(options, guide="pocket-llava-none")
    plan = [(methods.Vanilla(), 144), (methods.FastV(7), 7)]
    assert with_guide(plan, missing, large[1]) == plan
    guided = [*plan, (methods.SGL.for_budget(7, 144), 7)]
    with pytest.raises(WeightsError, match="pocket-llava-none"):
        with_guide(guided, missing, large[1])
    *others, (method, budget) = with_guide(guided, options, large[1])
    assert others == plan
    assert budget == 7
    assert method.guide is not None


def test_a_guide_with_another_tokenizer_is_refused(large, options, tmp_path):
    processor = build_processor()
    processor.tokenizer.add_tokens(["zebra"])
    save_vlm(build_model("pocket-llava-small"), processor, tmp_path / "small")
    other = dataclasses.replace(options, guide=str(tmp_path / "small"))
    with pytest.raises(UnsupportedError, match="another tokenizer"):
        sgl.load_guide(other, large[1])


def test_the_blueprint_counts_the_guide():
    """LLaVA-1.5-7B guides 13B: its prompt, and an answer of ten tokens, on top of the cut model."""
    from frugalvlm.runs.blueprint import TEXT_AFTER, TEXT_BEFORE, blueprint, count

    name, text = "LLaVA-1.5-13B", TEXT_BEFORE + TEXT_AFTER
    model = blueprint(name).build()
    vanilla = count(model, name, methods.Vanilla(), 576)
    row = count(model, name, methods.SGL.for_budget(29, 576), 29)

    def decoder(tokens, layers, d, m):
        return layers * (2 * tokens * (4 * d * d + 3 * d * m) + 4 * d * tokens * tokens)

    cut = int(29 / 576 * 40)
    large = decoder(576 + text, cut, 5120, 13824) + decoder(29 + text, 40 - cut, 5120, 13824)
    assert row["flops_parts"]["decoder"] == large
    small = count(blueprint("LLaVA-1.5-7B").build(), "LLaVA-1.5-7B", methods.Vanilla(), 576)
    assert small["flops"] < row["flops_parts"]["guide"] < 1.1 * small["flops"]
    assert sum(row["flops_parts"].values()) == row["flops"] < vanilla["flops"]
    assert row["hyper_parameters"]["guide"] == "LLaVA-1.5-7B"
    assert row["tokens_mean"] == (cut * 576 + (40 - cut) * 29) / 40
