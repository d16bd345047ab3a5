"""The packed loss equals separate prompts, and labels say what the picture shows."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from frugalvlm.pocket.models import build_model, build_processor, build_tokenizer
from frugalvlm.pocket.objectives import packed_question_loss, patch_labels, pixel_values
from frugalvlm.pocket.questions import training_questions
from frugalvlm.pocket.recipe import QuestionEncoder
from frugalvlm.pocket.scenes import KINDS, draw, make_scene


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_model("pocket-llava-tiny").double().eval()


def _separate_loss(model, processor, scenes, questions):
    """Every question as a prompt of its own, through the public processor and forward."""
    losses = []
    for scene, items in zip(scenes, questions, strict=True):
        for q in items:
            text = f"USER: <image>\n{q.text} ASSISTANT:"
            inputs = processor(images=scene.image(), text=text, return_tensors="pt")
            answer = processor.tokenizer(q.answer, add_special_tokens=False).input_ids
            answer = torch.tensor([[*answer, processor.tokenizer.eos_token_id]])
            ids = torch.cat([inputs.input_ids, answer], 1)
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=inputs.pixel_values.double(),
            ).logits[0, inputs.input_ids.shape[1] - 1 : -1]
            losses.append(F.cross_entropy(logits, answer[0], reduction="none"))
    return torch.cat(losses).mean()


def test_packed_loss_equals_separate_prompts(tiny):
    scenes = [make_scene("train", i) for i in (3, 5)]
    questions = [
        training_questions(s, np.random.default_rng(0), n)
        for s, n in zip(scenes, (5, 9), strict=True)
    ]
    encode = QuestionEncoder(build_tokenizer())
    packs = [[encode(q.text, q.answer) for q in items] for items in questions]
    pixels = pixel_values([draw(s) for s in scenes]).double()
    with torch.no_grad():
        loss, _ = packed_question_loss(tiny, pixels, encode.prefix, packs, train_tower=False)
        expected = _separate_loss(tiny, build_processor(), scenes, questions)
    # The packed path keeps logits in float32.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_packed_questions_do_not_see_each_other(tiny):
    scene = make_scene("train", 5)
    encode = QuestionEncoder(build_tokenizer())
    pixels = pixel_values([draw(scene)]).double()
    first = encode("what color is the square?", "orange")
    losses = []
    for other in ("how many things are there?", "what is at the top left?"):
        packs = [[encode(other, "4"), first]]
        rows = []
        hook = tiny.lm_head.register_forward_hook(lambda m, a, out, rows=rows: rows.append(out))
        packed_question_loss(tiny, pixels, encode.prefix, packs, train_tower=False)
        hook.remove()
        losses.append(rows[0][-len(first[1]) :])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)


def test_pixels_are_those_of_the_processor():
    scene = make_scene("test", 8)
    given = build_processor()(images=scene.image(), text="<image>", return_tensors="pt")
    torch.testing.assert_close(pixel_values([draw(scene)]), given.pixel_values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_patch_labels_lie_on_things(seed):
    scene = make_scene("train", seed)
    kind, _ = patch_labels(scene)
    kind = kind.reshape(12, 12)
    for t in scene.things:
        row, col = (t.y + t.size // 2) // 8, (t.x + t.size // 2) // 8
        assert kind[row, col] == KINDS.index(t.kind)
    if scene.plate is None:
        covered = sum((t.size / 8) ** 2 for t in scene.things)
        assert 0.5 * covered < (kind != len(KINDS)).sum() < 1.6 * covered
