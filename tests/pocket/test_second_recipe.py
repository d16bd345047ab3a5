"""The second recipe: what each stage sees and trains, and that it goes on where it stopped."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from frugalvlm.pocket.objectives import crops
from frugalvlm.pocket.packing import answer_loss, answered_right
from frugalvlm.pocket.recipe import read_log
from frugalvlm.pocket.scenes import COLORS, KINDS
from frugalvlm.pocket.second import recipe
from frugalvlm.pocket.second.models import build_model, build_processor, build_tokenizer, spec
from frugalvlm.pocket.second.objectives import (
    REGIONS,
    STORY_TOKENS,
    UNKNOWN,
    Asking,
    Codes,
    PictureObjective,
    Scaffold,
    Sight,
    regions,
    tags,
    visual_features,
)
from frugalvlm.pocket.second.recipe import Stage, Whole, scenes_of, train, trained_parts
from frugalvlm.pocket.second.scenes import draw, make_scene
from frugalvlm.pocket.second.watch import Exam, answers, removal_curve

NAME = "pocket-llava-tiny"
PLAN = (
    Stage("text", 2, 2, 2e-3, 1, 3),
    Stage("tower", 2, 2, 2e-3, 1),
    Stage("align", 2, 2, 2e-3, 1, 3),
    Stage("instruct", 2, 2, 2e-3, 1, 3, decoder_rate=0.5),
)
TOKENIZER = build_tokenizer()


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(NAME).eval()


def _whole() -> Whole:
    model = _model()
    return Whole(model, Scaffold(model, TOKENIZER))


def _checkpoint(folder):
    return load_file(folder / json.loads((folder / "progress.json").read_text())["model"])


def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path) -> None:
    train(NAME, tmp_path / "whole", PLAN)
    for _ in range(sum(s.steps for s in PLAN)):
        train(NAME, tmp_path / "torn", PLAN, stop_after=1)
    train(NAME, tmp_path / "torn", PLAN)
    whole, torn = _checkpoint(tmp_path / "whole"), _checkpoint(tmp_path / "torn")
    assert all(torch.equal(whole[key], torn[key]) for key in whole)
    curves = [list(read_log(tmp_path / name)) for name in ("whole", "torn")]
    assert curves[0][-1] == curves[1][-1]


def test_a_run_starts_from_given_weights_once(tmp_path) -> None:
    train(NAME, tmp_path / "first", PLAN[:1])
    start = next((tmp_path / "first").glob("model-*.safetensors"))
    kept = load_file(start)
    whole = train(NAME, tmp_path / "second", PLAN[1:2], start=start, seed=3)
    own = whole.state_dict()
    same = [torch.equal(own[k], v) for k, v in kept.items() if "language_model" in k]
    assert same
    assert all(same)


@pytest.mark.parametrize("stage", PLAN, ids=[s.name for s in PLAN])
def test_a_stage_moves_its_own_parts_only(stage, tmp_path) -> None:
    before = {k: v.clone() for k, v in _whole().state_dict().items()}
    start = tmp_path / "start.safetensors"
    save_file(before, start)
    after = train(NAME, tmp_path, [stage], start=start).state_dict()
    moved = {k for k, v in before.items() if not torch.equal(v, after[k])}
    parts = {
        "text": ("language_model", "lm_head"),
        "tower": ("vision_tower", "scaffold"),
        "align": ("multi_modal_projector",),
        "instruct": ("language_model", "lm_head", "multi_modal_projector"),
    }[stage.name]
    assert moved
    assert all(any(part in key for part in parts) for key in moved), moved
    assert all(any(part in key for key in moved) for part in parts)


def test_recipes_are_for_known_models_and_go_through_all_stages() -> None:
    for name, stages in recipe.STAGES.items():
        assert spec(name).name == name
        assert [s.name for s in stages] == ["text", "tower", "align", "instruct"]
        assert not any(s.coded or s.frozen_layers for s in stages)


def test_frozen_layers_stay_and_the_others_do_not() -> None:
    whole = _whole()
    trained_parts(whole, Stage("instruct", 1, 1, 1e-3, 1, frozen_layers=1))
    grads = [
        {p.requires_grad for p in layer.parameters()}
        for layer in whole.model.model.language_model.layers
    ]
    assert grads == [{False}, {True}, {True}, {True}]
    trained_parts(whole, Stage("instruct", 1, 1, 1e-3, 1))
    assert all(p.requires_grad for p in whole.model.model.language_model.parameters())


def test_the_decoder_has_its_own_rate() -> None:
    whole, stage = _whole(), Stage("instruct", 1, 1, 1e-3, 1, decoder_rate=0.25)
    optimizer = recipe.StageOptimizer(trained_parts(whole, stage), stage)
    optimizer.set_learning_rate(1e-3)
    rates = {
        key: {g["lr"] for half in part.parts for g in half.param_groups}
        for key, part in optimizer.parts.items()
    }
    assert rates == {"projector": {1e-3}, "decoder": {2.5e-4}, "head": {2.5e-4}}


def test_matrices_of_layers_are_with_muon() -> None:
    for stage in PLAN:
        trained = trained_parts(_whole(), stage)
        optimizer = recipe.StageOptimizer(trained, stage)
        for name, parameter in trained.named_parameters():
            part = optimizer.parts[name.split(".")[0]]
            inside = ".layers." in name and parameter.ndim == 2
            assert (id(parameter) in part.in_muon) == inside, name


def test_stages_share_no_scene_and_print_is_rare() -> None:
    stage = Stage("text", 4, 24, 1e-3, 1, things=(1, 4))
    seen = [s for number in range(2) for step in range(4) for s in scenes_of(stage, number, step)]
    assert len({s.seed for s in seen}) == len(seen)
    assert 0 < sum(s.plate is not None for s in seen) < len(seen) / 6
    assert all(len(s.things) <= 1 for s in scenes_of(stage, 0, 0)[::2])
    coded = scenes_of(Stage("align", 4, 24, 1e-3, 1, coded=True), 0, 0)
    assert all(s.things for s in coded)


def test_pixels_are_those_of_the_processor() -> None:
    scene = make_scene("dev", 8)
    given = build_processor(NAME)(images=scene.image(), text="<image>", return_tensors="pt")
    model = _model()
    direct = model.get_image_features(given.pixel_values).pooler_output
    with torch.no_grad():
        own = visual_features(model, [scene])
    torch.testing.assert_close(own, torch.stack(list(direct)), atol=1e-4, rtol=1e-4)


def test_hidden_scenes_show_nothing() -> None:
    model = _model()
    scenes = [make_scene("train", seed) for seed in range(3)]
    hidden = np.array([False, True, True])
    asking = Asking(model, TOKENIZER, 3)
    with torch.no_grad():
        seen = visual_features(model, scenes, hidden)
        told = asking.stories(scenes, np.random.default_rng(0), hidden)
        codes = Codes(16)(scenes, hidden)
    for features in (seen, told, codes):
        assert torch.allclose(features[1], features[2])
        assert not torch.allclose(features[0], features[1])
    assert told.shape[1] == STORY_TOKENS


def test_no_code_of_a_patch_tells_the_kind() -> None:
    """Patches of different kinds are equal on one diagonal: half of a kind is not a kind."""
    from frugalvlm.pocket.scenes import Thing
    from frugalvlm.pocket.second.scenes import SecondScene

    def patches(kind: str) -> torch.Tensor:
        thing = Thing(kind, "red", 0, 0, 0, 0, 16)
        coded = Codes(16)([SecondScene("train", 0, (thing,), None)], np.array([False]))
        return coded[0].unflatten(0, (12, 12))[:2, :2].flatten(0, 1)

    coded = {kind: patches(kind) for kind in KINDS}
    for kind in KINDS:
        for patch in range(4):
            twins = [k for k in KINDS if torch.equal(coded[k][patch], coded[kind][patch])]
            assert len(twins) > 1
        assert [k for k in KINDS if torch.equal(coded[k], coded[kind])] == [kind]


def test_keywords_are_of_the_whole_picture() -> None:
    scene = make_scene("train", 1)
    named = {t.kind for t in scene.things} | {t.color for t in scene.things}
    assert tags(scene).sum() == len(named)
    assert tags(make_scene("train", 1, printed=True)).sum() == len(
        set(make_scene("train", 1, printed=True).plate.number)
    )


def test_a_text_stands_in_now_and_then() -> None:
    objective = PictureObjective(_model(), TOKENIZER, 2, text_share=1.0)
    _, log = objective([make_scene("train", 0)], np.random.default_rng(0))
    assert set(log) == {"text_tokens_right"}
    objective.text_share = 0.0
    _, log = objective([make_scene("train", 0)], np.random.default_rng(0))
    assert set(log) == {"tokens_right"}


def _greedy(model, features, encode, asked, length):
    """Slow: one question, one token after another, over the whole prompt."""
    embed = model.get_input_embeddings()
    ids = [*asked]
    for _ in range(length):
        parts = [embed(torch.tensor(encode.head)), features, embed(torch.tensor(encode.tail + ids))]
        logits = model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(asked) :]


@torch.no_grad()
def test_right_means_that_greedy_decoding_gives_the_answer() -> None:
    model, scene = _model().double(), make_scene("dev", 3)
    asking = Asking(model, TOKENIZER, 2)
    features = visual_features(model.float(), [scene]).double()
    model.double()
    ask = asking.encode("where is the circle?", "red")[0]
    for length in (1, 3):
        said = _greedy(model, features[0], asking.encode, ask, length)
        wrong = [*said[:-1], (said[-1] + 1) % 50]
        marks = answered_right(
            model, features, asking.encode.head, asking.encode.tail,
            [[(ask, said), (ask, wrong)]],
        )  # fmt: skip
        assert marks == [[True, False]]


@torch.no_grad()
def test_hiding_the_picture_behind_a_layer_equals_taking_it_away() -> None:
    """The packed shortcut and the surgery on whole prompts say the same."""
    from frugalvlm.methods import NoImageAfter

    model, processor, scene = _model(), build_processor(NAME), make_scene("dev", 3)
    asking = Asking(model, TOKENIZER, 2)
    text = "USER: <image>\nwhere is the circle? ASSISTANT:"
    inputs = processor(images=scene.image(), text=text, return_tensors="pt")
    ask = asking.encode("where is the circle?", "red")[0]
    for layer in (1, 3):
        with NoImageAfter(layer).on(model):
            said = int(model(**inputs).logits[0, -1].argmax())
        packed = [[(ask, [said]), (ask, [(said + 1) % 50])]]
        head, tail = asking.encode.head, asking.encode.tail
        features = visual_features(model, [scene])
        assert answered_right(model, features, head, tail, packed, range(layer)) == [[True, False]]


@torch.no_grad()
def test_what_a_text_may_not_see_changes_nothing() -> None:
    """Other pictures change the answers' logits in layers that see them, and in no others."""
    model = _model()
    asking = Asking(model, TOKENIZER, 2)
    packs = [[asking.encode("where is the circle?", "red")]]
    scenes = [make_scene("dev", 3), make_scene("dev", 4)]
    pictures = [visual_features(model, [scene]) for scene in scenes]

    def loss(picture, sight) -> float:
        head, tail = asking.encode.head, asking.encode.tail
        return float(answer_loss(model, picture, head, tail, packs, None, sight)[0])

    assert loss(pictures[0], range(0)) == loss(pictures[1], range(0))
    assert loss(pictures[0], range(1, 4)) != loss(pictures[0], range(4))
    assert loss(pictures[0], range(3)) != loss(pictures[0], range(4))
    assert loss(pictures[0], range(4)) == loss(pictures[0], None)


def test_sight_is_drawn_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    drawn = [Sight(0.7, 0.3).draw(12, rng) for _ in range(2000)]
    assert {(r.start, r.stop) for r in drawn} == {(0, 12), (3, 12), (0, 9), (3, 9)}
    assert np.mean([r.start == 3 for r in drawn]) == pytest.approx(0.7, abs=0.04)
    assert np.mean([r.stop == 9 for r in drawn]) == pytest.approx(0.3, abs=0.04)


def test_regions_hold_their_things_whole() -> None:
    """Every pixel of a thing, or of a digit of print, lies on patches of its region."""
    for seed in range(30):
        scene = make_scene("train", seed)
        inside, labels = regions(scene)
        asked = [i for i in range(REGIONS) if labels[i, 0] not in (UNKNOWN, len(KINDS))]
        assert len(asked) == len(scene.things)
        for i, thing in zip(asked, scene.things, strict=True):
            assert labels[i, 0] == KINDS.index(thing.kind)
            assert labels[i, 1] == list(COLORS).index(thing.color)
            grid = inside[i].reshape(12, 12).repeat(8, 0).repeat(8, 1)
            assert grid[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size].all()
            assert inside[i].sum() == 16
    printed = make_scene("train", 1, printed=True)
    inside, labels = regions(printed)
    assert [KINDS[k] for k in labels[:, 0] if k != UNKNOWN] == list(printed.plate.number)
    width, height = printed.plate.size
    box = np.s_[printed.plate.y : printed.plate.y + height, printed.plate.x :][0:2]
    grid = inside[-1].reshape(12, 12).repeat(8, 0).repeat(8, 1)
    assert grid[box][:, :width].all()


def test_the_region_reader_needs_the_region(tmp_path) -> None:
    """What lies outside a region does not reach what is said about it."""
    whole, scene = _whole(), make_scene("train", 3)
    inside, labels = (torch.from_numpy(x)[None] for x in regions(scene))
    patches = torch.randn(1, 144, 32)
    reader = whole.scaffold.regions
    only = labels.clone()
    first = next(i for i, k in enumerate(labels[0, :, 0].tolist()) if 0 <= k < len(KINDS))
    only[0, torch.arange(REGIONS) != first] = UNKNOWN
    other = torch.where(inside[0, first][:, None], patches, torch.randn(1, 144, 32))
    assert torch.equal(reader(patches, inside, only)[0], reader(other, inside, only)[0])
    assert not torch.equal(
        reader(patches, inside, only)[0], reader(torch.randn(1, 144, 32), inside, only)[0]
    )


@pytest.mark.parametrize("name", ["pocket-llava-hd", "pocket-siglip-base"])
def test_tiles_are_those_of_the_processor(name) -> None:
    side = spec(name).side
    scene = make_scene("dev", 8, side=side)
    text = "USER: <image>\nwhere is the circle? ASSISTANT:"
    given = build_processor(name)(images=scene.image(), text=text, return_tensors="pt")
    own, sizes = crops(build_model(name), [scene])
    torch.testing.assert_close(own, given.pixel_values, atol=1e-5, rtol=0)
    assert sizes.tolist() == given.image_sizes.tolist()


def test_large_scenes_keep_their_things_small() -> None:
    scenes = [make_scene("dev", seed, side=192) for seed in range(40)]
    assert {t.size <= 16 for s in scenes for t in s.things} == {True}
    assert max(t.x for s in scenes for t in s.things) > 96
    assert draw(scenes[0]).shape == (192, 192, 3)
    with pytest.raises(ValueError, match="multiple of 96"):
        make_scene("dev", 0, side=100)


def test_the_curve_begins_blank_and_ends_with_the_whole_depth() -> None:
    model, exam = _model(), Exam.of(3, per_scene=6)
    curve = removal_curve(model, TOKENIZER, exam, "picture", [2])
    assert list(curve.index) == [0, 2, spec(NAME).decoder_layers]
    table = answers(model, TOKENIZER, exam, "story")
    assert len(table) == sum(map(len, exam.questions))
    assert "describe" not in set(table["family"])
    assert draw(exam.scenes[0]).shape == (96, 96, 3)
