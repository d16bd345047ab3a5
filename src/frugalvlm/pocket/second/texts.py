"""Scenes as texts: what a decoder reads before it meets a picture, and what a tower is shown.

A text tells the facts of a scene one by one, in any order: a thing is introduced, later it is
said what colour it has, or that something stands on a side of it. To answer, a reader must first
put together what the sentences say about one thing, as a decoder that meets a picture must put
together what several patches show. Nothing in a text is a token that answers by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from frugalvlm.pocket.questions import STEPS
from frugalvlm.pocket.scenes import Thing
from frugalvlm.pocket.second.questions import a, full_name, listing
from frugalvlm.pocket.second.scenes import SecondScene, is_big

ORDINALS = ("one", "two", "three", "four")  # handles of things, in random order
NEW_WORDS = ("three", "four", "caption", "photo", "print")


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def story(scene: SecondScene, rng: np.random.Generator) -> str:
    """The whole scene in sentences; two stories of one scene differ, their facts do not."""
    if scene.plate is not None:
        number = scene.plate.number
        return str(_pick(rng, (f"the number {number} is written.", f"print shows {number}.")))
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    first, later = [], []
    for i, thing in enumerate(things):
        known = things[:i]
        if rng.random() < 0.5:
            first.append(_whole(rng, thing, known))
        else:
            opening, facts = _by_facts(rng, f"thing {ORDINALS[i]}", thing, known)
            first.append(opening)
            later += facts
    # Facts may come long after the thing that they are about.
    return " ".join([*first, *(later[i] for i in rng.permutation(len(later)))])


def _whole(rng: np.random.Generator, thing: Thing, known: Sequence[Thing]) -> str:
    """A thing in one sentence."""
    name, where = a(full_name(thing)), _where(rng, thing, known)
    return str(
        _pick(rng, (f"there is {name} {where}.", f"{where} is {name}.", f"{name} stands {where}."))
    )


def _by_facts(
    rng: np.random.Generator, handle: str, thing: Thing, known: Sequence[Thing]
) -> tuple[str, list[str]]:
    """A sentence that says one fact about a thing, and sentences with its others."""
    facts = [f"{handle} is {a(thing.kind)}.", f"{handle} is {thing.color}.",
             f"{handle} is {_where(rng, thing, known)}."]  # fmt: skip
    if is_big(thing):
        facts.append(f"{handle} is big.")
    facts = [facts[i] for i in rng.permutation(len(facts))]
    return facts[0], facts[1:]


def _where(rng: np.random.Generator, thing: Thing, known: Sequence[Thing]) -> str:
    """A place by name, or by a thing beside it that was told before."""
    beside = [
        f"{word} the {other.name}"
        for other in known
        for word, (down, right) in STEPS.items()
        if (other.row + down, other.col + right) == (thing.row, thing.col)
        and sum(t.name == other.name for t in known) == 1
    ]
    if beside and rng.random() < 0.3:
        return str(_pick(rng, beside))
    return f"at the {thing.place}"


def caption(scene: SecondScene, rng: np.random.Generator) -> str:
    """What somebody writes under a photo: what stands out always, the rest now and then."""
    if scene.plate is not None:
        return listing(scene)
    main = scene.salient
    told = [t for t in scene.things if t == main or rng.random() < 0.6] or [scene.things[0]]
    told.sort(key=lambda t: t != main)
    return ", ".join(f"{a(full_name(t))} at the {t.place}" for t in told) + "."
