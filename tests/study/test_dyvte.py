"""DyVTE's study: attention by modality by slow loops, and what is shown without trained gates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_hosts import LAYERS, Picture, model_for, prompt, tiny_weights

from frugalvlm.methods import DyVTE
from frugalvlm.methods.trained import write_learnt, write_learnt_hashes
from frugalvlm.papers import load_paper
from frugalvlm.runs.setting import Setting
from frugalvlm.studies import dyvte, study_of

ROWS = [[3, Picture(1), 4], [3, Picture(2), 6]]


def random_maps(heads: int = 3, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(heads, length, length, generator=generator).double()
    return logits.masked_fill(~torch.ones(length, length).tril().bool(), -math.inf).softmax(-1)


VISUAL = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0]).bool()
TEXT = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1]).bool()


def test_flows_are_those_of_the_appendix():
    """Heads merged by their maximum, sums over pairs, per querying token."""
    maps = random_maps()
    sets = {"visual": range(2, 5), "text": range(5, 9)}
    pairs = {"visual_self": ("visual", "visual"), "cross": ("text", "visual"),
             "text_self": ("text", "text")}  # fmt: skip
    found = dyvte.flows(maps, VISUAL, TEXT)
    for name, (of, to) in pairs.items():
        total = sum(max(float(maps[h, q, k]) for h in range(3)) for q in sets[of] for k in sets[to])
        assert found[name] == pytest.approx(total / len(sets[of]))


def test_entropy_of_the_texts_attention_to_itself():
    maps, terms = random_maps(), []
    for head in range(3):
        for query in range(6, 9):
            weights = [float(maps[head, query, k]) for k in range(5, query + 1)]
            shares = [w / sum(weights) for w in weights]
            terms.append(-sum(p * math.log(p) for p in shares))
    assert dyvte.text_entropy(maps, TEXT) == pytest.approx(sum(terms) / len(terms))


def look(rows: list) -> dict:
    """In single precision: eager maps of doubles are no numbers where padding sees nothing."""
    model = model_for("llava_clip", dtype=torch.float32)
    with torch.inference_mode():
        return dyvte._look(model, prompt("llava_clip", rows, dtype=torch.float32))


@pytest.fixture(scope="module")
def looked():
    return look(ROWS)


def test_states_change_behind_the_first_layer_that_sees_no_picture(looked):
    """In that layer itself the text's queries and keys, and their shares, are what they were."""
    full = np.array(looked["full"])
    for name, after in (("quarter", 1), ("half", 2), ("three_quarters", 3)):
        own = np.array(looked[name])
        np.testing.assert_allclose(own[:, : after + 1], full[:, : after + 1], rtol=1e-4)
        assert (np.abs(own - full)[:, after + 1 :] > 1e-3).all(), "nothing changed behind it"
    assert np.array(looked["cross"]).shape == (len(ROWS), LAYERS)


def test_prompts_of_a_batch_are_looked_at_alone(looked):
    for i, row in enumerate(ROWS):
        for name, values in look([row]).items():
            np.testing.assert_allclose(values[0], looked[name][i], rtol=1e-3, err_msg=name)


def test_figures_hold_their_intervals(looked):
    figures = dyvte._figures(looked, LAYERS)
    quarter, full = ([row[3] for row in looked[name]] for name in ("quarter", "full"))
    late = [abs(a / b - 1) for a, b in zip(quarter, full, strict=True)]
    assert figures["moved"]["quarter"]["value"] == pytest.approx(100 * sum(late) / len(late))
    apart = [figures["moved"][name]["value"] for name in ("quarter", "three_quarters")]
    assert figures["early_moves_more"]["value"] == pytest.approx(apart[0] - apart[1])
    assert figures["early_moves_more"]["n"] == len(ROWS)


def setting(folder: Path) -> Setting:
    return Setting("pocket", "tiny", "0", folder)


def test_without_gates_nothing_is_made_up(tmp_path, monkeypatch):
    monkeypatch.setenv("FRUGALVLM_DATA", str(tmp_path))
    plan = dyvte.beside_plan(setting(tmp_path), model_for("llava_clip"))
    assert [method.key for method, _ in plan] == ["no_image"]
    assert "`invoke train --method dyvte --model tiny`" in dyvte.missing("tiny")
    assert dyvte.exit_frame([]).empty


def test_with_gates_both_rows_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("FRUGALVLM_DATA", str(tmp_path))
    model = model_for("llava_clip")
    folder = tmp_path / "methods" / "dyvte" / "tiny"
    write_learnt(folder, replace(DyVTE(), learnt=tiny_weights(DyVTE, model, 1.0)), {})
    write_learnt_hashes(folder)
    plan = dyvte.beside_plan(setting(tmp_path), model)
    assert [(m.key, budget) for m, budget in plan] == [
        ("no_image", 0), ("dyvte", 16), ("dyvte_fastv", 8),
    ]  # fmt: skip
    assert all(m.describe()["learnt"].startswith("tiny@") for m, _ in plan[1:])
    assert dyvte.missing("tiny") == ""


def test_exit_layers_count_from_0():
    record = {
        "kind": "accuracy", "status": "complete",
        "request": {"method": {"method": "dyvte"}, "benchmark": "pocket-gqa", "budget": 144},
        "tokens": {"per_layer": [144.0, 144.0, 72.0, 0.0], "spread": [[144, 144], [0, 0]]},
        "metrics": {"headline": {"value": 50.0}},
        "provenance": {"created": "2026-01-01T00:00:00", "machine": "m"},
    }  # fmt: skip
    frame = dyvte.exit_frame([record])
    assert frame.loc[0, "exit"] == 1.5  # layers 0 to 1.5: two and a half have seen it
    assert (frame.loc[0, "fewest"], frame.loc[0, "layers"]) == (0, 4)


def test_the_paper_is_told_with_its_study():
    paper = load_paper("dyvte")
    assert study_of("dyvte").analysis is dyvte.run
    assert paper.pocket_table.id == "figure3"
    assert {c.quantity["analysis"] for c in paper.claims if c.quantity and "analysis" in c.quantity
            } == {"stages"}  # fmt: skip
