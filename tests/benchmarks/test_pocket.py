"""The pocket data sets: answers derived a second way, splits apart, balanced, the same for ever."""

import hashlib
import re
from collections import Counter
from copy import copy
from functools import cache

import numpy as np
import pytest
from sklearn.datasets import load_digits

from frugalvlm.benchmarks import ALL_BENCHMARKS, BENCHMARKS, HD_BENCHMARKS, load_benchmark, prompt
from frugalvlm.benchmarks.base import EVAL_SPLITS, FEATURES, MAX_QUESTIONS, SEEDS_PER_SPLIT
from frugalvlm.pocket.models import build_processor
from frugalvlm.pocket.recipe import seed_of
from frugalvlm.pocket.scenes import COLORS, SHAPES, draw, make_scene, scan_split

N = 180


@cache
def dataset(id, split="test", n=N):
    return load_benchmark(id).dataset(split, n)


@cache
def rows(id, split="test", n=N):
    return tuple(dataset(id, split, n).remove_columns("image"))


@pytest.fixture(params=BENCHMARKS)
def id(request):
    return request.param


# ---- a second way to the answers: from pixel boxes, the picture's colours and the scans' labels


class Seen:
    """What a picture shows: {(row, column): (colour, kind)} and the number on the plate."""

    def __init__(self, split, seed):
        scene = make_scene(split, seed)
        pixels, labels = draw(scene).astype(float), load_digits().target
        self.things = {}
        for t in scene.things:
            cell = (t.y + t.size // 2) // 32, (t.x + t.size // 2) // 32
            box = pixels[t.y : t.y + t.size, t.x : t.x + t.size].reshape(-1, 3)
            # Ink has its colour somewhere in the box, without any background.
            far = {c: np.linalg.norm(box - rgb, axis=1).min() for c, rgb in COLORS.items()}
            kind = t.kind if t.kind in SHAPES else str(labels[t.scan])
            self.things[cell] = (min(far, key=far.get), kind)
        self.number = "".join(str(labels[s]) for s in scene.plate.scans) if scene.plate else None

    def where(self, kind):
        (cell,) = [c for c, (_, k) in self.things.items() if k == kind]
        return cell

    def how_many(self, what):
        kinds = [k for _, k in self.things.values()]
        colors = [c for c, _ in self.things.values()]
        plural = {"circles": "circle", "squares": "square", "triangles": "triangle",
                  "crosses": "cross"}  # fmt: skip
        if what in ("things", "digits", "shapes"):
            digits = sum(k.isdigit() for k in kinds)
            return {"things": len(kinds), "digits": digits, "shapes": len(kinds) - digits}[what]
        if what in plural:
            return kinds.count(plural[what])
        return colors.count(what.split()[0])

    def holds(self, a, word, b):
        (ra, ca), (rb, cb) = self.where(a), self.where(b)
        moves = {"left of": cb - ca, "right of": ca - cb, "above": rb - ra, "below": ra - rb}
        return moves[word] > 0


@cache
def look(split, seed):
    return Seen(split, seed)


ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")


def place_name(cell):
    name = f"{ROWS[cell[0]]} {COLUMNS[cell[1]]}"
    return "center" if name == "middle middle" else name


def cell_named(name):
    (cell,) = [(r, c) for r in range(3) for c in range(3) if place_name((r, c)) == name]
    return cell


def yes(flag):
    return "yes" if flag else "no"


WORD = "(left of|right of|above|below)"
SOLVERS = {
    r"what color is the (\w+)\?": lambda s, k: s.things[s.where(k)][0],
    r"what is the (\w+) thing\?": lambda s, c: _only(k for d, k in s.things.values() if d == c),
    r"where is the (\w+)\?": lambda s, k: place_name(s.where(k)),
    r"what is at the (.+)\?": lambda s, p: s.things[cell_named(p)][1],
    r"what color is the thing at the (.+)\?": lambda s, p: s.things[cell_named(p)][0],
    rf"is the (\w+) {WORD} the (\w+)\?": lambda s, a, w, b: yes(s.holds(a, w, b)),
    rf"what is {WORD} the (\w+)\?": lambda s, w, k: s.things[_step(s.where(k), w)][1],
    r"is there an? (\w+) (\w+) in the image\?": lambda s, c, k: yes((c, k) in s.things.values()),
    r"is there a (\w+)\?": lambda s, k: yes(k in [kind for _, kind in s.things.values()]),
    r"is the (\w+) (\w+)\?": lambda s, k, c: yes(s.things[s.where(k)][0] == c),
    r"how many (.+) are there\?": lambda s, w: str(s.how_many(w)),
    r"are there (\d+) (.+)\?": lambda s, n, w: yes(s.how_many(w) == int(n)),
    r"what number is written on the plate\?": lambda s: s.number,
    r"is the number (\d+) written on the plate\?": lambda s, n: yes(s.number == n),
}


def _only(values):
    (value,) = values
    return value


def _step(cell, word):
    row, col = cell
    return {"left of": (row, col - 1), "right of": (row, col + 1), "above": (row - 1, col),
            "below": (row + 1, col)}[word]  # fmt: skip


def solve(text, seen):
    if "\n" in text:
        question, *lines = text.split("\n")
        options = dict(line.split(". ") for line in lines)
        assert list(options) == ["A", "B", "C", "D"]
        assert len(set(options.values())) == 4
        if question == "which is in the image?":
            shown = {f"{c} {k}" for c, k in seen.things.values()}
            return _only(letter for letter, name in options.items() if name in shown)
        truth = solve(question, seen)
        return _only(letter for letter, name in options.items() if name == truth)
    answers = [f(seen, *m.groups()) for p, f in SOLVERS.items() if (m := re.fullmatch(p, text))]
    return _only(answers)


@pytest.mark.parametrize("split", EVAL_SPLITS)
def test_answers_follow_from_the_picture(id, split):
    for r in rows(id, split):
        assert r["answer"] == solve(r["question"], look(split, r["scene_seed"])), r


def test_the_solver_would_notice_a_mirrored_picture():
    wrong = 0
    for r in rows("pocket-gqa"):
        seen = copy(look("test", r["scene_seed"]))
        seen.things = {(row, 2 - col): thing for (row, col), thing in seen.things.items()}
        try:
            wrong += r["answer"] != solve(r["question"], seen)
        except KeyError:
            wrong += 1
    assert wrong > N / 4


def test_about_names_the_cells_that_carry_the_answer(id):
    for r in rows(id):
        scene = make_scene("test", r["scene_seed"])
        cells = [tuple(cell) for cell in r["about"]]
        if "plate" in r["question"]:
            plate, pixels = scene.plate, 16 * len(scene.plate.number) + 6
            wide = -(-pixels // 32)
            assert set(cells) == {(plate.row, plate.col + i) for i in range(wide)}
        else:
            assert all(scene.at(*cell) for cell in cells)
        if r["answer"] not in ("no", "0"):
            assert cells or "are there 0 " in r["question"], r


# ---- shape of the data


def test_columns_image_and_identity(id):
    d = dataset(id)
    assert d.features == FEATURES
    first = d[0]
    assert first["image"].size == (96, 96)
    assert np.array_equal(np.asarray(first["image"]), draw(make_scene("test", first["scene_seed"])))
    table = rows(id)
    assert len({r["question_id"] for r in table}) == len(table)
    assert len({(r["scene_seed"], r["question"]) for r in table}) == len(table)
    assert len({(r["scene_seed"], r["image_id"]) for r in table}) == len(
        {r["image_id"] for r in table}
    )


def test_a_small_set_is_the_beginning_of_a_large_one(id):
    benchmark = load_benchmark(id)
    n = 3 * benchmark.per_image
    assert tuple(benchmark.dataset("test", n).remove_columns("image")) == rows(id)[:n]
    assert len(benchmark.dataset("test", 1)) == benchmark.per_image


def test_splits_and_benchmarks_share_no_seed():
    reach = set()
    for benchmark in ALL_BENCHMARKS.values():
        for i in range(2):
            start = benchmark.first_seed + i * SEEDS_PER_SPLIT
            assert not any(r[0] < start + SEEDS_PER_SPLIT and start < r[1] for r in reach)
            reach.add((start, start + SEEDS_PER_SPLIT))
    assert max(end for _, end in reach) <= seed_of(0, 0, 1, 0)


def test_seeds_of_the_rows_lie_in_their_range_with_room_to_spare(id):
    for i, split in enumerate(EVAL_SPLITS):
        start = load_benchmark(id).first_seed + i * SEEDS_PER_SPLIT
        seeds = [r["scene_seed"] - start for r in rows(id, split)]
        assert seeds == sorted(seeds)
        assert seeds[0] >= 0
        per_question = (seeds[-1] + 1) / len(seeds)
        assert per_question * MAX_QUESTIONS < SEEDS_PER_SPLIT


def test_a_second_test_set_asks_about_other_scenes_of_the_same_scans(id):
    benchmark = load_benchmark(id)
    again = benchmark.dataset("replication", 30)
    assert not {*again["scene_seed"]} & {r["scene_seed"] for r in rows(id, "test")}
    assert not {*again["image_id"]} & {r["image_id"] for r in rows(id, "test")}
    scenes = [make_scene("test", seed) for seed in {*again["scene_seed"]}]
    used = {t.scan for scene in scenes for t in scene.things if t.is_digit}
    assert used <= {*np.concatenate(list(scan_split()["test"].values())).tolist()}
    start = benchmark.first_seed + SEEDS_PER_SPLIT
    assert min(again["scene_seed"]) >= start + SEEDS_PER_SPLIT // 2
    assert max(again["scene_seed"]) < start + SEEDS_PER_SPLIT


def test_no_scan_is_in_two_splits(id):
    used = {}
    for split in EVAL_SPLITS:
        scenes = [make_scene(split, s) for s in {r["scene_seed"] for r in rows(id, split)}]
        used[split] = {t.scan for s in scenes for t in s.things if t.is_digit}
        used[split] |= {scan for s in scenes if s.plate for scan in s.plate.scans}
        assert used[split]
    trained = set(np.concatenate(list(scan_split()["train"].values())).tolist())
    assert not used["dev"] & used["test"]
    assert not (used["dev"] | used["test"]) & trained


# sha256 of question ids, seeds, questions and answers of the first 30 questions, dev and test. A
# change means that every record made before is about other questions.
PINNED = {
    "pocket-gqa": "f3b24ee0d030a9de",
    "pocket-pope": "81ccd634b936aca3",
    "pocket-mme": "72ab5a75e4243dd9",
    "pocket-textvqa": "23744fab20d87493",
    "pocket-sqa": "7eb84a55d791521c",
    "pocket-vqav2": "3ce244762da87dae",
}


def test_questions_are_the_same_for_ever(id):
    text = repr(
        [(r["question_id"], r["scene_seed"], r["question"], r["answer"], r["about"])
         for split in EVAL_SPLITS for r in rows(id, split)[:30]]
    )  # fmt: skip
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == PINNED[id]


def test_another_call_gives_the_same_pictures(id):
    benchmark = load_benchmark(id)
    again = benchmark.dataset("dev", benchmark.per_image)
    assert np.array_equal(np.asarray(again[0]["image"]), np.asarray(dataset(id, "dev")[0]["image"]))


# ---- balance


def counts(id, key, **where):
    return Counter(r[key] for r in rows(id) if all(r[k] == v for k, v in where.items()))


def even(counter, kinds, slack=1):
    assert len(counter) == kinds
    assert max(counter.values()) - min(counter.values()) <= slack, counter


def test_balance_of_gqa():
    even(counts("pocket-gqa", "category"), 7)
    even(counts("pocket-gqa", "answer", category="relation_holds"), 2)


def test_balance_of_pope():
    even(counts("pocket-pope", "category"), 3, slack=6)
    for category in ("random", "popular", "adversarial"):
        even(counts("pocket-pope", "answer", category=category), 2, slack=0)
    per_image = Counter((r["image_id"], r["answer"]) for r in rows("pocket-pope"))
    assert set(per_image.values()) == {3}


def test_pope_absent_pairs_are_of_their_category():
    popular_colors = {"red", "blue", "green", "yellow"}
    for r in rows("pocket-pope"):
        _, color, kind, *_ = r["question"].removeprefix("is there ").split()
        seen = look("test", r["scene_seed"]).things.values()
        if r["answer"] == "no" and r["category"] == "adversarial":
            assert color in [c for c, _ in seen]
            assert kind in [k for _, k in seen]
        if r["answer"] == "no" and r["category"] == "popular":
            assert color in popular_colors
            assert kind in SHAPES


def test_balance_of_mme():
    even(counts("pocket-mme", "category"), 5, slack=0)
    pairs = Counter((r["image_id"], r["category"], r["answer"]) for r in rows("pocket-mme"))
    assert set(pairs.values()) == {1}


def test_balance_of_sqa():
    even(counts("pocket-sqa", "answer"), 4, slack=0)
    for category in ("choice_present", "choice_place", "choice_color"):
        even(counts("pocket-sqa", "answer", category=category), 4, slack=0)


def test_balance_of_vqav2():
    even(counts("pocket-vqav2", "category"), 3, slack=0)
    even(counts("pocket-vqav2", "answer", category="yes/no"), 2, slack=3)
    even(counts("pocket-vqav2", "answer", category="number"), 4, slack=0)


def test_numbers_on_plates_are_as_good_as_unguessable():
    answers = counts("pocket-textvqa", "answer")
    assert max(answers.values()) <= 0.03 * N
    assert {len(a) for a in answers} == {3, 4, 5}


# ---- scoring and use


def test_right_answers_score_full_and_failures_nothing(id):
    benchmark, table = load_benchmark(id), rows(id)
    perfect = benchmark.sheet(dataset(id), [r["answer"] for r in table])
    assert perfect.headline == pytest.approx(benchmark.headline_max)
    assert perfect.accuracy == pytest.approx(100)
    assert perfect.headline_max == benchmark.headline_max
    failed = benchmark.sheet(table, [None] * len(table))
    assert failed.headline == failed.accuracy == 0
    assert failed.image_ids == perfect.image_ids
    assert len(perfect.stats) == len(perfect.image_ids)


def test_always_yes_scores_what_chance_scores():
    table = rows("pocket-pope")
    sheet = load_benchmark("pocket-pope").sheet(table, ["yes"] * len(table))
    assert sheet.headline == pytest.approx(200 / 3)
    assert sheet.accuracy == sheet.details["accuracy/random"] == pytest.approx(50)
    table = rows("pocket-mme")
    sheet = load_benchmark("pocket-mme").sheet(table, ["yes"] * len(table))
    assert sheet.headline == pytest.approx(5 * 50)


def test_answers_fit_the_model(id):
    processor, benchmark = build_processor(), load_benchmark(id)
    for r in rows(id):
        answer = processor.tokenizer(r["answer"], add_special_tokens=False).input_ids
        assert len(answer) + 1 <= benchmark.max_new_tokens
        assert processor.tokenizer.unk_token_id not in processor.tokenizer(r["question"]).input_ids
    # What the model writes for a right answer is scored as right, lower case and all.
    decoded = processor.tokenizer.batch_decode(
        [processor.tokenizer(r["answer"]).input_ids for r in rows(id)], skip_special_tokens=True
    )
    assert benchmark.sheet(rows(id), decoded).accuracy == pytest.approx(100)


def test_prompt_is_what_the_chat_template_makes():
    content = [{"type": "image"}, {"type": "text", "text": "is there a 3?"}]
    made = build_processor().apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert made == prompt("is there a 3?")


def test_registry_and_errors():
    assert all(key == benchmark.id for key, benchmark in ALL_BENCHMARKS.items())
    with pytest.raises(ValueError, match="pocket-gqa, pocket-pope"):
        load_benchmark("gqa")
    with pytest.raises(ValueError, match="dev or test"):
        load_benchmark("pocket-gqa").dataset("train", 10)
    with pytest.raises(ValueError, match="n must be"):
        load_benchmark("pocket-gqa").dataset("test", 0)


def test_large_pictures_show_small_print_and_are_asked_the_same():
    for id, benchmark in HD_BENCHMARKS.items():
        small = load_benchmark(id.removesuffix("-hd"))
        data = benchmark.dataset("test", 6)
        for row in data:
            scene = make_scene("test", row["scene_seed"], side=192)
            assert row["image"].size == (192, 192)
            assert np.array_equal(np.asarray(row["image"]), draw(scene))
            assert {t.size for t in scene.things} <= set(range(18, 25)), "as large as ever"
        assert Counter(data["category"]) == Counter(small.dataset("test", 6)["category"])
        assert benchmark.score is small.score


def test_large_pictures_have_seeds_of_their_own():
    seeds = {id: set(b.dataset("test", 6)["scene_seed"]) for id, b in ALL_BENCHMARKS.items()}
    for id in HD_BENCHMARKS:
        assert not any(seeds[id] & other for name, other in seeds.items() if name != id)
