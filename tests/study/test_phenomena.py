"""Attention shares, rankings and the removal of the image against slow counterparts."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from reference import hidden_keys
from scipy.stats import kendalltau

from frugalvlm.benchmarks import asking, load_benchmark
from frugalvlm.hosts import host_for
from frugalvlm.methods import NoImageAfter
from frugalvlm.pocket.installed import save_vlm
from frugalvlm.pocket.models import build_model, build_processor
from frugalvlm.probes import phenomena
from frugalvlm.probes import plots as benchmark_plots
from frugalvlm.runs import attention
from frugalvlm.views import UnsupportedError

mpl.use("Agg")
LAYERS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = build_model("pocket-llava-tiny")
    with torch.no_grad():  # larger weights, so that attention is far from uniform
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(6)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_vlm(model, build_processor(), folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tiny):
    return asking.Batches(load_benchmark("pocket-gqa"), tiny[1], "test", 6, "cpu").batches[0][1]


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRUGALVLM_RESULTS", str(results))
        run = lambda: phenomena.run(str(folder), 12, benchmarks=["pocket-gqa"], images=5)  # noqa: E731
        first = run()
        patch.setattr(asking, "answer", None)  # a second run asks nothing
        patch.setattr(phenomena, "_decoder_shares", None)
        assert run()[0]["shares"] == first[0]["shares"]
    return first


# -- removal -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 3, LAYERS - 1])
def test_removal_equals_a_run_in_which_later_layers_may_not_see_the_image(layer, tiny, inputs):
    """One prompt with an answer: every query behind layer `layer` has the visual keys masked."""
    model, answer = tiny[0], torch.tensor([[20, 30, 40]])
    row = {k: v[:1] for k, v in inputs.items()}
    keep = row["attention_mask"][0] > 0
    row |= {name: row[name][:, keep] for name in ("input_ids", "attention_mask")}
    visual = (row["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()
    with torch.no_grad(), NoImageAfter(layer).on(model) as trace:
        out = model(**row, use_cache=True)
        steps = [out.logits[0, -1]]
        for i in range(answer.shape[1]):
            out = model(
                input_ids=answer[:, i : i + 1], past_key_values=out.past_key_values,
                attention_mask=torch.ones(1, len(row["input_ids"][0]) + i + 1, dtype=torch.long),
            )  # fmt: skip
            steps.append(out.logits[0, -1])
    assert trace.tokens_per_layer == [144.0] * layer + [0.0] * (LAYERS - layer)

    def masked(from_layer, dropped):
        features = model.get_image_features(row["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(torch.cat([row["input_ids"], answer], 1))
        embeds[0, visual] = torch.cat(list(features)).view(-1, embeds.shape[-1])
        with hidden_keys(model, dropped, from_layer):
            hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        return model.lm_head(hidden)[0, -answer.shape[1] - 1 :]

    with torch.no_grad():
        expected = masked(layer, visual)
        twins = [masked(layer - 1, visual), masked(layer + 1, visual), masked(layer, visual[1:])]
    torch.testing.assert_close(torch.stack(steps), expected, rtol=1e-3, atol=1e-3)
    for twin in twins:  # one layer earlier or later, or one visual token left
        assert (torch.stack(steps) - twin).abs().max() > 0.01


@pytest.mark.parametrize("layer", [0, LAYERS])
def test_the_image_cannot_leave_where_there_is_no_layer(layer, tiny):
    with pytest.raises(UnsupportedError, match=r"1 to 7|whole number from 1"):
        NoImageAfter(layer).on(tiny[0]).__enter__()


# -- rankings ------------------------------------------------------------------------------------


def test_tau_of_identical_and_reversed_rankings():
    scores = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40], [4, 3, 2, 1]])
    expected = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]])
    torch.testing.assert_close(phenomena.kendall_tau(scores), expected)


def test_tau_is_scipys_with_ties_too():
    scores = torch.randint(0, 12, (3, 4, 30), generator=torch.Generator().manual_seed(0)).float()
    tau = phenomena.kendall_tau(scores)
    for batch, i, j in np.ndindex(3, 4, 4):
        expected = kendalltau(scores[batch, i], scores[batch, j]).statistic
        assert float(tau[batch, i, j]) == pytest.approx(expected, abs=1e-5)


# -- attention shares ----------------------------------------------------------------------------


def test_shares_are_sums_of_the_attention_map(tiny, inputs):
    model, host = tiny[0], host_for(tiny[0])
    with torch.no_grad(), attention.eager_attention(model):
        shares, tau = phenomena._decoder_shares(host, inputs)
        maps = model(**inputs, output_attentions=True).attentions
    assert len(maps) == LAYERS
    for row, layer in ((0, 0), (4, 5)):
        ids, real = inputs["input_ids"][row].tolist(), inputs["attention_mask"][row].tolist()
        image = [i for i, t in enumerate(ids) if t == model.config.image_token_id]
        after = [i for i in range(image[-1] + 1, len(ids)) if real[i]]
        seen = maps[layer][row].mean(0)
        on_image = [sum(float(seen[q, k]) for k in image) for q in after]
        assert float(shares["text"][row, layer]) == pytest.approx(np.mean(on_image), rel=1e-4)
        assert float(shares["last"][row, layer]) == pytest.approx(on_image[-1], rel=1e-4)
        even = [len(image) / sum(real[: q + 1]) for q in after]
        assert float(shares["even"][row]) == pytest.approx(np.mean(even), rel=1e-4)
        ranks = [maps[i][row].mean(0)[after[-1], image] for i in (layer, layer + 1)]
        assert float(tau[row, layer, layer + 1]) == pytest.approx(kendalltau(*ranks)[0], abs=1e-3)
    torch.testing.assert_close(shares["neighbours"], tau.diagonal(1, 1, 2))


def test_tower_shares_count_object_patches_only(tiny, inputs):
    model, host = tiny[0], host_for(tiny[0])
    objects = torch.zeros(len(inputs["pixel_values"]), 144, dtype=torch.bool)
    objects[:, [3, 77]] = True
    with torch.no_grad(), attention.eager_attention(model):
        shares = phenomena._tower_shares(host, inputs["pixel_values"], objects)
        maps = host.tower(pixel_values=inputs["pixel_values"], output_attentions=True).attentions
    cls, all_queries = maps[1][2].mean(0)[0, 1:], maps[1][2].mean((0, 1))[1:]
    for name, row in (("cls", cls), ("received", all_queries)):
        expected = float((row[3] + row[77]) / row.sum())
        assert float(shares[name][2, 1]) == pytest.approx(expected, rel=1e-4)


def test_the_record_holds_every_picture_and_leaves_the_model_alone(made):
    record = made[0]
    shares = {name: np.asarray(values) for name, values in record["shares"].items()}
    assert shares["cls"].shape == shares["received"].shape == (5, 3)
    assert shares["text"].shape == shares["last"].shape == (5, LAYERS)
    assert shares["neighbours"].shape == (5, LAYERS - 1)
    assert np.allclose(np.diag(record["tau"]), 1, atol=1e-4)
    assert record["read_layer"] == 2, "the last but one of three layers"
    for name in ("cls", "received", "text", "last", "covered", "even"):
        assert ((shares[name] >= 0) & (shares[name] <= 1)).all(), name


def test_eager_attention_is_taken_back(tiny):
    model = tiny[0]
    before = [getattr(m.config, "_attn_implementation", None) for m in model.modules()
              if hasattr(m, "config")]  # fmt: skip
    with pytest.raises(RuntimeError, match="stop"), attention.eager_attention(model):
        raise RuntimeError("stop")
    assert before == [getattr(m.config, "_attn_implementation", None) for m in model.modules()
                      if hasattr(m, "config")]  # fmt: skip
    assert set(before) == {"sdpa"}


# -- what is said of it --------------------------------------------------------------------------


def _record(**shares):
    flat = {"covered": [0.2] * 40, "even": [0.8] * 40}
    grow = {k: np.tile(np.asarray(v, float), (40, 1)).tolist() for k, v in shares.items()}
    return {"shares": flat | grow, "read_layer": 5}


def _removal(loss, width=0.5):
    return pd.DataFrame(
        [{"benchmark": "loss", "layer": i + 1, "value": v, "low": v - width, "high": v + width,
          "n": 100} for i, v in enumerate(loss)]
    )  # fmt: skip


GOOD = {
    "cls": [0.2, 0.2, 0.3, 0.4, 0.5, 0.4],
    "text": [0.7] + [0.2] * 3 + [0.4] * 8,
    "neighbours": [0.1] + [0.8] * 10,
}
BAD = {
    "cls": [0.2, 0.5, 0.5, 0.5, 0.15, 0.5],
    "text": [0.7] + [0.4] * 3 + [0.2] * 8,
    "neighbours": [0.9, 0.9, 0.5] + [0.8] * 8,
}


def test_findings_follow_the_numbers():
    falling = [30, 20, 10, 5, 3, 1, 1, 0.5, 0.2, 0, 0, 0]
    said = phenomena.findings(_record(**GOOD), _removal(falling))
    assert all(text.startswith("Present") for text in said.values()), said
    assert "from layer 6 of 12 on" in said["exit"]
    late = [30, 1, 30, 30, 30, 20, 20, 20, 20, 10, 5, 0]  # one harmless layer is no exit
    said = phenomena.findings(_record(**BAD), _removal(late, width=0))
    assert all(text.startswith("Absent") for text in said.values()), said
    assert "still missed behind layer 11 of 12" in said["exit"]
    unused = phenomena.findings(_record(**GOOD), _removal([0.0] * 12))["exit"]
    assert unused.startswith("Absent"), "an image that nobody looks at does not leave early"


def test_stages_are_the_papers_at_its_depth():
    assert phenomena.stages(32) == (range(3), range(3, 12), range(12, 32))
    assert phenomena.stages(12) == (range(1), range(1, 4), range(4, 12))
    for layers in (3, 6, 8):
        parts = phenomena.stages(layers)
        assert all(len(part) for part in parts)
        assert [i for part in parts for i in part] == list(range(layers))


def test_removal_frame_is_paired_with_the_untouched_model(made):
    frame = phenomena.removal_frame(made)
    assert sorted(set(frame["layer"])) == list(range(1, LAYERS + 1))
    at = frame.set_index(["benchmark", "layer"])["value"]
    for layer in range(1, LAYERS + 1):
        lost = at["pocket-gqa", LAYERS] - at["pocket-gqa", layer]
        assert at["loss", layer] == pytest.approx(lost)


def test_figures_show_what_the_record_holds(made):
    record, frame = made[0], phenomena.removal_frame(made)
    tower = benchmark_plots.object_attention_plot(record)
    drawn = tower.lines[0].get_ydata()
    assert np.allclose(drawn, 100 * np.mean(record["shares"]["cls"], axis=0))
    text = benchmark_plots.stages_plot(record)
    assert len(text.lines[0].get_ydata()) == LAYERS
    bars = benchmark_plots.ranking_plot(record).axes[0].patches
    assert [b.get_height() for b in bars] == pytest.approx(
        np.mean(record["shares"]["neighbours"], axis=0)
    )
    assert len(benchmark_plots.removal_plot(frame).lines[0].get_xdata()) == LAYERS
    plt.close("all")
