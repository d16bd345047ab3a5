"""Many packed questions about a picture give the loss of as many separate prompts."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from frugalvlm.pocket import packing
from frugalvlm.pocket.models import build_model, build_processor, build_tokenizer
from frugalvlm.pocket.objectives import Encoder, draw, pixel_values
from frugalvlm.pocket.packing import Slots, answer_loss, packed_attention
from frugalvlm.pocket.questions import describe, training_questions
from frugalvlm.pocket.scenes import make_scene


@pytest.fixture(scope="module")
def tiny():
    """Fresh weights, but for attention that picks: so positions and neighbours would matter."""
    torch.manual_seed(0)
    model = build_model("pocket-llava-tiny").double().eval()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight *= 30
            layer.self_attn.k_proj.weight *= 30
    return model


@pytest.fixture(scope="module")
def asked():
    """Two pictures with unequal numbers of questions, one of them a long description."""
    scenes = [make_scene("train", i) for i in (3, 5)]
    rng = np.random.default_rng(0)
    questions = [training_questions(s, rng, n) for s, n in zip(scenes, (3, 6), strict=True)]
    questions[0].append(describe(scenes[0], rng))
    return scenes, questions


@torch.no_grad()
def _packed(model, scenes, questions, offsets=None):
    encode = Encoder(build_tokenizer())
    packs = [[encode(q.text, q.answer) for q in items] for items in questions]
    pixels = pixel_values([draw(s) for s in scenes]).double()
    features = torch.stack(list(model.get_image_features(pixels).pooler_output))
    return answer_loss(model, features, encode.head, encode.tail, packs, offsets)


@torch.no_grad()
def _separate(model, scenes, questions, offsets=None, power=-0.5):
    """Every question as a prompt of its own, through the public processor and forward."""
    processor = build_processor()
    losses, weights, right = [], [], []
    for b, (scene, items) in enumerate(zip(scenes, questions, strict=True)):
        for i, q in enumerate(items):
            text = f"USER: <image>\n{q.text} ASSISTANT:"
            inputs = processor(images=scene.image(), text=text, return_tensors="pt")
            answer = processor.tokenizer(q.answer, add_special_tokens=False).input_ids
            answer = torch.tensor([[*answer, processor.tokenizer.eos_token_id]])
            ids = torch.cat([inputs.input_ids, answer], 1)
            positions = torch.arange(ids.shape[1])[None]
            if offsets is not None:
                last_patch = int((ids[0] == model.config.image_token_id).nonzero().max())
                positions[:, last_patch + 1 :] += int(offsets[b, i])
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=positions,
                pixel_values=inputs.pixel_values.double(),
            ).logits[0, inputs.input_ids.shape[1] - 1 : -1]
            losses.append(F.cross_entropy(logits, answer[0], reduction="none"))
            weights.append(torch.full_like(losses[-1], answer.shape[1] ** power))
            right.append((logits.argmax(-1) == answer[0]).double())
    weight = torch.cat(weights)
    return (torch.cat(losses) * weight).sum() / weight.sum(), torch.cat(right).mean()


def test_packed_loss_equals_separate_prompts(tiny, asked):
    loss, log = _packed(tiny, *asked)
    expected, right = _separate(tiny, *asked)
    # The packed path takes the cross-entropy of float32 logits.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(log["tokens_right"].double(), right, rtol=1e-6, atol=0)
    every_token_alike, _ = _separate(tiny, *asked, power=0.0)
    assert abs(every_token_alike / expected - 1) > 1e-4, "the case must tell weights apart"


def test_an_offset_shifts_the_positions_of_question_and_answer(tiny, asked):
    offsets = torch.tensor([[7, 0, 120, 31, 0, 0], [3, 64, 0, 1, 99, 12]])
    loss, _ = _packed(tiny, *asked, offsets)
    expected, _ = _separate(tiny, *asked, offsets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    unshifted, _ = _separate(tiny, *asked)
    assert abs(unshifted / expected - 1) > 1e-4, "the case must tell positions apart"


def _answer_logits(model, other, features):
    """Logits that predict the answer of a question packed behind a shorter one."""
    asked = ([20, 21, 22, 23, 24], [25, 26, 3])
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out))
    with torch.no_grad():
        answer_loss(model, features, [2, 6], [], [[other, asked]])
    hook.remove()
    return rows[0][-3:]


def _causal_twin(module, query, key, value, attention_mask, scaling, slots, **_):
    """The wrong twin: ordinary causal attention over the packed sequence."""
    return packing._causal(query, key, value, scaling).transpose(1, 2), None


def test_packed_questions_do_not_see_each_other(tiny, monkeypatch):
    features = torch.randn(1, 9, 64, dtype=torch.float64, generator=torch.manual_seed(0))
    others = ([7, 8, 9], [10, 3]), ([11, 12, 13], [14, 3])
    a, b = (_answer_logits(tiny, other, features) for other in others)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    unlike = _answer_logits(tiny, others[0], features.flip(1))
    assert (unlike - a).abs().max() > 1e-4, "they do see the picture"
    monkeypatch.setitem(AttentionInterface._global_mapping, packing.ATTENTION, _causal_twin)
    a, b = (_answer_logits(tiny, other, features) for other in others)
    assert (a - b).abs().max() > 1e-4


def test_slots_follow_each_other():
    slots = Slots(prefix=10, lengths=(4, 4, 8))
    assert (slots.total, slots.starts) == (26, (10, 14, 18))
    assert list(slots.groups()) == [(2, 4), (1, 8)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_own_attention_is_back_afterwards(asked, implementation):
    torch.manual_seed(1)
    model = build_model("pocket-llava-tiny").eval()
    model.set_attn_implementation(implementation)
    decoder = model.model.language_model
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with packed_attention(decoder):
            inside = decoder(input_ids=ids, slots=Slots(4, (6,)), use_cache=False)
        assert inside.last_hidden_state.isfinite().all()
        with pytest.raises(ZeroDivisionError), packed_attention(decoder):
            1 / 0  # noqa: B018
        after = model(input_ids=ids).logits
    assert decoder.config._attn_implementation == implementation
    assert torch.equal(before, after)
