"""Pocket clips: eight pictures in which things move by a cell, stay, or appear one after another.

Every frame is a pocket scene, drawn by the scenes' own code on one background that does not change.
Two things are there from the start, and each moves by one cell or stays; three new ones appear, one
after another, and stay. A step is taken from one frame to the next, so no frame alone shows that
anything moves, and nothing in a frame tells a new thing from an old one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from frugalvlm.pocket.questions import Question
from frugalvlm.pocket.scenes import (
    CELL,
    COLORS,
    DIGITS,
    GRID,
    KINDS,
    SPLITS,
    THING_SIZES,
    Scene,
    Split,
    Thing,
    scan_split,
)

FRAMES = 8
OLD, NEW = 2, 3  # things that are there from the start, and things that appear later
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}
ENDS = {"first": 0, "last": FRAMES - 1}


@dataclass(frozen=True)
class Actor:
    """A thing of a clip, as it stands at first; what it does, and when."""

    thing: Thing
    appears: int  # the first frame that shows it
    step: str  # a key of STEPS
    moves: int  # the first frame after its step

    def cell(self, frame: int) -> tuple[int, int] | None:
        """Row and column in a frame; None before it appears."""
        if frame < self.appears:
            return None
        down, right = STEPS[self.step] if frame >= self.moves else (0, 0)
        return self.thing.row + down, self.thing.col + right

    def at(self, frame: int) -> Thing | None:
        """The thing as a frame shows it; None before it appears."""
        if (cell := self.cell(frame)) is None:
            return None
        t, (row, col) = self.thing, cell
        x, y = t.x + (col - t.col) * CELL, t.y + (row - t.row) * CELL
        return replace(t, row=row, col=col, x=x, y=y)


@dataclass(frozen=True)
class Clip:
    """What eight frames show. `split` and `seed` identify it; the rest follows from them."""

    split: Split
    seed: int
    actors: tuple[Actor, ...]  # in the order in which they appear

    def scene(self, frame: int) -> Scene:
        """What a frame (0 to 7) shows."""
        shown = [thing for actor in self.actors if (thing := actor.at(frame)) is not None]
        # A scene's seed draws its background, then thing after thing. Things come in their order
        # of appearance, so a new one leaves ground, tint and slant of the others as they were.
        return Scene(self.split, self.seed, tuple(shown), None)

    def frames(self) -> list[Image.Image]:
        """Draw the clip: 8 RGB pictures of 96 x 96 pixels."""
        return [self.scene(frame).image() for frame in range(FRAMES)]


def make_clip(split: Split, seed: int) -> Clip:
    """The clip with this seed: the same for ever, on every machine.

    Args:
        split: chooses the handwriting scans, as for scenes.
        seed: any non-negative integer.
    """
    rng = np.random.default_rng([SPLITS.index(split), seed, 2])  # 0 and 1 make and draw scenes
    count = OLD + NEW
    kinds = rng.choice(KINDS, count, replace=False)
    colors = rng.choice(list(COLORS), count, replace=False)
    things = [_thing(split, str(k), str(c), rng) for k, c in zip(kinds, colors, strict=True)]
    appears = [0] * OLD + sorted((1 + rng.choice(FRAMES - 1, NEW, replace=False)).tolist())
    steps = [*map(str, rng.choice(list(STEPS), OLD)), *["still"] * NEW]
    moves = rng.integers(1, FRAMES, count).tolist()
    # Only cells are drawn again until they fit, so that all steps stay equally likely.
    while True:
        cells = (divmod(cell, GRID) for cell in rng.integers(GRID * GRID, size=count).tolist())
        placed = [
            replace(t, row=row, col=col, x=t.x + col * CELL, y=t.y + row * CELL)
            for t, (row, col) in zip(things, cells, strict=True)
        ]
        actors = tuple(map(Actor, placed, appears, steps, moves))
        if _fit(actors):
            return Clip(split, seed, actors)


def _thing(split: Split, kind: str, color: str, rng: np.random.Generator) -> Thing:
    """A thing somewhere in the top left cell."""
    size = int(rng.integers(THING_SIZES[0], THING_SIZES[1] + 1))
    x, y = rng.integers(CELL - size + 1, size=2).tolist()
    scan = int(rng.choice(scan_split()[split][kind])) if kind in DIGITS else -1
    return Thing(kind, color, 0, 0, x, y, size, scan)


def _fit(actors: tuple[Actor, ...]) -> bool:
    """Whether in every frame all things are in the picture, each in a cell of its own."""
    for frame in range(FRAMES):
        cells = [cell for actor in actors if (cell := actor.cell(frame)) is not None]
        if len(set(cells)) < len(cells):
            return False
        if not all(0 <= row < GRID and 0 <= col < GRID for row, col in cells):
            return False
    return True


def motion(clip: Clip, rng: np.random.Generator) -> Question | None:
    """Which way one of the first things moves: left, right, up or down; or still."""
    return _motion(clip, clip.actors[int(rng.integers(OLD))])


def _motion(clip: Clip, actor: Actor) -> Question:
    ends = {cell for frame in ENDS.values() if (cell := actor.cell(frame)) is not None}
    text = f"which way does the {actor.thing.kind} move?"
    return Question(text, actor.step, "motion", tuple(sorted(ends)))


def order(clip: Clip, rng: np.random.Generator, end: str | None = None) -> Question | None:
    """Which of the things that were not there from the start appears first, or last.

    Args:
        clip: the clip.
        rng: chooses between first and last.
        end: "first" or "last", where it is not left to chance.
    """
    end = end or str(rng.choice(list(ENDS)))
    thing = clip.actors[OLD if end == "first" else -1].thing
    text = f"which new thing appears {end}?"
    return Question(text, thing.kind, "order", ((thing.row, thing.col),))


def place(clip: Clip, rng: np.random.Generator, end: str | None = None) -> Question | None:
    """What stands at a place in the first or last frame, and does not in the other one.

    Arguments as for `order`.
    """
    end = end or str(rng.choice(list(ENDS)))
    own, other = (clip.scene(ENDS[e]) for e in (end, "first" if end == "last" else "last"))
    changed = [t for t in own.things if (o := other.at(t.row, t.col)) is None or o.kind != t.kind]
    if not changed:
        return None
    t = changed[int(rng.integers(len(changed)))]
    text = f"what is at the {t.place} in the {end} frame?"
    return Question(text, t.kind, "place", ((t.row, t.col),))


CLIP_FAMILIES: dict[str, Callable[[Clip, np.random.Generator], Question | None]] = {
    "motion": motion,
    "order": order,
    "place": place,
}


def clip_questions(clip: Clip, rng: np.random.Generator) -> list[Question]:
    """What a clip can be asked in training: both motions, both orders, a place at either end."""
    asked = [place(clip, rng, end) for end in ENDS] + [order(clip, rng, end) for end in ENDS]
    asked += [_motion(clip, actor) for actor in clip.actors[:OLD]]
    return [question for question in asked if question is not None]
