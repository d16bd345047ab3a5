"""Labels, pixels and symbolic pictures say what the scene's record says."""

import numpy as np
import pytest
import torch

from frugalvlm.pocket.models import build_model, build_processor, build_tokenizer
from frugalvlm.pocket.objectives import (
    InstructObjective,
    LanguageObjective,
    Scaffold,
    VisualWords,
    patch_labels,
    pixel_values,
    scene_labels,
)
from frugalvlm.pocket.scenes import COLORS, KINDS, draw, make_scene


def test_pixels_are_those_of_the_processor():
    scene = make_scene("test", 8)
    given = build_processor()(images=scene.image(), text="<image>", return_tensors="pt")
    torch.testing.assert_close(pixel_values([draw(scene)]), given.pixel_values, atol=1e-5, rtol=0)


def _words_at(scene, row, col):
    """What covers the centre of a patch, in words: a slow look at the scene's record."""
    x, y = 8 * col + 4, 8 * row + 4
    third = {0: ("top", "left"), 1: ("middle", "middle"), 2: ("bottom", "right")}
    vertical, horizontal = third[row // 4][0], third[col // 4][1]
    place = "center" if vertical == horizontal == "middle" else f"{vertical} {horizontal}"
    for t in scene.things:
        if t.x < x < t.x + t.size and t.y < y < t.y + t.size:
            return f"{t.color} {t.kind} {place}"
    if (plate := scene.plate) is not None and plate.y < y < plate.y + plate.size[1]:
        at = (x - plate.x - 3) / 16
        if 0 < at < len(plate.number) and at % 1:  # on the border of two digits there is neither
            return f"plate {plate.number[int(at)]} {place}"
    return f"nothing {place}"


@pytest.mark.parametrize("seed", range(6))
def test_a_symbolic_patch_is_the_sum_of_its_words(seed):
    torch.manual_seed(0)
    tokenizer, scene = build_tokenizer(), make_scene("train", seed)
    words = torch.randn(len(tokenizer), 16)
    visual = VisualWords(tokenizer, 16)
    kinds, colors = (torch.from_numpy(a)[None] for a in patch_labels(scene))
    features = visual(words, kinds, colors)[0].detach()
    for row in range(12):
        for col in range(12):
            said = tokenizer(_words_at(scene, row, col), add_special_tokens=False).input_ids
            expected = words[said].sum(0) + visual.row.weight[row] + visual.col.weight[col]
            torch.testing.assert_close(features[12 * row + col], expected.detach())


def test_scenes_with_things_and_plates_are_among_those_looked_at():
    scenes = [make_scene("train", seed) for seed in range(6)]
    assert any(s.plate for s in scenes)
    assert any(not s.plate for s in scenes)
    assert any(len(s.things) > 2 for s in scenes)


@pytest.mark.parametrize("seed", range(3))
def test_scene_labels_name_every_coloured_kind_and_plate_digit(seed):
    scene = make_scene("train", seed)
    present = scene_labels(scene)
    pairs = [(kind, color) for kind in KINDS for color in COLORS]
    named = {pairs[i] for i in np.flatnonzero(present[: len(pairs)])}
    assert named == {(t.kind, t.color) for t in scene.things}
    digits = {str(i) for i in np.flatnonzero(present[len(pairs) :])}
    assert digits == set(scene.plate.number if scene.plate else "")


class _Captured(LanguageObjective):
    """Keeps the features instead of asking about them."""

    def _loss(self, features, packs, rng):
        self.features = features
        return features.sum(), {}


def test_language_shows_everything_covered_and_some_ground_in_reading_order():
    torch.manual_seed(0)
    tokenizer, model = build_tokenizer(), build_model("pocket-llava-tiny")
    scaffold = Scaffold(model, tokenizer)
    objective = _Captured(model, scaffold, tokenizer, 4)
    scenes = [make_scene("train", seed, most) for seed, most in ((3, 1), (4, 5), (5, 5))]
    lengths = set()
    for seed in range(8):
        objective(scenes, np.random.default_rng(seed))
        lengths.add(objective.features.shape[1])
        for scene, shown in zip(scenes, objective.features, strict=True):
            kinds, colors = (torch.from_numpy(a)[None] for a in patch_labels(scene))
            patches = scaffold.words(model.get_input_embeddings().weight, kinds, colors)[0]
            # Patches are all different (row and column codes), so a feature names its patch.
            at = torch.cdist(shown, patches).argmin(1)
            torch.testing.assert_close(shown, patches[at])
            assert (at.diff() > 0).all(), "in order, none twice"
            covered = set(np.flatnonzero(kinds[0].numpy() != len(KINDS)))
            assert covered <= set(at.tolist())
    assert len(lengths) > 4, "prompts of many lengths"
    assert max(lengths) <= 144


def test_large_scenes_are_never_symbolic():
    # The symbolic picture describes one crop; of a large scene it would tell a quarter.
    torch.manual_seed(0)
    model, tokenizer = build_model("pocket-llava-hd"), build_tokenizer()
    learns = InstructObjective(model, Scaffold(model, tokenizer), tokenizer, 2)
    learns.text_share = 1.0

    def symbolic(scenes, rng):
        raise AssertionError("asked for a symbolic picture")

    learns.language = symbolic
    learns([make_scene("train", 1, side=192)], np.random.default_rng(0))
    with pytest.raises(AssertionError, match="symbolic"):
        learns([make_scene("train", 1)], np.random.default_rng(0))
