"""Pocket scenes, second generation: small things, one of them often salient, and habits.

Three things set them apart from the first generation:

- a thing lies in a block of 2 x 2 patches, and a scene holds at most four: all of them together
  are no larger than a ninth of the picture (16 of 144 patches), the smallest usual budget;
- most scenes have one large thing, often in the centre: what a question is likely to be about;
- kinds have favourite colours and places, so a question alone suggests an answer, as in the
  world. A picture is still needed to be sure.

Print stands in scenes of its own. Scans and splits are those of the first generation; the seeds
give other scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from frugalvlm.pocket.scenes import (
    COLOR_WEIGHTS,
    COLORS,
    DIGITS,
    GRID,
    IMAGE_SIZE,
    KIND_WEIGHTS,
    KINDS,
    MAX_SLANT,
    PLACES,
    SPLITS,
    Plate,
    Scene,
    Split,
    Thing,
    background,
    ink,
    scan_split,
    shape,
)

PATCH = 8  # pixels
BLOCK = 2 * PATCH  # pixels; a thing lies inside a block of 2 x 2 patches
SMALL, BIG = (10, 12), (16, 16)  # pixels, smallest and largest
MAX_THINGS = 4
NUMBER_WEIGHTS = np.array([0.2, 0.2, 0.35, 0.25])  # of one to four things
PRINT_DIGITS, PRINT_WIDTH, PRINT_MARGIN = 3, 12, 2  # digits; pixels

# Favourites: half of the things are such a pair, and half of the things stand at home.
PAIRS = {
    "circle": "red", "square": "blue", "triangle": "green", "cross": "yellow",
    "7": "purple", "3": "orange", "1": "cyan", "0": "white",
}  # fmt: skip
HABIT, BIG_HABIT, REPEAT = 0.5, 0.85, 0.2
BIG_WEIGHTS = np.array([0.42, 0.2, 0.12, 0.08, 0.06, 0.05, 0.04, 0.03])  # what is big is usual
HOMES = {kind: (i * 4 + 1) % len(PLACES) for i, kind in enumerate(KINDS)}
CENTER = (GRID // 2, GRID // 2)


class Print(Plate):
    """A number in print, dark on light: three digits in one row, two cells wide."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return PRINT_WIDTH * len(self.number) + 2 * PRINT_MARGIN, PRINT_WIDTH + 2 * PRINT_MARGIN

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """The cells (row, column) that it lies on, from left to right."""
        return ((self.row, self.col), (self.row, self.col + 1))


@dataclass(frozen=True)
class SecondScene(Scene):
    """A scene of the second generation. `plate` is a `Print`, and then nothing else is there."""

    def image(self) -> Image.Image:
        """Draw the scene: an RGB picture of 96 x 96 pixels."""
        return Image.fromarray(draw(self))

    @property
    def salient(self) -> Thing | None:
        """The one thing that stands out: the big one, or the only one."""
        if len(self.things) == 1:
            return self.things[0]
        return next((t for t in self.things if is_big(t)), None)


def is_big(thing: Thing) -> bool:
    """Whether a thing is large."""
    return thing.size >= BIG[0]


def make_scene(
    split: Split,
    seed: int,
    max_things: int = MAX_THINGS,
    printed: bool = False,
    side: int = IMAGE_SIZE,
) -> SecondScene:
    """The scene with this seed: the same for ever, on every machine.

    Args:
        split: chooses the handwriting scans; splits share neither scans nor seeds.
        seed: any non-negative integer.
        max_things: at most this many things (1 to 4); a curriculum for training starts low.
        printed: a number in print, and no things.
        side: pixels, a multiple of 96. Things and print keep their size in pixels, so that in a
            larger picture they are small: too small to tell apart once it is shrunk to 96 pixels.
    """
    if side % IMAGE_SIZE:
        raise ValueError(f"side must be a multiple of {IMAGE_SIZE}, got {side}.")
    cell = side // GRID
    if not 1 <= max_things <= MAX_THINGS:
        raise ValueError(f"max_things must be 1 to {MAX_THINGS}, got {max_things}.")
    rng = np.random.default_rng([2, SPLITS.index(split), seed])
    scans = scan_split()[split]
    if printed:
        return SecondScene(split, seed, (), _print(rng, scans, cell), side)
    weights = NUMBER_WEIGHTS[:max_things] / NUMBER_WEIGHTS[:max_things].sum()
    number = 1 + int(rng.choice(max_things, p=weights))
    things: list[Thing] = []
    has_big = rng.random() < 0.8
    for i in range(number):
        big = has_big and i == 0
        kind, color = usual_pair(rng, big)
        if things and rng.random() < REPEAT:  # of the same colour as another thing
            color = things[int(rng.integers(i))].color
        row, col = _place(rng, kind, things, big)
        size = int(
            rng.integers(*BIG, endpoint=True) if big else rng.integers(*SMALL, endpoint=True)
        )
        # A block starts on the grid of patches, and the thing lies anywhere inside it.
        across, down = rng.integers(cell // PATCH - 1, size=2) * PATCH
        right, low = rng.integers(BLOCK - size + 1, size=2)
        x, y = int(col * cell + across + right), int(row * cell + down + low)
        scan = int(rng.choice(scans[kind])) if kind in DIGITS else -1
        things.append(Thing(kind, color, row, col, x, y, size, scan))
    things.sort(key=lambda t: (t.row, t.col))
    return SecondScene(split, seed, tuple(things), None, side)


def usual_pair(rng: np.random.Generator, big: bool = False) -> tuple[str, str]:
    """Kind and colour of a thing, as often as scenes have them."""
    if rng.random() < (BIG_HABIT if big else HABIT):
        weights = BIG_WEIGHTS if big else COLOR_WEIGHTS
        kind = list(PAIRS)[int(rng.choice(len(PAIRS), p=weights))]
        return kind, PAIRS[kind]
    kind = KINDS[int(rng.choice(len(KINDS), p=KIND_WEIGHTS))]
    return kind, list(COLORS)[int(rng.choice(len(COLORS), p=COLOR_WEIGHTS))]


def _place(
    rng: np.random.Generator, kind: str, things: Sequence[Thing], big: bool
) -> tuple[int, int]:
    """The centre for many big things, home for many others, else beside a thing or anywhere."""
    taken = {(t.row, t.col) for t in things}
    habit = rng.random()
    home = CENTER if big else divmod(HOMES[kind], GRID)
    if habit < HABIT and home not in taken:
        return home
    free = [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in taken]
    near = [p for p in free if any(abs(p[0] - r) + abs(p[1] - c) == 1 for r, c in taken)]
    options = near if near and rng.random() < 0.7 else free
    return options[int(rng.integers(len(options)))]


def _print(rng: np.random.Generator, scans: dict[str, np.ndarray], cell: int) -> Print:
    number = "".join(rng.choice(DIGITS, PRINT_DIGITS))
    row, col = int(rng.integers(GRID)), int(rng.integers(GRID - 1))
    chosen = tuple(int(rng.choice(scans[d])) for d in number)
    blank = Print(number, row, col, 0, 0, chosen)
    wide = (2 * cell - blank.size[0]) // PATCH
    x = col * cell + PATCH * int(rng.integers(wide + 1))
    y = row * cell + PATCH * int(rng.integers(cell // PATCH - 1))
    return Print(number, row, col, x, y, chosen)


def draw(scene: SecondScene) -> np.ndarray:
    """Draw a scene: uint8 [96, 96, 3]. Deterministic in the scene."""
    rng = np.random.default_rng([2, SPLITS.index(scene.split), scene.seed, 1])
    canvas = background(rng, scene.side)
    if isinstance(scene.plate, Print):
        _draw_print(canvas, scene.plate, rng)
    for thing in scene.things:
        turn = rng.normal(0, MAX_SLANT / 2)
        mask = (
            ink(thing.scan, thing.size, turn) if thing.is_digit else shape(thing.kind, thing.size)
        )
        color = np.clip(np.array(COLORS[thing.color]) + rng.normal(0, 8, 3), 0, 255)
        box = np.s_[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
        canvas[box] = mask[..., None] * color + (1 - mask[..., None]) * canvas[box]
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _draw_print(canvas: np.ndarray, number: Print, rng: np.random.Generator) -> None:
    width, height = number.size
    canvas[number.y : number.y + height, number.x : number.x + width] = 205 + rng.normal(0, 6, 3)
    for i, scan in enumerate(number.scans):
        dark = ink(scan, PRINT_WIDTH, rng.normal(0, MAX_SLANT / 2))[..., None]
        x, y = number.x + PRINT_MARGIN + i * PRINT_WIDTH, number.y + PRINT_MARGIN
        box = np.s_[y : y + PRINT_WIDTH, x : x + PRINT_WIDTH]
        canvas[box] = dark * np.array([20, 20, 30]) + (1 - dark) * canvas[box]
