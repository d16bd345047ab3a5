"""Questions about pocket scenes, with answers computed from the scene.

Each family of questions is one small function from a scene (and a random generator that chooses
what to ask about) to a `Question`, or to None when the scene cannot be asked that. Benchmarks and
training use the same families; they differ in scenes, handwriting scans and seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from frugalvlm.pocket.scenes import (
    COLOR_WEIGHTS,
    COLORS,
    DIGITS,
    GRID,
    KIND_WEIGHTS,
    KINDS,
    PLACES,
    Scene,
    Thing,
)

Cell = tuple[int, int]  # row, column


@dataclass(frozen=True)
class Question:
    """A question, its answer, its family, and the grid cells that one must see to answer it."""

    text: str
    answer: str
    family: str
    about: tuple[Cell, ...] = ()


Family = Callable[[Scene, np.random.Generator], Question | None]

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
RELATIONS = {
    "left of": lambda a, b: a.col < b.col,
    "right of": lambda a, b: a.col > b.col,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _cells(*things: Thing) -> tuple[Cell, ...]:
    return tuple((t.row, t.col) for t in things)


def unique_kinds(scene: Scene) -> list[Thing]:
    """Things whose kind occurs once: they can be named by kind alone."""
    counts = Counter(t.kind for t in scene.things)
    return [t for t in scene.things if counts[t.kind] == 1]


def unique_colors(scene: Scene) -> list[Thing]:
    """Things whose colour occurs once."""
    counts = Counter(t.color for t in scene.things)
    return [t for t in scene.things if counts[t.color] == 1]


def color_of(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Attribute: the colour of a thing named by its kind."""
    if not (named := unique_kinds(scene)):
        return None
    t: Thing = _pick(rng, named)
    return Question(f"what color is the {t.kind}?", t.color, "color_of", _cells(t))


def kind_of(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Attribute: the kind of a thing named by its colour."""
    if not (named := unique_colors(scene)):
        return None
    t: Thing = _pick(rng, named)
    return Question(f"what is the {t.color} thing?", t.kind, "kind_of", _cells(t))


def place_of(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where a thing named by its kind stands: one of nine places."""
    if not (named := unique_kinds(scene)):
        return None
    t: Thing = _pick(rng, named)
    return Question(f"where is the {t.kind}?", t.place, "place_of", _cells(t))


def kind_at(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What stands at a place."""
    t: Thing = _pick(rng, scene.things)
    return Question(f"what is at the {t.place}?", t.kind, "kind_at", _cells(t))


def color_at(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The colour of what stands at a place."""
    t: Thing = _pick(rng, scene.things)
    return Question(f"what color is the thing at the {t.place}?", t.color, "color_at", _cells(t))


def relation_holds(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Whether a relation between two things holds; yes and no are equally likely."""
    named = unique_kinds(scene)
    if len(named) < 2:
        return None
    i, j = rng.choice(len(named), 2, replace=False)
    a, b = named[i], named[j]
    want = bool(rng.random() < 0.5)
    fitting = [word for word, holds in RELATIONS.items() if holds(a, b) == want]
    if not want:
        # The opposite relation must hold, so that "no" is about the place and not a tie.
        fitting = [w for w in fitting if RELATIONS[_opposite(w)](a, b)]
    if not fitting:
        return None
    word = _pick(rng, fitting)
    return relation_check(a, b, str(word))


def relation_check(a: Thing, b: Thing, word: str) -> Question:
    """Whether a relation (a key of `RELATIONS`) holds from one named thing to another."""
    text = f"is the {a.kind} {word} the {b.kind}?"
    return Question(text, _yes(RELATIONS[word](a, b)), "relation_holds", _cells(a, b))


def _opposite(word: str) -> str:
    return {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[word]


def neighbour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """What stands in the cell next to a thing."""
    options = [
        (t, word, other)
        for t in unique_kinds(scene)
        for word, (dr, dc) in STEPS.items()
        if 0 <= t.row + dr < GRID
        and 0 <= t.col + dc < GRID
        and (other := scene.at(t.row + dr, t.col + dc)) is not None
    ]
    if not options:
        return None
    t, word, other = _pick(rng, options)
    return Question(f"what is {word} the {t.kind}?", other.kind, "neighbour", _cells(t, other))


def present_pairs(scene: Scene) -> list[tuple[str, str]]:
    """The (colour, kind) pairs that the scene shows, sorted."""
    return sorted({(t.color, t.kind) for t in scene.things})


def absent_pair(scene: Scene, rng: np.random.Generator, sampling: str) -> tuple[str, str] | None:
    """A (colour, kind) pair that the scene does not show, by POPE's three ways of sampling.

    Args:
        scene: the scene.
        rng: chooses among the candidates.
        sampling: "random" (any pair), "popular" (among the ten most frequent pairs of all scenes)
            or "adversarial" (colour and kind are both present, but not on one thing).
    """
    present = set(present_pairs(scene))
    colors = sorted({c for c, _ in present})
    kinds = sorted({k for _, k in present})
    if sampling == "random":
        candidates = [(c, k) for c in COLORS for k in KINDS]
    elif sampling == "popular":
        candidates = popular_pairs()[:10]
    elif sampling == "adversarial":
        candidates = [(c, k) for c in colors for k in kinds]
    else:
        raise ValueError(f"Unknown sampling '{sampling}': random, popular or adversarial.")
    candidates = [pair for pair in candidates if pair not in present]
    return _pick(rng, candidates) if candidates else None


def popular_pairs() -> list[tuple[str, str]]:
    """All (colour, kind) pairs, the most frequent first (frequencies are known by construction)."""
    frequency = np.outer(COLOR_WEIGHTS, KIND_WEIGHTS)
    order = np.argsort(-frequency, axis=None, kind="stable")
    colors = list(COLORS)
    return [(colors[i // len(KINDS)], KINDS[i % len(KINDS)]) for i in order]


def presence(scene: Scene, pair: tuple[str, str]) -> Question:
    """Whether a coloured kind is in the picture."""
    found = [t for t in scene.things if (t.color, t.kind) == pair]
    article = "an" if pair[0] == "orange" else "a"
    about = _cells(*found) or _cells(*(t for t in scene.things if t.kind == pair[1]))
    text = f"is there {article} {pair[0]} {pair[1]} in the image?"
    return Question(text, _yes(bool(found)), "presence", about)


def any_presence(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Presence of a coloured kind, yes and no equally likely, negatives of all three samplings."""
    if rng.random() < 0.5:
        return presence(scene, _pick(rng, present_pairs(scene)))
    sampling = str(_pick(rng, ("random", "popular", "adversarial", "adversarial")))
    pair = absent_pair(scene, rng, sampling)
    return presence(scene, pair) if pair else None


def kind_present(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Whether a kind is in the picture, whatever its colour."""
    kinds = sorted({t.kind for t in scene.things})
    want = bool(rng.random() < 0.5)
    kind = _pick(rng, kinds if want else [k for k in KINDS if k not in kinds])
    return kind_presence(scene, str(kind))


def kind_presence(scene: Scene, kind: str) -> Question:
    """Whether a given kind is in the picture."""
    found = [t for t in scene.things if t.kind == kind]
    return Question(f"is there a {kind}?", _yes(bool(found)), "kind_present", _cells(*found))


def color_check(scene: Scene, thing: Thing, color: str) -> Question:
    """Whether a thing named by its kind has a colour."""
    text = f"is the {thing.kind} {color}?"
    return Question(text, _yes(thing.color == color), "color_check", _cells(thing))


def any_color_check(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A colour check, yes and no equally likely; wrong colours come from the scene if they can."""
    if not (named := unique_kinds(scene)):
        return None
    t: Thing = _pick(rng, named)
    if rng.random() < 0.5:
        return color_check(scene, t, t.color)
    return color_check(scene, t, wrong_color(scene, t, rng))


def wrong_color(scene: Scene, thing: Thing, rng: np.random.Generator) -> str:
    """A colour that the thing does not have, preferably that of another thing."""
    others = sorted({t.color for t in scene.things} - {thing.color})
    return str(_pick(rng, others or [c for c in COLORS if c != thing.color]))


def _counted(scene: Scene, what: str) -> list[Thing]:
    if what == "things":
        return list(scene.things)
    if what == "digits":
        return [t for t in scene.things if t.is_digit]
    if what == "shapes":
        return [t for t in scene.things if not t.is_digit]
    if what.endswith(" things"):
        return [t for t in scene.things if t.color == what.removesuffix(" things")]
    return [t for t in scene.things if PLURALS.get(t.kind) == what]


def countables(scene: Scene) -> list[str]:
    """What can be counted in this scene: everything, by class, by colour, by shape."""
    colors = sorted({f"{t.color} things" for t in scene.things})
    shapes = sorted({PLURALS[t.kind] for t in scene.things if not t.is_digit})
    return ["things", "digits", "shapes", *colors, *shapes]


def count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many things, digits, shapes, things of a colour, or shapes of a kind."""
    what = str(_pick(rng, countables(scene)))
    found = _counted(scene, what)
    text = f"how many {what} are there?"
    return Question(text, str(len(found)), "count", _cells(*found))


def count_check(scene: Scene, what: str, number: int) -> Question:
    """Whether the picture shows a given number of something."""
    found = _counted(scene, what)
    text = f"are there {number} {what}?"
    return Question(text, _yes(len(found) == number), "count_check", _cells(*found))


def any_count_check(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A count check, yes and no equally likely."""
    what = str(_pick(rng, countables(scene)))
    true = len(_counted(scene, what))
    number = true if rng.random() < 0.5 else wrong_count(true, rng)
    return count_check(scene, what, number)


def wrong_count(true: int, rng: np.random.Generator) -> int:
    """A number next to the true one."""
    return true + 1 if true == 0 or rng.random() < 0.5 else true - 1


def _plate_cells(scene: Scene) -> tuple[Cell, ...]:
    return () if scene.plate is None else scene.plate.cells


def read_number(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The number on the plate."""
    if scene.plate is None:
        return None
    text = "what number is written on the plate?"
    return Question(text, scene.plate.number, "read_number", _plate_cells(scene))


def number_check(scene: Scene, number: str) -> Question:
    """Whether the plate shows a number."""
    true = scene.plate is not None and scene.plate.number == number
    text = f"is the number {number} written on the plate?"
    return Question(text, _yes(true), "number_check", _plate_cells(scene))


def any_number_check(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A number check, yes and no equally likely; wrong numbers differ in one digit."""
    if scene.plate is None:
        return None
    true = scene.plate.number
    return number_check(scene, true if rng.random() < 0.5 else wrong_number(true, rng))


def wrong_number(true: str, rng: np.random.Generator) -> str:
    """A number that differs in one digit."""
    i = int(rng.integers(len(true)))
    digit = str(_pick(rng, [d for d in DIGITS if d != true[i]]))
    return true[:i] + digit + true[i + 1 :]


LETTERS = ("A", "B", "C", "D")


def choice_present(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Multiple choice: which of four coloured kinds is in the picture."""
    present = present_pairs(scene)
    true = _pick(rng, present)
    wrong = {
        pair
        for sampling in ("adversarial", "random", "random", "random", "random", "random")
        if (pair := absent_pair(scene, rng, sampling)) is not None
    }
    if len(wrong) < len(LETTERS) - 1:
        return None
    shuffled = [sorted(wrong)[i] for i in rng.permutation(len(wrong))]
    options = [true, *shuffled[: len(LETTERS) - 1]]
    about = _cells(*(t for t in scene.things if (t.color, t.kind) == true))
    names = [f"{c} {k}" for c, k in options]
    return _choice("which is in the image?", names, about, "choice_present", rng)


def choice_place(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Multiple choice: where a thing stands, among four places."""
    if not (named := unique_kinds(scene)):
        return None
    t: Thing = _pick(rng, named)
    others = [p for p in PLACES if p != t.place]
    names = [t.place, *(others[i] for i in rng.choice(len(others), 3, replace=False))]
    return _choice(f"where is the {t.kind}?", names, _cells(t), "choice_place", rng)


def choice_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Multiple choice: the colour of a thing, among four."""
    if not (named := unique_kinds(scene)):
        return None
    t: Thing = _pick(rng, named)
    others = [c for c in COLORS if c != t.color]
    names = [t.color, *(others[i] for i in rng.choice(len(others), 3, replace=False))]
    return _choice(f"what color is the {t.kind}?", names, _cells(t), "choice_color", rng)


def _choice(
    text: str, names: list[str], about: tuple[Cell, ...], family: str, rng: np.random.Generator
) -> Question:
    """Options in random order; `names[0]` is the right one."""
    order = rng.permutation(len(names))
    lines = [f"{LETTERS[i]}. {names[j]}" for i, j in enumerate(order)]
    answer = LETTERS[int(np.flatnonzero(order == 0)[0])]
    return Question("\n".join([text, *lines]), answer, family, about)


def describe(scene: Scene, rng: np.random.Generator) -> Question | None:
    """The caption, as a family of questions."""
    return caption(scene)


def caption(scene: Scene) -> Question:
    """Every thing with colour, kind and place, in reading order, then the plate's number."""
    parts = [f"{'an' if t.color == 'orange' else 'a'} {t.name} at the {t.place}"
             for t in scene.things]  # fmt: skip
    if scene.plate is not None:
        parts.append(f"the number {scene.plate.number}")
    answer = ", ".join(parts) + "."
    return Question("describe the image.", answer, "describe", _cells(*scene.things))


FAMILIES: dict[str, Family] = {
    "color_of": color_of,
    "kind_of": kind_of,
    "place_of": place_of,
    "kind_at": kind_at,
    "color_at": color_at,
    "relation_holds": relation_holds,
    "neighbour": neighbour,
    "presence": any_presence,
    "kind_present": kind_present,
    "color_check": any_color_check,
    "count": count,
    "count_check": any_count_check,
    "read_number": read_number,
    "number_check": any_number_check,
    "choice_present": choice_present,
    "choice_place": choice_place,
    "choice_color": choice_color,
    "describe": describe,
}


# What a decoder learns last: to go from a name to a place and back, and to compare two places.
LATE = (
    "color_of", "place_of", "kind_at", "color_at", "relation_holds", "neighbour", "number_check",
    "choice_place",
)  # fmt: skip


def training_questions(
    scene: Scene, rng: np.random.Generator, number: int, late: bool = False
) -> list[Question]:
    """`number` questions of all families, round robin over a shuffled list; at least one.

    Args:
        scene: what to ask about.
        rng: chooses.
        number: how many; a sparse scene may not have so many different ones.
        late: ask the families of `LATE` twice in a round and half of the others.
    """
    found: list[Question] = []
    seen: set[str] = set()
    for _ in range(4):
        names = list(FAMILIES)
        if late:
            others = [name for name in names if name not in LATE]
            half = rng.permutation(len(others))[: len(others) // 2]
            names = [*LATE, *LATE, *(others[i] for i in half)]
        for i in rng.permutation(len(names)):
            question = FAMILIES[names[i]](scene, rng)
            if question is not None and question.text not in seen:
                found.append(question)
                seen.add(question.text)
            if len(found) == number:
                return found
    return found
