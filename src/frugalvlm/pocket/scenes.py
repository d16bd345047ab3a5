"""Pocket scenes: 96x96 pictures composed from real handwriting and simple shapes.

A scene is a small record (which things, which colours, where). Its picture is drawn from the
record and every question is answered from the record, so truth never depends on a model.
Handwriting comes from the UCI optical digits scans that ship inside scikit-learn
(`sklearn.datasets.load_digits`, 1,797 scans of 8x8 pixels). The scans are divided once into train,
development and test, so that the digits of a test picture were never seen in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

IMAGE_SIZE = 96  # pixels
GRID = 3  # things stand in the cells of a 3x3 grid
CELL = IMAGE_SIZE // GRID  # pixels

DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = SHAPES + DIGITS
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "blue": (45, 75, 235),
    "green": (40, 185, 60),
    "yellow": (240, 225, 40),
    "purple": (155, 45, 200),
    "orange": (250, 140, 20),
    "cyan": (50, 220, 230),
    "white": (250, 250, 250),
}
PLACES = (
    "top left", "top middle", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom middle", "bottom right",
)  # fmt: skip

# Kinds and colours are not equally frequent: "popular" negatives (POPE) need a popular thing.
KIND_WEIGHTS = np.array([0.14, 0.12, 0.10, 0.08] + [0.056] * 10)
COLOR_WEIGHTS = np.array([0.20, 0.17, 0.15, 0.13, 0.10, 0.10, 0.08, 0.07])

MAX_SLANT = 12.0  # degrees; two standard deviations of the turn given to each digit
THING_SIZES = (18, 24)  # pixels, smallest and largest
PLATE_DIGIT_WIDTH = 16  # pixels
PLATE_MARGIN = 3  # pixels of light ground around the digits
PLATE_DIGITS = (3, 5)  # a number plate shows three to five digits
MAX_THINGS = 5


@dataclass(frozen=True)
class Thing:
    """One object: its kind, colour, grid cell, pixel box and (for a digit) its scan."""

    kind: str
    color: str
    row: int
    col: int
    x: int  # left edge, pixels
    y: int  # upper edge, pixels
    size: int  # pixels
    scan: int = -1  # index into load_digits, -1 for a shape

    @property
    def place(self) -> str:
        """The name of the thing's cell."""
        return PLACES[GRID * self.row + self.col]

    @property
    def name(self) -> str:
        """Colour and kind, for example `red circle`."""
        return f"{self.color} {self.kind}"

    @property
    def is_digit(self) -> bool:
        """Whether the thing is handwriting."""
        return self.kind in DIGITS


@dataclass(frozen=True)
class Plate:
    """A number plate: dark handwriting on a light ground, two or three cells wide."""

    number: str
    row: int
    col: int  # leftmost of its cells
    x: int
    y: int
    scans: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return _plate_size(len(self.number))

    @property
    def cells(self) -> tuple[tuple[int, int], ...]:
        """The cells (row, column) that it lies on, from left to right."""
        return tuple((self.row, self.col + i) for i in range(_plate_cells(len(self.number))))


def _plate_size(digits: int) -> tuple[int, int]:
    return PLATE_DIGIT_WIDTH * digits + 2 * PLATE_MARGIN, PLATE_DIGIT_WIDTH + 2 * PLATE_MARGIN


def _plate_cells(digits: int) -> int:
    return -(-_plate_size(digits)[0] // CELL)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `split`, `seed` and `side` identify it; the rest follows from them."""

    split: Split
    seed: int
    things: tuple[Thing, ...]
    plate: Plate | None
    side: int = IMAGE_SIZE  # pixels

    def image(self) -> Image.Image:
        """Draw the scene: an RGB picture of `side` x `side` pixels."""
        return Image.fromarray(draw(self))

    def at(self, row: int, col: int) -> Thing | None:
        """The thing in a cell, or None."""
        return next((t for t in self.things if (t.row, t.col) == (row, col)), None)


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Ink in 0..1 [1797, 8, 8] and labels [1797]."""
    from sklearn.datasets import load_digits  # not needed to load a model

    digits = load_digits()
    return digits.images.astype(np.float32) / 16.0, digits.target


@lru_cache(maxsize=1)
def scan_split() -> dict[Split, dict[str, np.ndarray]]:
    """Scan indices per split and digit: 70 % train, 10 % dev, 20 % test, fixed for ever."""
    labels = _scans()[1]
    rng = np.random.default_rng(20241204)
    parts: dict[Split, dict[str, np.ndarray]] = {s: {} for s in SPLITS}
    for digit in DIGITS:
        indices = rng.permutation(np.flatnonzero(labels == int(digit)))
        first, second = int(0.7 * len(indices)), int(0.8 * len(indices))
        for split, part in zip(SPLITS, np.split(indices, [first, second]), strict=True):
            parts[split][digit] = part
    return parts


@cache
def _enlarged(scan: int, size: int) -> Image.Image:
    small = Image.fromarray((_scans()[0][scan] * 255).astype(np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def ink(scan: int, size: int, slant: float) -> np.ndarray:
    """A scan enlarged to [size, size] and turned by `slant` degrees, ink in 0..1."""
    turned = _enlarged(scan, size).rotate(slant, Image.Resampling.BILINEAR)
    return np.clip(np.asarray(turned, dtype=np.float32) / 255.0 * 1.25, 0, 1)


@lru_cache(maxsize=64)
def shape(kind: str, size: int) -> np.ndarray:
    """A filled shape [size, size], 1 inside."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1  # -1..1
    inside = {
        "circle": x**2 + y**2 <= 0.92,
        "square": np.maximum(abs(x), abs(y)) <= 0.82,
        "triangle": (y <= 0.85) & (abs(x) <= (y + 0.95) / 1.9),
        "cross": (np.minimum(abs(x), abs(y)) <= 0.28) & (np.maximum(abs(x), abs(y)) <= 0.95),
    }[kind]
    return inside.astype(np.float32)


def _rng(split: Split, seed: int, use: int) -> np.random.Generator:
    return np.random.default_rng([SPLITS.index(split), seed, use])


def make_scene(
    split: Split, seed: int, max_things: int = MAX_THINGS, side: int = IMAGE_SIZE
) -> Scene:
    """The scene with this seed: the same for ever, on every machine.

    Args:
        split: chooses the handwriting scans; splits share neither scans nor seeds.
        seed: any non-negative integer.
        max_things: at most this many things (1 to 5); a curriculum for training starts low.
        side: pixels, a multiple of 96. Things and print keep their size in pixels, so that in a
            larger picture they are small: too small to read once it is shrunk to 96 pixels.
    """
    if not 1 <= max_things <= MAX_THINGS:
        raise ValueError(f"max_things must be 1 to {MAX_THINGS}, got {max_things}.")
    if side % IMAGE_SIZE:
        raise ValueError(f"side must be a multiple of {IMAGE_SIZE}, got {side}.")
    rng = _rng(split, seed, 0)
    scans = scan_split()[split]
    cell = side // GRID
    free = [(r, c) for r in range(GRID) for c in range(GRID)]

    plate = None
    if rng.random() < 0.5:
        count = int(rng.integers(PLATE_DIGITS[0], PLATE_DIGITS[1] + 1))
        row, col = int(rng.integers(GRID)), int(rng.integers(GRID - _plate_cells(count) + 1))
        number = "".join(rng.choice(DIGITS, count))
        width, height = _plate_size(count)
        plate = Plate(
            number, row, col,
            x=col * cell + int(rng.integers(_plate_cells(count) * cell - width + 1)),
            y=row * cell + int(rng.integers(cell - height + 1)),
            scans=tuple(int(rng.choice(scans[d])) for d in number),
        )  # fmt: skip
        free = [place for place in free if place not in plate.cells]

    things: list[Thing] = []
    chosen = rng.permutation(len(free))[: int(rng.integers(1, max_things + 1))]
    for row, col in sorted(free[i] for i in chosen):
        # About one thing in four repeats an earlier kind or colour, so counting has work to do.
        repeat = things[int(rng.integers(len(things)))] if things and rng.random() < 0.25 else None
        kind, color = str(rng.choice(KINDS, p=KIND_WEIGHTS)), str(_choose_color(rng))
        if repeat is not None:
            kind, color = (repeat.kind, color) if rng.random() < 0.5 else (kind, repeat.color)
        size = int(rng.integers(THING_SIZES[0], THING_SIZES[1] + 1))
        things.append(
            Thing(
                kind, color, row, col,
                x=col * cell + int(rng.integers(cell - size + 1)),
                y=row * cell + int(rng.integers(cell - size + 1)),
                size=size,
                scan=int(rng.choice(scans[kind])) if kind in DIGITS else -1,
            )
        )  # fmt: skip
    return Scene(split, seed, tuple(things), plate, side)


def _choose_color(rng: np.random.Generator) -> str:
    return list(COLORS)[int(rng.choice(len(COLORS), p=COLOR_WEIGHTS))]


def draw(scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 [side, side, 3]. Deterministic in the scene."""
    rng = _rng(scene.split, scene.seed, 1)
    canvas = background(rng, scene.side)
    if scene.plate is not None:
        _draw_plate(canvas, scene.plate, rng)
    for thing in scene.things:
        mask = (
            ink(thing.scan, thing.size, rng.normal(0, MAX_SLANT / 2))
            if thing.is_digit
            else shape(thing.kind, thing.size)
        )[..., None]
        color = np.clip(np.array(COLORS[thing.color]) + rng.normal(0, 8, 3), 0, 255)
        box = np.s_[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
        canvas[box] = mask * color + (1 - mask) * canvas[box]
    return np.clip(canvas, 0, 255).astype(np.uint8)


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """A dim texture: a coarse random field, enlarged, plus grain; float32 [side, side, 3]."""
    knots = side // 16
    coarse = rng.uniform(35, 105, (knots, knots, 1)) + rng.normal(0, 9, (knots, knots, 3))
    field = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    smooth = field.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(smooth, dtype=np.float32) + rng.normal(0, 5, (side, side, 1))


def _draw_plate(canvas: np.ndarray, plate: Plate, rng: np.random.Generator) -> None:
    width, height = plate.size
    canvas[plate.y : plate.y + height, plate.x : plate.x + width] = 205 + rng.normal(0, 6, 3)
    for i, scan in enumerate(plate.scans):
        dark = ink(scan, PLATE_DIGIT_WIDTH, rng.normal(0, MAX_SLANT / 2))[..., None]
        x, y = plate.x + PLATE_MARGIN + i * PLATE_DIGIT_WIDTH, plate.y + PLATE_MARGIN
        box = np.s_[y : y + PLATE_DIGIT_WIDTH, x : x + PLATE_DIGIT_WIDTH]
        canvas[box] = dark * np.array([20, 20, 30]) + (1 - dark) * canvas[box]
