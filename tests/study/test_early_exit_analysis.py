"""The analysis of early exits: readings against the model's own hidden states, and records."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from frugalvlm.benchmarks import stats
from frugalvlm.loading import load_vlm
from frugalvlm.methods import EarlyExit
from frugalvlm.papers import load_paper
from frugalvlm.pocket.installed import save_vlm
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.reproduce import runners
from frugalvlm.runs.options import Options
from frugalvlm.studies.early_exit import analysis
from frugalvlm.studies.early_exit import report as exit_report
from frugalvlm.verdicts.decision import DECIDED
from frugalvlm.verdicts.verdicts import verdicts

ITEMS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that says different things and never ends: no loop over training."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    model, processor = build_model("pocket-llava-tiny"), build_processor()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * (0.8 if "embed" in name else 0.15))
        for word in ("</s>", "<image>", "<video>", "<pad>"):
            model.lm_head.weight[processor.tokenizer.convert_tokens_to_ids(word)] = 0
    save_vlm(model, processor, folder)
    return folder


def short_answers(model, processor, split, items, device, tokens=9, make=analysis.make_sources):
    made = make(model, processor, split, items, device)
    for source in made:
        source.max_new_tokens = tokens
    return made


@pytest.fixture(scope="module")
def sources(folder):
    made = short_answers(*load_vlm(str(folder)), "test", ITEMS, "cpu")
    return {source.name: source for source in made}


def forced(source, batch, method):
    begun = analysis.begin(source.model, batch)
    decoded = analysis.decode(source.model, batch, method, begun, batch.ids.shape[1], force=True)
    return [part.numpy() for part in decoded]


@pytest.fixture(scope="module")
def captions(sources):
    return sources["captions"], sources["captions"].answers[0]


def test_readings_are_the_models_own_states(captions):
    """Normed once and not twice at the last layer; places that predict the answer, row by row."""
    source, batch = captions
    found, model = analysis.read(source.model, batch, analysis.GATES), source.model
    inputs = {**batch.inputs, "input_ids": torch.cat([batch.inputs["input_ids"], batch.ids], 1)}
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones_like(batch.ids)], 1)
    with torch.no_grad():
        out = model(**{**inputs, "attention_mask": mask}, output_hidden_states=True)
    length = batch.inputs["input_ids"].shape[1]
    norm, layers = model.get_decoder().norm, len(model.get_decoder().layers)
    assert len(out.hidden_states) == layers + 1  # the last one is normed already
    words, halves = [], []
    for number, hidden in enumerate(out.hidden_states[1:], 1):
        logits = model.lm_head(hidden if number == layers else norm(hidden))
        words.append(logits[:, length - 1 : -1].argmax(-1)[batch.real].tolist())
    assert found.words.tolist() == words
    assert words[-1] == out.logits[:, length - 1 : -1].argmax(-1)[batch.real].tolist()
    assert words[-1] == batch.ids[batch.real].tolist(), "generation said otherwise"
    for layer, hidden in zip(model.get_decoder().layers, out.hidden_states, strict=False):
        x = layer.input_layernorm(hidden)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        rotary = model.get_decoder().rotary_emb(x, position)
        triangle = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
        with torch.no_grad():
            state = hidden + layer.self_attn(x, rotary, triangle)[0]
            logits = model.lm_head(norm(state))
        halves.append(logits[:, length - 1 : -1].argmax(-1)[batch.real].tolist())
    assert found.halves[::2].tolist() == halves


def readings(words, halves=None):
    words = np.array(words)
    halves = np.repeat(words, 2, 0) if halves is None else np.array(halves)
    return analysis.Readings(halves, {})


def test_oracles_by_hand():
    """Four layers, five tokens: one column each."""
    found = readings([[7, 1, 7, 1, 2], [7, 7, 1, 1, 2], [7, 7, 7, 7, 2], [7, 7, 7, 1, 3]])
    assert found.first_match.tolist() == [1, 2, 1, 1, 4]
    assert found.saturation.tolist() == [1, 2, 3, 4, 4]
    halves = [[1, 7, 7], [7, 7, 1], [1, 1, 1], [7, 7, 7]]  # two layers, three tokens
    assert readings([], halves).after_attention.tolist() == [False, True, True]
    assert readings([], halves).first_match.tolist() == [1, 1, 2]


@pytest.mark.parametrize("gate", analysis.GATES)
def test_offline_gates_equal_decoding_with_recomputed_caches(captions, gate):
    """Behind the same text and with a true cache, a gate reads the same states either way."""
    source, batch = captions
    found = analysis.read(source.model, batch, analysis.GATES)
    scores = found.scores[gate]
    threshold = 1 if gate == "patience" else float(np.quantile(scores[:-1], 0.5))
    method = EarlyExit(gate, threshold, "recompute")
    said, left = forced(source, batch, method)
    later = batch.real.clone()
    later[:, 0] = False  # the first token never exits
    places = later.numpy()
    offline = np.zeros(places.shape, dtype=int)
    offline[batch.real.numpy()] = found.exits(method)
    assert (offline[places] == left[places]).mean() > 0.97  # a score may lie on the threshold
    assert len(set(left[places])) > 2
    words = np.zeros((len(found.words), *places.shape), dtype=int)
    words[:, batch.real.numpy()] = found.words
    expected = np.take_along_axis(words, left[None] - 1, 0)[0]
    assert (said == expected)[places].mean() > 0.97


def test_forced_without_exits_repeats_the_answer(sources):
    for source in sources.values():
        for batch in source.answers:
            said, left = forced(source, batch, EarlyExit(threshold=2.0))
            assert (said == batch.ids.numpy())[batch.real.numpy()].all()
            assert set(left.ravel()) == {8}


@pytest.mark.parametrize("gate", analysis.GATES)
@pytest.mark.parametrize("copied", analysis.COPIES)
def test_free_answers_are_those_of_generate(sources, gate, copied):
    """Methods take turns behind one pass over the prompt; each answers as it would by itself."""
    source = sources["captions"]
    (batch,) = source.answers
    begun = analysis.begin(source.model, batch)
    length = begun[1].get_seq_length()
    before = [layer.keys.clone() for layer in begun[1].layers]
    scores = analysis.read(source.model, batch, [gate]).scores[gate][:-1]
    method = EarlyExit(gate, 1 if gate == "patience" else float(np.median(scores)), copied)
    for places in (2, source.max_new_tokens):  # the second run begins where the first one left off
        said, left = analysis.decode(source.model, batch, method, begun, places, force=False)
        with method.on(source.model) as trace:
            ids, _ = analysis.generate(source.model, batch.inputs, places)
        assert said.tolist() == ids.tolist()
        assert left[:, 1:].T.tolist() == trace.exits
        assert set(left[:, 0].tolist()) == {8}, "the prompt never exits"
    assert left.min() < 8, "nothing left early: nothing shown"
    assert begun[1].get_seq_length() == length
    for layer, keys in zip(begun[1].layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_free_answers_end_with_their_end_token(sources):
    """What a finished row goes on to say is no part of its answer, nor are its layers."""
    source = sources["captions"]
    (batch,) = source.answers
    tokenizer = source.processor.tokenizer
    said, left = torch.full((ITEMS, 4), 9), torch.full((ITEMS, 4), 5)
    said[0, 1], left[0, 2:] = tokenizer.eos_token_id, 1
    whole = said.clone()
    whole[0, 2:] = tokenizer.pad_token_id
    untouched = source.texts([(batch.items, whole)])
    assert untouched != source.texts([(batch.items, said)])
    row = analysis._free_row(source, [(said, left)], untouched)
    assert row["free"]["same_answer_%"] == 100
    assert row["free"]["mean_layers"] == 5


def test_parts_of_words():
    whole, first, later = analysis.PARTS
    pieces = ["the", "number", "4", "##7", "##1", ",", "a", "3", "</s>"]
    assert analysis.word_parts(pieces) == [whole, whole, first, later, later, *[whole] * 4]
    pieces = ["▁the", "▁cro", "codile", ",", "▁a", "."]
    assert analysis.word_parts(pieces) == [whole, first, later, whole, whole, whole]
    assert analysis.word_parts(["Ġcro", "cod", "ile", "Ġa"]) == [first, later, later, whole]


def test_a_decoder_alone_shares_its_weights(captions):
    source, _ = captions
    alone = analysis.text_model(source.model)
    assert not any(p.is_meta for p in alone.parameters())
    assert alone.lm_head.weight is source.model.lm_head.weight
    ids = torch.tensor([[2, 9, 12, 30]])
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, source.model(ids).logits)
    assert alone.config is not source.model.get_decoder().config


def test_half_a_caption():
    text = analysis.half_a_caption("describe the image.", "a red 3 at the top, a b, a c.")
    assert text == "USER: describe the image. ASSISTANT: a red 3 at the top, a b,"


def test_what_copying_costs_by_hand():
    """80 and 60 % with a true cache, 70 and 30 % with a copy: 20 points, 20 more in the end."""
    own, copied = np.array([[8.0, 10, 6, 10]] * 12), np.array([[7.0, 10, 3, 10]] * 12)
    found = analysis.copying(own, copied)
    assert found["hurts"] == pytest.approx({"value": 20, "low": 20, "high": 20, "n": 12})
    assert found["hurts_more_later"]["value"] == pytest.approx(20)


def test_intervals_draw_prompts_not_tokens():
    where = np.repeat(np.arange(50), 4)
    hit = (where % 2 == 0).astype(float)  # all tokens of a prompt stand or fall together
    found = analysis.ratio(where, 50, hit, np.ones(200))
    assert found["value"] == 0.5
    assert found["high"] - found["low"] > 0.2, "four tokens of a prompt are no four prompts"
    assert np.isnan(analysis.ratio(where, 50, hit, np.zeros(200))["value"])
    gap = analysis.difference(where, 50, where * 1.0, where < 25, where >= 25)
    assert gap["value"] == -25
    assert stats.share(np.array([[3.0, 4.0]])).tolist() == [0.75]


def test_the_paper_is_reproduced_without_a_table(folder, tmp_path, monkeypatch):
    """Three records; found again; every claim testable here gets a verdict; tables and figures."""
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path))
    monkeypatch.setattr(analysis, "GATES", {"confidence": (0.5, 0.9), "entropy": (0.3,),
                                            "patience": (1,)})  # fmt: skip
    monkeypatch.setattr(analysis, "make_sources", partial(short_answers, tokens=5))
    options = Options(n=ITEMS, model=str(folder), repeats=2)
    made = runners.run_pocket("early_exit", options)
    assert [r["request"]["analysis"] for r in made] == ["depth", "decoding", "time"]
    assert len(list((tmp_path / "pocket" / "early_exit" / "records").glob("*.json"))) == 3
    assert runners.run_pocket("early_exit", options)[0]["provenance"] == made[0]["provenance"]
    depth, decoding, time = made
    for name, source in depth["sources"].items():
        assert source["generated_again_%"] > 99, name
        for oracle in ("first_match", "saturation"):
            assert np.sum(source[oracle]["per_item"]) == source["tokens"]
        assert source["first_match"]["mean"]["value"] <= source["saturation"]["mean"]["value"]
    rows = {(r["gate"], r["threshold"], r["kv_copy"]): r for r in
            decoding["sources"]["captions"]["methods"]}  # fmt: skip
    assert len(rows) == 4 + 2 * 2
    assert {run["run"] for run in time["sources"]["text"]["runs"]} >= {"untouched", "gate alone"}
    found = verdicts(load_paper("early_exit"), made, "pocket")
    assert {v.status for v in found} <= {*DECIDED, "not comparable"}
    share = next(v for v in found if v.claim.id == "few-need-last-layer")
    counts = np.array(depth["sources"]["captions"]["first_match"]["per_item"])
    assert share.value == pytest.approx(100 * counts[:, -1].sum() / counts.sum())
    for table in (exit_report.depth_table(depth), exit_report.gate_table(depth),
                  exit_report.decoding_table(decoding, "digits"),
                  exit_report.time_table(time)):  # fmt: skip
        assert "pocket" in table.to_html()
        assert len(table.data) == len(table.blocks[0].rows)
    axes = [exit_report.depth_plot(depth), exit_report.gate_plot(depth),
            exit_report.copy_plot(decoding)]  # fmt: skip
    assert all(ax.get_legend() is not None for ax in axes)
