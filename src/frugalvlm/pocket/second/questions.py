"""Questions about scenes of the second generation, with answers computed from the scene.

A family is a function from a scene to a question, as in the first generation. New are:

- the category: `salient` questions are about the one thing that stands out, `fine` ones about
  the others or about several things;
- second hops: the thing asked about is named by its neighbour, or two things are compared;
- several wordings of every question, so that a fixed place in the prompt says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from frugalvlm.pocket.models import EOS
from frugalvlm.pocket.questions import (
    LETTERS,
    RELATIONS,
    STEPS,
    Question,
    present_pairs,
    unique_colors,
    unique_kinds,
    wrong_color,
)
from frugalvlm.pocket.scenes import COLORS, DIGITS, GRID, KINDS, PLACES, Thing
from frugalvlm.pocket.second.scenes import PAIRS, SecondScene, is_big, usual_pair

Category = Literal["salient", "fine"]
CATEGORIES: tuple[Category, ...] = ("salient", "fine")


@dataclass(frozen=True)
class Categorised(Question):
    """A question that knows whether it is about what stands out."""

    category: Category = "fine"


Family = Callable[[SecondScene, np.random.Generator], Categorised | None]

# {0} and {1} are what is asked about, in the order of the family.
WORDINGS: dict[str, tuple[str, ...]] = {
    "main_kind": (
        "what is the big thing?", "name the big thing.", "which thing is the largest?",
        "what is it that stands out?",
    ),
    "main_color": (
        "what color is the big thing?", "which color does the largest thing have?",
        "name the color of the big thing.", "the thing that stands out has which color?",
    ),
    "main_place": (
        "where is the big thing?", "at which place is the largest thing?",
        "name the place of the big thing.", "the thing that stands out is where?",
    ),
    "main_check": (
        "is the big thing {0}?", "does the largest thing look {0}?",
        "the thing that stands out is {0}, yes or no?",
    ),
    "color_of": (
        "what color is the {0}?", "which color does the {0} have?", "name the color of the {0}.",
        "the {0} has which color?",
    ),
    "kind_of": (
        "what is the {0} thing?", "which kind of thing is {0}?", "name the thing that is {0}.",
    ),
    "place_of": (
        "where is the {0}?", "at which place is the {0}?", "name the place of the {0}.",
        "the {0} is where?",
    ),
    "kind_at": (
        "what is at the {0}?", "which thing stands at the {0}?", "name the thing at the {0}.",
    ),
    "color_at": (
        "what color is the thing at the {0}?", "name the color of the thing at the {0}.",
        "the thing at the {0} has which color?",
    ),
    "neighbour_kind": (
        "what is {0} the {1}?", "which thing stands {0} the {1}?", "name the thing {0} the {1}.",
        "next to the {1}, {0} it, is what?",
    ),
    "neighbour_color": (
        "what color is the thing {0} the {1}?", "name the color of the thing {0} the {1}.",
        "the thing {0} the {1} has which color?",
    ),
    "same_color": (
        "do the {0} and the {1} have the same color?", "is the {0} of the same color as the {1}?",
        "are the {0} and the {1} of one color?",
    ),
    "relation": (
        "is the {0} {2} the {1}?", "does the {0} stand {2} the {1}?",
        "compared with the {1}, is the {0} {2} it?",
    ),
    "which_first": (
        "which is more to the {2}, the {0} or the {1}?",
        "of the {0} and the {1}, which is nearer to the {2}?",
    ),
    "presence": (
        "is there {0} in the image?", "does the image show {0}?", "can you see {0}?",
    ),
    "count": (
        "how many things are there?", "what is the number of things?",
        "how many things does the image show?",
    ),
    "choice_present": ("which is in the image?", "which of these can you see?"),
    "choice_place": ("where is the {0}?", "which is the place of the {0}?"),
    "choice_color": ("what color is the {0}?", "which is the color of the {0}?"),
    "read_number": (
        "what number is written in the image?", "read the number.",
        "which number does the image show?",
    ),
    "number_check": (
        "is the number {0} written in the image?", "does the image show the number {0}?",
    ),
    "it_color": ("what color is it?", "which color does it have?"),
    "it_place": ("where is it?", "at which place is it?"),
    "it_neighbour": ("what is {0} it?", "which thing stands {0} it?"),
    "describe": ("describe the image.", "what does the image show?", "name every thing."),
}  # fmt: skip
# Words of these questions and of the texts that the first generation's vocabulary lacks.
NEW_WORDS = (
    "name", "largest", "out", "stands", "stand", "looks", "look", "have", "has", "place", "do",
    "these", "compared", "nearer", "these", "show", "shows", "larger", "as", "text", "hint",
)  # fmt: skip


def phrase(rng: np.random.Generator, family: str, *parts: str) -> str:
    """One wording of a question, chosen at random."""
    return str(_pick(rng, WORDINGS[family])).format(*parts)


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def a(name: str) -> str:
    """A name with its article."""
    return f"{'an' if name[:6] == 'orange' else 'a'} {name}"


def _about(scene: SecondScene, *things: Thing) -> dict[str, Any]:
    """Cells, and the category: salient where nothing but the salient thing is meant."""
    main = scene.salient
    salient = bool(things) and all(t == main for t in things)
    cells = tuple(dict.fromkeys((t.row, t.col) for t in things))
    return {"about": cells, "category": "salient" if salient else "fine"}


def main_kind(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """What the salient thing is."""
    return _main(scene, rng, "main_kind", lambda t: t.kind)


def main_color(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """The colour of the salient thing."""
    return _main(scene, rng, "main_color", lambda t: t.color)


def main_place(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """The place of the salient thing."""
    return _main(scene, rng, "main_place", lambda t: t.place)


def _main(
    scene: SecondScene, rng: np.random.Generator, family: str, of: Callable[[Thing], str]
) -> Categorised | None:
    if (t := scene.salient) is None:
        return None
    return Categorised(phrase(rng, family), of(t), family, **_about(scene, t))


def main_check(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """Whether the salient thing has a colour, or is of a kind; yes and no equally likely."""
    if (t := scene.salient) is None:
        return None
    want = bool(rng.random() < 0.5)
    if rng.random() < 0.5:
        said = t.color if want else wrong_color(scene, t, rng)
    else:
        others = sorted({o.kind for o in scene.things} - {t.kind})
        wrong = _pick(rng, others or [k for k in KINDS if k != t.kind])
        said = a(t.kind if want else str(wrong))
    return Categorised(phrase(rng, "main_check", said), _yes(want), "main_check",
                       **_about(scene, t))  # fmt: skip


def color_of(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """The colour of a thing named by its kind."""
    return _one(scene, rng, "color_of", unique_kinds(scene), lambda t: (t.kind, t.color))


def kind_of(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """The kind of a thing named by its colour."""
    return _one(scene, rng, "kind_of", unique_colors(scene), lambda t: (t.color, t.kind))


def place_of(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """Where a thing named by its kind stands."""
    return _one(scene, rng, "place_of", unique_kinds(scene), lambda t: (t.kind, t.place))


def kind_at(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """What stands at a place."""
    return _one(scene, rng, "kind_at", list(scene.things), lambda t: (t.place, t.kind))


def color_at(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """The colour of what stands at a place."""
    return _one(scene, rng, "color_at", list(scene.things), lambda t: (t.place, t.color))


def _one(
    scene: SecondScene, rng: np.random.Generator, family: str, things: list[Thing],
    of: Callable[[Thing], tuple[str, str]],
) -> Categorised | None:  # fmt: skip
    """A question about one thing: `of` gives what it is named by and the answer."""
    if not things:
        return None
    t: Thing = _pick(rng, things)
    name, answer = of(t)
    return Categorised(phrase(rng, family, name), answer, family, **_about(scene, t))


def neighbours(scene: SecondScene) -> list[tuple[Thing, str, Thing]]:
    """(thing that its kind names, relation, thing in the cell next to it)."""
    return [
        (t, word, other)
        for t in unique_kinds(scene)
        for word, (down, right) in STEPS.items()
        if 0 <= t.row + down < GRID
        and 0 <= t.col + right < GRID
        and (other := scene.at(t.row + down, t.col + right)) is not None
    ]


def neighbour_kind(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """What stands next to a thing, on a given side."""
    return _neighbour(scene, rng, "neighbour_kind", lambda t: t.kind)


def neighbour_color(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """The colour of what stands next to a thing."""
    return _neighbour(scene, rng, "neighbour_color", lambda t: t.color)


def _neighbour(
    scene: SecondScene, rng: np.random.Generator, family: str, of: Callable[[Thing], str]
) -> Categorised | None:
    if not (options := neighbours(scene)):
        return None
    t, word, other = _pick(rng, options)
    text = phrase(rng, family, word, t.kind)
    return Categorised(text, of(other), family, **_about(scene, t, other))


def _two(scene: SecondScene, rng: np.random.Generator) -> tuple[Thing, Thing] | None:
    named = unique_kinds(scene)
    if len(named) < 2:
        return None
    i, j = rng.choice(len(named), 2, replace=False)
    return named[i], named[j]


def same_color(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """Whether two things have one colour; yes and no about equally likely over many scenes."""
    named = unique_kinds(scene)
    pairs = [(s, t) for s in named for t in named if s != t]
    same = [(s, t) for s, t in pairs if s.color == t.color]
    want = bool(rng.random() < (0.8 if same else 0.6))
    options = same if want else [pair for pair in pairs if pair not in same]
    if not options:
        return None
    s, t = _pick(rng, options)
    text = phrase(rng, "same_color", s.kind, t.kind)
    return Categorised(text, _yes(want), "same_color", **_about(scene, s, t))


def relation(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """Whether one thing stands on a side of another; yes and no equally likely."""
    if (pair := _two(scene, rng)) is None:
        return None
    s, t = pair
    fitting = [word for word, holds in RELATIONS.items() if holds(s, t)]
    word, want = _pick(rng, fitting), bool(rng.random() < 0.5)
    first, second = (s, t) if want else (t, s)
    text = phrase(rng, "relation", first.kind, second.kind, word)
    return Categorised(text, _yes(want), "relation", **_about(scene, s, t))


def which_first(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """Which of two things stands further to a side."""
    if (pair := _two(scene, rng)) is None:
        return None
    s, t = pair
    sides = {"left": t.col - s.col, "right": s.col - t.col, "top": t.row - s.row,
             "bottom": s.row - t.row}  # fmt: skip
    side = _pick(rng, [name for name, ahead in sides.items() if ahead])
    answer = s.kind if sides[side] > 0 else t.kind
    text = phrase(rng, "which_first", s.kind, t.kind, side)
    return Categorised(text, answer, "which_first", **_about(scene, s, t))


def presence(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """Whether a coloured kind is there, or a big one; yes and no equally likely.

    Half of the wrong pairs are mixed from what the scene shows, as POPE's adversarial ones, the
    others are as usual in scenes as the right ones, as POPE's popular ones.
    """
    if not scene.things:
        return None
    main, want = scene.salient, bool(rng.random() < 0.5)
    if main is not None and is_big(main) and rng.random() < 0.5:
        kind, color = usual_pair(rng, big=True)
        while (color, kind) == (main.color, main.kind):
            kind, color = usual_pair(rng, big=True)
        name = f"big {main.name if want else f'{color} {kind}'}"
        text = phrase(rng, "presence", a(name))
        return Categorised(text, _yes(want), "presence", **_about(scene, main))
    t: Thing = _pick(rng, scene.things)
    if want:
        return Categorised(phrase(rng, "presence", a(t.name)), "yes", "presence",
                           **_about(scene, t))  # fmt: skip
    present = set(present_pairs(scene))
    mixed = [(o.color, t.kind) for o in scene.things if (o.color, t.kind) not in present]
    color, kind = _pick(rng, mixed) if mixed and rng.random() < 0.5 else _absent(rng, present)
    found = [o for o in scene.things if o.kind == kind]
    return Categorised(phrase(rng, "presence", a(f"{color} {kind}")), "no", "presence",
                       **_about(scene, *found))  # fmt: skip


def _absent(
    rng: np.random.Generator, present: set[tuple[str, str]], like: Thing | None = None
) -> tuple[str, str]:
    """A usual pair (colour, kind) that is not there; of the kind of a thing, if one is named."""
    while True:
        kind, color = usual_pair(rng, big=bool(rng.random() < 0.3))
        if (color, kind) not in present and (like is None or kind == like.kind):
            return color, kind


def count(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """How many things there are."""
    if not scene.things:
        return None
    answer = str(len(scene.things))
    return Categorised(phrase(rng, "count"), answer, "count", **_about(scene, *scene.things))


def choice_present(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """Which of four coloured kinds is there; all are usual, one is of the right one's kind."""
    if not scene.things:
        return None
    t: Thing = _pick(rng, scene.things)
    seen = set(present_pairs(scene))
    names = [t.name]
    for like in (t, None, None):
        seen.add(pair := _absent(rng, seen, like))
        names.append(" ".join(pair))
    return _choice(scene, rng, "choice_present", "", names, t)


def choice_place(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """Where a thing stands, among four places."""
    if not (named := unique_kinds(scene)):
        return None
    t: Thing = _pick(rng, named)
    others = [p for p in PLACES if p != t.place]
    names = [t.place, *(others[i] for i in rng.choice(len(others), 3, replace=False))]
    return _choice(scene, rng, "choice_place", t.kind, names, t)


def choice_color(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """The colour of a thing, among four; the usual colour of its kind is among them."""
    if not (named := unique_kinds(scene)):
        return None
    t: Thing = _pick(rng, named)
    others = [c for c in COLORS if c not in (t.color, PAIRS.get(t.kind))]
    usual = [PAIRS[t.kind]] if PAIRS.get(t.kind, t.color) != t.color else []
    wrong = [*usual, *(others[i] for i in rng.permutation(len(others)))]
    names = [t.color, *wrong[:3]]
    return _choice(scene, rng, "choice_color", t.kind, names, t)


def _choice(
    scene: SecondScene, rng: np.random.Generator, family: str, part: str, names: list[str],
    thing: Thing,
) -> Categorised:  # fmt: skip
    """Options in random order; `names[0]` is the right one."""
    order = rng.permutation(len(names))
    lines = [f"{LETTERS[i]}. {names[j]}" for i, j in enumerate(order)]
    answer = LETTERS[int(np.flatnonzero(order == 0)[0])]
    text = "\n".join([phrase(rng, family, part), *lines])
    return Categorised(text, answer, family, **_about(scene, thing))


def read_number(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """The number in print. As in the papers' TextVQA the prompt holds what an OCR engine read.

    The engine is right half of the time; else it has one digit wrong.
    """
    if scene.plate is None:
        return None
    true = scene.plate.number
    hint = true if rng.random() < 0.5 else wrong_number(true, rng)
    text = f"{phrase(rng, 'read_number')}\ntext hint: {hint}"
    return Categorised(text, true, "read_number", scene.plate.cells, "salient")


def number_check(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """Whether a number is in print; yes and no equally likely."""
    if scene.plate is None:
        return None
    true, want = scene.plate.number, bool(rng.random() < 0.5)
    said = true if want else wrong_number(true, rng)
    text = phrase(rng, "number_check", said)
    return Categorised(text, _yes(want), "number_check", scene.plate.cells, "salient")


def wrong_number(true: str, rng: np.random.Generator) -> str:
    """A number that differs in one digit."""
    i = int(rng.integers(len(true)))
    digit = str(_pick(rng, [d for d in DIGITS if d != true[i]]))
    return true[:i] + digit + true[i + 1 :]


def follow_up(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """A second turn about what the first turn found: its question alone does not say what.

    The text holds the first turn with its answer, as the chat template writes it.
    """
    if not scene.things:
        return None
    t: Thing = _pick(rng, scene.things)
    openings = [("kind_at", t.place, "it_place")]
    if t in unique_colors(scene):
        openings.append(("kind_of", t.color, "it_color"))
    if t == scene.salient:
        openings.append(("main_kind", "", ""))
    opening, name, known = _pick(rng, openings)
    beside = [(word, o) for s, word, o in neighbours(scene) if s == t]
    others = [f for f in ("it_color", "it_place") if f != known] + ["it_neighbour"] * bool(beside)
    family, things = _pick(rng, others), [t]
    if family == "it_neighbour":
        word, other = _pick(rng, beside)
        second, answer, things = phrase(rng, family, word), other.kind, [t, other]
    else:
        second, answer = phrase(rng, family), t.color if family == "it_color" else t.place
    text = f"{phrase(rng, opening, name)} ASSISTANT: {t.kind}{EOS}USER: {second}"
    return Categorised(text, answer, "follow_up", **_about(scene, *things))


def describe(scene: SecondScene, rng: np.random.Generator) -> Categorised | None:
    """Every thing with size, colour, kind and place, in reading order; or the number."""
    return Categorised(phrase(rng, "describe"), listing(scene), "describe",
                       **_about(scene, *scene.things))  # fmt: skip


def listing(scene: SecondScene) -> str:
    """The scene's canonical description."""
    if scene.plate is not None:
        return f"the number {scene.plate.number}."
    return ", ".join(f"{a(full_name(t))} at the {t.place}" for t in scene.things) + "."


def full_name(thing: Thing) -> str:
    """Size (if big), colour and kind."""
    return f"big {thing.name}" if is_big(thing) else thing.name


FAMILIES: dict[str, Family] = {
    "main_kind": main_kind,
    "main_color": main_color,
    "main_place": main_place,
    "main_check": main_check,
    "color_of": color_of,
    "kind_of": kind_of,
    "place_of": place_of,
    "kind_at": kind_at,
    "color_at": color_at,
    "neighbour_kind": neighbour_kind,
    "neighbour_color": neighbour_color,
    "same_color": same_color,
    "relation": relation,
    "which_first": which_first,
    "presence": presence,
    "count": count,
    "choice_present": choice_present,
    "choice_place": choice_place,
    "choice_color": choice_color,
    "follow_up": follow_up,
    "describe": describe,
    "read_number": read_number,
    "number_check": number_check,
}
# What needs a second hop. It is learnt late, so training asks it more often.
TWO_HOPS = (
    "neighbour_kind", "neighbour_color", "same_color", "relation", "which_first", "follow_up",
)  # fmt: skip


def training_questions(
    scene: SecondScene, rng: np.random.Generator, number: int
) -> list[Categorised]:
    """`number` questions of all families, round robin over a shuffled list; at least one.

    Second hops are asked twice in a round. A sparse scene may not have so many questions.
    """
    found: dict[str, Categorised] = {}
    for _ in range(4):
        names = [*FAMILIES, *TWO_HOPS]
        for i in rng.permutation(len(names)):
            question = FAMILIES[names[i]](scene, rng)
            if question is not None:
                found.setdefault(question.text, question)
            if len(found) == number:
                return list(found.values())
    return list(found.values())
