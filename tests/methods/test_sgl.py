"""SGL against whole eager attention maps added up one by one, and against plausible mistakes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import decoder_attention, embeddings, hidden_keys, sgl_scores, top
from tiny_hosts import (
    HOSTS,
    KEPT,
    LAYERS,
    MANY,
    ONE,
    PATCHES,
    K,
    Picture,
    build,
    guide_for,
    model_for,
    prompt,
)
from transformers import LlamaConfig, LlamaForCausalLM

from frugalvlm import measure
from frugalvlm.engine.guidance import Guide
from frugalvlm.methods import SGL, FastV, Vanilla, VisionZip
from frugalvlm.methods.sgl import confidence, exit_score
from frugalvlm.runs.costs import flops_parts
from frugalvlm.views import BudgetError, UnsupportedError

METHOD = SGL(KEPT, K / LAYERS)
ROWS = [[3, Picture(seed), 4] for seed in range(30, 34)]
STEPS = 3  # what the tiny guide says
CLOSE = {"rtol": 1e-6, "atol": 0}
RULE = "attention of all layers and heads, rows from the last visual token on, answer included"


def eager_map(guide: Any, embeds: torch.Tensor, layer: int) -> torch.Tensor:
    """The library's own map [heads, length, length]."""
    eager = copy.deepcopy(guide.model.language_model)
    eager.set_attn_implementation("eager")
    out = eager(inputs_embeds=embeds, output_attentions=True, use_cache=False)
    return out.attentions[layer][0]


def check(scores: list[list[float]], host: str) -> None:
    """Compare scores of four prompts with the literal sums."""
    guide = guide_for(model_for(host)).model
    for row, score in zip(ROWS, scores, strict=True):
        (expected,) = sgl_scores(guide, host, row, STEPS, eager_map)
        torch.testing.assert_close(
            torch.tensor(score).double(), torch.tensor(expected).double(), **CLOSE,
            msg=lambda m: f"{RULE}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
def test_importance_is_the_sum_of_the_eager_maps(host):
    guide = guide_for(model_for(host))
    check([METHOD.importance(guide(prompt(host, [row])).attention)[0].tolist() for row in ROWS],
          host)  # fmt: skip


def twin(
    host: str, layers: slice = slice(None), steps: int = STEPS, behind: int = 0,
    prompt_rows: int = 1, all_rows: bool = False, normalise: bool = False,
) -> list[list[float]]:  # fmt: skip
    """The same sums in another code path, in which something can go wrong."""
    guide, answer = guide_for(model_for(host)).model, []
    for row in ROWS:
        embeds, ((*_, last),) = embeddings(Vanilla(), guide, host, row, [])
        length = embeds.shape[1]
        for _ in range(steps - 1):
            hidden = guide.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
            said = guide.lm_head(hidden[:, -1:]).argmax(-1)
            embeds = torch.cat([embeds, guide.get_input_embeddings()(said)], 1)
        maps = torch.stack([decoder_attention(guide, embeds, i) for i in range(2)])[layers]
        first = 0 if all_rows else last + behind
        received = maps[..., last + 1 - PATCHES : last + 1].sum((0, 1))
        asked, fed = received[first:length], received[length:]
        if normalise:
            asked, fed = asked / len(asked), fed / len(fed)
        answer.append((prompt_rows * asked.sum(0) + fed.sum(0)).tolist())
    return answer


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
def test_the_twin_is_right_without_a_mistake(host):
    with torch.no_grad():
        check(twin(host), host)


MISTAKES: dict[str, dict[str, Any]] = {
    "the last layer only": {"layers": slice(-1, None)},
    "the first layer only": {"layers": slice(0, 1)},
    "the generated tokens forgotten": {"steps": 1},
    "the prompt forgotten": {"prompt_rows": 0},
    "the last answer token counted": {"steps": STEPS + 1},
    "rows behind the last visual token": {"behind": 1},
    "visual rows counted": {"all_rows": True},
    "means instead of sums": {"normalise": True},
}


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_found(mistake, host):
    with torch.no_grad(), pytest.raises(AssertionError, match=RULE):
        check(twin(host, **MISTAKES[mistake]), host)


@pytest.mark.parametrize("host", HOSTS)
def test_a_batch_is_ranked_like_its_prompts_one_by_one(host):
    """Padding on either side, two pictures in a prompt, none in another."""
    guide = guide_for(model_for(host))
    for side in ("left", "right"):
        together = guide(prompt(host, MANY, side))
        image = 0
        for index, row in enumerate(MANY):
            alone = sgl_scores(guide.model, host, row, STEPS)
            for score in alone:
                count = together.counts[image]
                batched = METHOD.importance(together.attention)[image]
                torch.testing.assert_close(batched[:count].tolist(), score, **CLOSE)
                assert (batched[count:] < 0).all(), "padding could be kept"
                image += 1
            if alone:
                said = guide(prompt(host, [row])).answer
                assert together.answer[index].tolist() == said[0].tolist()
        assert image == len(together.counts)


def test_sources_and_layers_of_the_ablations():
    """Four visual tokens, two layers; each knob changes the sum as the tables of the paper say."""
    last, asked, fed = [1.0, 0, 0, 0], [1.0, 2, 0, 0], [0.0, 0, 3, 0]
    layer = torch.tensor([last, asked, fed])[:, None]
    attention = torch.stack([layer, 10 * layer])

    def importance(**knobs: Any) -> list[float]:
        return SGL(2, 0.5, **knobs).importance(attention)[0].tolist()

    assert importance() == [11, 22, 33, 0]
    assert importance(queries="prompt") == [11, 22, 0, 0]
    assert importance(queries="generated") == [0, 0, 33, 0]
    assert importance(queries="last_prompt") == [11, 0, 0, 0]
    assert importance(guide_to=0.5) == [1, 2, 3, 0]
    assert importance(guide_to=0.1) == [1, 2, 3, 0], "at least one layer"
    assert importance(guide_from=0.5) == importance(guide_from=1.0) == [10, 20, 30, 0]


def test_an_answer_counts_up_to_its_end():
    """Rows end at different times; what a finished row is fed afterwards counts for nothing."""
    host = "llava_clip"
    rows, original = [ROWS[0], ROWS[1]], guide_for(model_for(host))
    small = copy.deepcopy(original.model)
    free = original(prompt(host, rows)).answer
    small.generation_config.eos_token_id = int(free[0, 1])
    assert free[0, 1] != free[0, 0]
    assert free[0, 1] not in free[1], "choose other prompts"
    found = Guide(small, max_new_tokens=STEPS)(prompt(host, rows))
    assert found.valid.tolist() == [[True, True, False], [True, True, True]]
    assert (found.log_probs[0, 2:] == 0).all()
    for index, steps in enumerate((2, STEPS)):
        (expected,) = sgl_scores(small, host, rows[index], steps)
        torch.testing.assert_close(
            METHOD.importance(found.attention)[index].tolist(), expected, **CLOSE
        )


# -- early exit ------------------------------------------------------------------------------------


def answered(host: str, row: list, dropped: list[int], from_layer: int = 0) -> list[float]:
    """Probabilities of the guide's answer, read off the whole model with hidden keys."""
    guide = guide_for(model_for(host))
    answer = guide(prompt(host, [row])).answer
    embeds, _ = embeddings(Vanilla(), guide.model, host, row, [])
    said = guide.model.get_input_embeddings()(answer[:, :-1])
    with hidden_keys(guide.model, dropped, from_layer), torch.no_grad():
        decoder = guide.model.model.language_model
        hidden = decoder(inputs_embeds=torch.cat([embeds, said], 1), use_cache=False)[0]
        p = guide.model.lm_head(hidden)[0, -STEPS:].softmax(-1)
    return [float(p[i, token]) for i, token in enumerate(answer[0])]


@pytest.mark.parametrize("host", ["llava_clip", "llava_gqa", "llava_next"])
def test_scores_of_the_exit(host):
    guide, share = guide_for(model_for(host)), 0.2
    rows = [ROWS[0], [1, Picture(8, 32, 48), 2]]
    found = guide(prompt(host, rows))
    ranking = METHOD.importance(found.attention)
    sure = confidence(found.log_probs, found.valid)
    stable = guide.consistency(found, ranking, share)
    for index, row in enumerate(rows):
        whole = answered(host, row, [])
        mean = (whole[0] * whole[1] * whole[2]) ** (1 / 3)
        assert float(sure[index]) == pytest.approx(mean, rel=1e-5)
        _, (places,) = embeddings(Vanilla(), guide.model, host, row, [])
        score = ranking[index, : len(places)].tolist()
        stays = top(score, int(share * len(places)))
        dropped = [p for i, p in enumerate(places) if i not in stays]
        a, b, c = answered(host, row, dropped)
        assert float(stable[index]) == pytest.approx(a * b * c, rel=1e-5)
        assert float(exit_score(sure, stable)[index]) == pytest.approx((mean + a * b * c) / 2)
        wrong = {
            "length-normalised": (a * b * c) ** (1 / 3),
            "nothing dropped": float(torch.tensor(whole).prod()),
            "dropped after the first layer": float(
                torch.tensor(answered(host, row, dropped, from_layer=1)).prod()
            ),
            "the lowest ranked kept": float(
                torch.tensor(answered(host, row, [places[i] for i in stays])).prod()
            ),
        }
        for mistake, value in wrong.items():
            assert float(stable[index]) != pytest.approx(value, rel=1e-4), mistake


# -- the method ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "layer", "share"), [(400, 19, 0.6375), (200, 9, 0.35), (50, 2, 0.0896)]
)
def test_budgets_of_the_paper(kept, layer, share):
    """Table 1 on 48 layers: 64, 35 and 9 % on average."""
    method = SGL.for_budget(kept, 1000)
    assert method.layers(48) == (layer,)
    assert (layer + (48 - layer) * kept / 1000) / 48 == pytest.approx(share, abs=5e-5)


def test_the_cut_leaves_a_layer_on_either_side():
    assert SGL.for_budget(7, 144).layers(12) == (1,)
    assert SGL.for_budget(29, 144).layers(12) == (2,)
    assert SGL.for_budget(58, 144).layers(12) == (4,)
    assert SGL.for_budget(144, 144).layers(12) == (11,)


def test_a_mean_over_layers_as_budget():
    for mean in (13, 19, 50, 92, 144):
        method = SGL.for_mean(mean, 144, 12)
        above = SGL.for_budget(min(method.kept_tokens + 1, 144), 144)

        def total(m):
            (cut,) = m.layers(12)
            return cut * 144 + (12 - cut) * m.kept_tokens

        assert total(method) <= 12 * mean
        assert total(above) > 12 * mean or mean == 144
    assert SGL.for_mean(19, 144, 12).kept_tokens == 7  # 144 + 11 * 7 = 221 of 228
    with pytest.raises(BudgetError, match="at least 13"):
        SGL.for_mean(12, 144, 12)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_guide_is_asked_once_per_prompt(use_cache, monkeypatch):
    model, calls = model_for("llava_clip"), []
    guide, forward = guide_for(model), Guide.forward
    monkeypatch.setattr(Guide, "forward", lambda *args: (calls.append(1), forward(*args))[1])
    with SGL(KEPT, 0.5, guide=guide).on(model):
        model.generate(**prompt("llava_clip"), max_new_tokens=4, use_cache=use_cache)
        assert calls == [1]
        model(**prompt("llava_clip"))
        assert calls == [1, 1]


def test_the_guides_work_is_counted():
    model, inputs = model_for("llava_clip"), prompt("llava_clip")
    guide = guide_for(model)
    alone = measure.count_flops(lambda: guide(inputs)).total
    with FastV(KEPT, K).on(model), torch.no_grad():
        pruned = measure.count_flops(lambda: model(**inputs))
        expected = flops_parts(model, pruned)
    with SGL(KEPT, K / LAYERS, guide=guide).on(model), torch.no_grad():
        counted = measure.count_flops(lambda: model(**inputs))
        parts = flops_parts(model, counted)
    assert parts["guide"] == alone > 0
    assert sum(parts.values()) == counted.total
    # FastV's own row of attention is computed inside the decoder, SGL has none there.
    assert 0.9 * expected["decoder"] < parts["decoder"] <= expected["decoder"]
    assert parts["tower"] == expected["tower"]
    assert "guide" not in expected


def test_a_record_names_the_guide_and_holds_no_weights():
    method = SGL.for_budget(KEPT, PATCHES).guided_by(
        guide_for(model_for("llava_clip")).model, "x@1"
    )
    assert method.describe() == {
        "method": "sgl", "kept_tokens": KEPT, "depth": KEPT / PATCHES, "queries": "both",
        "guide_from": 0.0, "guide_to": 1.0, "guide": "x@1",
    }  # fmt: skip
    assert SGL(6, 0.5).describe()["guide"] is None


# -- what is refused, before anything is computed --------------------------------------------------


def refused(method: SGL, model: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message), method.on(model):
        pass


def test_a_missing_or_foreign_guide_is_named():
    model = model_for("llava_clip")
    refused(METHOD, model, r"needs a small model.*guided_by\(small_model\)")
    refused(METHOD.guided_by(model), model, r"copy\.deepcopy")
    words = build("llava_clip")
    words.resize_token_embeddings(80)
    refused(METHOD.guided_by(words), model, "tokenizer is another one: 80 entries.*same family")
    pixels = build("llava_clip")
    pixels.config.vision_config.image_size *= 2
    refused(METHOD.guided_by(pixels), model, "64 tokens per crop.*the model 16 tokens per crop")
    refused(METHOD.guided_by(build("llava_next")), model, "llava_next")
    text = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       num_attention_heads=2)  # fmt: skip
    with pytest.raises(UnsupportedError, match="Known families"):
        METHOD.guided_by(LlamaForCausalLM(text)).on(model).__enter__()


def test_a_copy_may_guide():
    """The oracle of Table 2: the large model's own attention, of all layers."""
    model = model_for("llava_clip")
    with METHOD.guided_by(copy.deepcopy(model)).on(model) as trace, torch.no_grad():
        model(**prompt("llava_clip"))
    assert len(trace.kept[0]) == KEPT


@pytest.mark.parametrize(
    "knobs",
    [{"queries": "all"}, {"depth": 1.5}, {"depth": -0.1}, {"guide_from": 0.6, "guide_to": 0.5}],
)
def test_knobs_out_of_range(knobs):
    with pytest.raises(UnsupportedError, match="is impossible: "):
        SGL(**{"kept_tokens": KEPT, "depth": 0.5, **knobs})
    model = model_for("llava_clip")
    with pytest.raises(BudgetError), SGL(PATCHES + 1, 0.5, guide=guide_for(model)).on(model):
        pass


def test_prompts_that_the_guide_cannot_read():
    model, inputs = model_for("llava_clip"), prompt("llava_clip", ONE)
    method = SGL(KEPT, 0.5, guide=guide_for(model))
    length = inputs["input_ids"].shape[1]
    square = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with method.on(model), pytest.raises(UnsupportedError, match="2-D mask"):
        model(**{**inputs, "attention_mask": square})
    foreign = pytest.raises(UnsupportedError, match="no other method before sgl")
    with VisionZip(8, 2).on(model), method.on(model), foreign:
        model(**inputs)
