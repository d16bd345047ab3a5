"""Scenes, questions and texts of the second generation say what they promise."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from frugalvlm.benchmarks import prompt
from frugalvlm.pocket.models import build_tokenizer as first_tokenizer
from frugalvlm.pocket.questions import STEPS
from frugalvlm.pocket.scenes import SPLITS, Thing, scan_split
from frugalvlm.pocket.scenes import make_scene as first_scene
from frugalvlm.pocket.second import questions
from frugalvlm.pocket.second.models import build_processor, build_tokenizer
from frugalvlm.pocket.second.questions import FAMILIES, TWO_HOPS, listing, training_questions
from frugalvlm.pocket.second.scenes import PATCH, SecondScene, draw, is_big, make_scene
from frugalvlm.pocket.second.texts import caption, story

SCENES = [make_scene("train", seed) for seed in range(300)]
NINTH = 16  # of 144 patches


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _touched(scene: SecondScene) -> set[tuple[int, int]]:
    boxes = [(t.x, t.y, t.size, t.size) for t in scene.things]
    if scene.plate is not None:
        boxes.append((scene.plate.x, scene.plate.y, *scene.plate.size))
    return {
        (y // PATCH, x // PATCH)
        for left, top, width, height in boxes
        for x in range(left, left + width)
        for y in range(top, top + height)
    }


@pytest.mark.parametrize("printed", [False, True])
def test_all_that_a_scene_shows_fits_into_the_smallest_budget(printed: bool) -> None:
    for seed in range(200):
        scene = make_scene("dev", seed, printed=printed)
        assert 1 <= len(_touched(scene)) <= NINTH
        assert (scene.plate is not None) == printed == (not scene.things)


def test_a_thing_stands_in_its_cell_on_four_patches() -> None:
    for scene in SCENES:
        for t in scene.things:
            assert len(_touched(replace(scene, things=(t,)))) == 4
            assert (t.y // 32, t.x // 32) == (t.row, t.col)
            assert ((t.y + t.size - 1) // 32, (t.x + t.size - 1) // 32) == (t.row, t.col)


def test_a_scene_follows_from_split_and_seed_and_no_scan_is_in_two_splits() -> None:
    for split in SPLITS:
        assert make_scene(split, 5) == make_scene(split, 5)
        assert np.array_equal(draw(make_scene(split, 5)), draw(make_scene(split, 5)))
        own = {int(i) for part in scan_split()[split].values() for i in part}
        for seed in range(100):
            scene = make_scene(split, seed, printed=seed % 4 == 0)
            used = {t.scan for t in scene.things if t.is_digit}
            used |= set(scene.plate.scans) if scene.plate else set()
            assert used <= own
    assert make_scene("train", 5) != make_scene("dev", 5)
    assert not np.array_equal(draw(make_scene("train", 5)), first_scene("train", 5).image())


def test_most_scenes_have_one_thing_that_stands_out_often_in_the_centre() -> None:
    bigs = [sum(map(is_big, s.things)) for s in SCENES]
    assert max(bigs) == 1
    assert 0.7 < np.mean(bigs) < 0.9
    main = [s.salient for s in SCENES if s.salient is not None and is_big(s.salient)]
    assert 0.4 < np.mean([t.place == "center" for t in main]) < 0.7


def test_kinds_have_habits_that_a_question_gives_away() -> None:
    colors: dict[str, Counter] = defaultdict(Counter)
    for scene in SCENES:
        for t in scene.things:
            colors[t.kind][t.color] += 1
    assert colors["circle"].most_common(1)[0][0] == "red"
    share = sum(c.most_common(1)[0][1] for c in colors.values()) / sum(
        c.total() for c in colors.values()
    )
    assert 0.4 < share < 0.75


def test_the_first_vocabulary_is_a_prefix_of_the_second() -> None:
    first, second = first_tokenizer().get_vocab(), build_tokenizer().get_vocab()
    assert {word: second[word] for word in first} == first
    assert sorted(second.values()) == list(range(len(second)))


def test_every_wording_and_every_text_is_made_of_known_words() -> None:
    tokenizer = build_tokenizer()
    seen = Counter()
    for scene in [*SCENES[:120], *(make_scene("dev", s, printed=True) for s in range(10))]:
        rng = _rng(scene.seed)
        texts = [story(scene, rng), caption(scene, rng)]
        for question in training_questions(scene, rng, 30):
            texts += [question.text, question.answer]
            seen[question.family] += 1
        for text in texts:
            assert tokenizer.unk_token_id not in tokenizer(text).input_ids, text
    assert set(seen) == set(FAMILIES)


def _scene(*things: tuple[str, str, int, int, int]) -> SecondScene:
    made = tuple(
        Thing(kind, color, row, col, 32 * col, 32 * row, size)
        for kind, color, row, col, size in things
    )
    return SecondScene("train", 0, made, None)


THREE = _scene(
    ("square", "blue", 0, 0, 10), ("circle", "red", 1, 1, 16), ("cross", "red", 1, 2, 11)
)


@pytest.mark.parametrize(
    ("family", "answers"),
    [
        ("main_kind", {"circle"}),
        ("main_color", {"red"}),
        ("main_place", {"center"}),
        ("count", {"3"}),
        ("neighbour_kind", {"cross", "circle"}),
        ("neighbour_color", {"red"}),
    ],
)
def test_answers_follow_from_the_scene(family: str, answers: set[str]) -> None:
    assert {FAMILIES[family](THREE, _rng(seed)).answer for seed in range(40)} == answers


def test_a_second_turn_is_about_what_the_first_one_found() -> None:
    asked = Counter()
    for seed in range(80):
        question = FAMILIES["follow_up"](THREE, _rng(seed))
        first, second = question.text.split("</s>USER: ")
        _, found = first.split(" ASSISTANT: ")
        thing = next(t for t in THREE.things if t.kind == found)
        assert not any(t.kind in second for t in THREE.things)
        if side := next((w for w in STEPS if f"{w} it" in second), None):
            down, right = STEPS[side]
            beside = THREE.at(thing.row + down, thing.col + right)
            assert question.answer == beside.kind
        else:
            assert question.answer == (thing.color if "color" in second else thing.place)
        asked[side is not None, "color" in second] += 1
    assert len(asked) == 3


def test_a_dialogue_reads_as_the_chat_template_writes_it() -> None:
    question = FAMILIES["follow_up"](THREE, _rng(1))
    first, second = question.text.split("</s>USER: ")
    ask, found = first.split(" ASSISTANT: ")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ask}]},
        {"role": "assistant", "content": found},
        {"role": "user", "content": second},
    ]
    said = build_processor().apply_chat_template(turns, add_generation_prompt=True)
    assert said == prompt(question.text)


def test_a_named_neighbour_is_the_one_on_that_side() -> None:
    for seed in range(40):
        question = FAMILIES["neighbour_kind"](THREE, _rng(seed))
        known = next(t for t in THREE.things if f"the {t.kind}" in question.text)
        other = next(t for t in THREE.things if t.kind == question.answer)
        word = next(w for w in STEPS if w in question.text)
        assert STEPS[word] == (other.row - known.row, other.col - known.col)
        assert set(question.about) == {(known.row, known.col), (other.row, other.col)}


def test_yes_means_yes() -> None:
    for seed in range(60):
        same = FAMILIES["same_color"](THREE, _rng(seed))
        assert (same is None) or (same.answer == "yes") == ("square" not in same.text)
        check = FAMILIES["main_check"](THREE, _rng(seed))
        true = "red" in check.text or "circle" in check.text
        assert (check.answer == "yes") == true
        present = FAMILIES["presence"](THREE, _rng(seed))
        shown = {questions.full_name(t) for t in THREE.things} | {t.name for t in THREE.things}
        named = any(f"a {name} in" in present.text or f"a {name}?" in present.text
                    for name in shown)  # fmt: skip
        assert (present.answer == "yes") == named, present


def test_which_is_first_is_the_one_further_to_that_side() -> None:
    for seed in range(40):
        question = FAMILIES["which_first"](THREE, _rng(seed))
        pair = [t for t in THREE.things if f"the {t.kind}" in question.text]
        side = next(w for w in ("left", "right", "top", "bottom") if w in question.text)
        ahead = {"left": lambda t: t.col, "right": lambda t: -t.col, "top": lambda t: t.row,
                 "bottom": lambda t: -t.row}[side]  # fmt: skip
        assert question.answer == min(pair, key=ahead).kind


def test_the_right_option_is_the_answer() -> None:
    for seed in range(40):
        for family in ("choice_present", "choice_place", "choice_color"):
            question = FAMILIES[family](THREE, _rng(seed))
            first, *lines = question.text.split("\n")
            options = {line[0]: line[3:] for line in lines}
            assert len(set(options.values())) == 4
            right = {
                name: {t.name, t.place if "place" in family else t.color}
                for t in THREE.things
                for name in (t.kind,)
            }
            chosen = options[question.answer]
            if family == "choice_present":
                shown = {t.name for t in THREE.things}
                assert [o for o in options.values() if o in shown] == [chosen]
            else:
                kind = next(k for k in right if k in first)
                assert chosen in right[kind]


def test_salient_means_about_nothing_but_what_stands_out() -> None:
    for scene in SCENES[:100]:
        for question in training_questions(scene, _rng(scene.seed), 40):
            main = scene.salient
            alone = main is not None and question.about == ((main.row, main.col),)
            assert (question.category == "salient") == alone, question
    share = np.mean([
        q.category == "salient" for s in SCENES for q in training_questions(s, _rng(s.seed), 24)
    ])  # fmt: skip
    assert 0.3 < share < 0.6


def test_second_hops_are_asked_most() -> None:
    asked = Counter(
        q.family for s in SCENES for q in training_questions(s, _rng(s.seed), 16)
        if len(s.things) > 2
    )  # fmt: skip
    assert asked["neighbour_kind"] > 1.3 * asked["kind_at"]
    assert set(TWO_HOPS) <= set(asked)


def _facts(text: str) -> list[str]:
    return [s.strip() for s in text.split(".") if s.strip()]


def test_a_story_tells_every_thing_and_no_two_tellings_are_alike() -> None:
    for scene in SCENES[:60]:
        tellings = {story(scene, _rng(seed)) for seed in range(8)}
        assert len(tellings) > 2
        for text in tellings:
            for t in scene.things:
                assert t.kind in text.split() or f"{t.kind}." in text.split()
                assert t.color in text
            assert sum("big" in fact for fact in _facts(text)) == sum(map(is_big, scene.things))


def test_some_stories_tell_places_by_neighbours_only() -> None:
    texts = [story(s, _rng(s.seed)) for s in SCENES]
    beside = [any(f" {word} the" in text for word in STEPS) for text in texts]
    assert 0.1 < np.mean(beside) < 0.7


def test_a_caption_always_tells_what_stands_out_and_often_leaves_out_others() -> None:
    told, things = 0, 0
    for scene in SCENES:
        text = caption(scene, _rng(scene.seed))
        if scene.salient is not None:
            assert text.startswith(questions.a(questions.full_name(scene.salient)))
        told += text.count(" at the ")
        things += len(scene.things)
    assert 0.6 < told / things < 0.95
    assert listing(THREE).count(" at the ") == 3
