"""The benchmarks of the second generation of pocket scenes; official metrics, as in the first.

About half of the questions are about what stands out, as the papers' benchmarks ask, the others
are fine-grained; a row's category says which: `salient/FAMILY` or `fine/FAMILY`. Print is asked
about in its own benchmark only, whose prompts hold what an OCR engine read, as the papers' do.
They join `BENCHMARKS` when a model has passed the gate on them; until then they stand apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from frugalvlm.benchmarks.base import (
    Asked,
    Asker,
    Benchmark,
    Row,
    Scans,
    Sheet,
    category_accuracy,
    mean_sheet,
    sum_per_image,
)
from frugalvlm.benchmarks.metrics import exact_match, f1, option_letter, pope_label
from frugalvlm.benchmarks.pocket_caption import POCKET_CAPTION
from frugalvlm.pocket.questions import LETTERS
from frugalvlm.pocket.scenes import IMAGE_SIZE
from frugalvlm.pocket.second.questions import CATEGORIES, FAMILIES, Categorised
from frugalvlm.pocket.second.scenes import SecondScene, make_scene

PER_IMAGE = 2  # one question about what stands out, one about something else
TRIES = 48  # draws of a question until it has the wanted category and answer


@dataclass(frozen=True)
class SecondBenchmark(Benchmark):
    """A benchmark about scenes of the second generation; `printed` ones show a number only."""

    printed: bool = False

    def make(self, split: Scans, seed: int) -> SecondScene:
        """The scene of a seed."""
        return make_scene(split, seed, printed=self.printed, side=self.side)


@dataclass(frozen=True)
class Mix:
    """Which families a benchmark asks, in turn, and which answers must alternate.

    Attributes:
        salient: families of the question about what stands out.
        fine: families of the other question.
        wanted: answers that take turns in every family whose answers they are.
    """

    salient: tuple[str, ...]
    fine: tuple[str, ...]
    wanted: tuple[str, ...] = ("yes", "no")

    def __call__(self, scene: SecondScene, number: int, rng: np.random.Generator) -> Asked | None:
        """One question of each category about a scene; None where it cannot be asked them."""
        asked: Asked = []
        for category, families in zip(CATEGORIES, (self.salient, self.fine), strict=True):
            cycle, place = divmod(number, len(families))
            family = families[place]
            want = self.wanted[cycle % len(self.wanted)]
            question = _draw(scene, rng, family, category, want, self.wanted)
            if question is None:
                return None
            asked.append((f"{category}/{family}", question))
        return asked


def _draw(
    scene: SecondScene, rng: np.random.Generator, family: str, category: str, want: str,
    wanted: Sequence[str],
) -> Categorised | None:  # fmt: skip
    for _ in range(TRIES):
        question = FAMILIES[family](scene, rng)
        if question is None or question.category != category:
            continue
        if question.answer == want or question.answer not in wanted:
            return question
    return None


def _exact(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    pairs = zip(rows, answers, strict=True)
    return mean_sheet(rows, [0.0 if a is None else exact_match(a, r["answer"]) for r, a in pairs])


def _letters(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    said = [None if a is None else option_letter(a) for a in answers]
    return mean_sheet(rows, [float(s == r["answer"]) for s, r in zip(said, rows, strict=True)])


def _pope(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
    """F1 of "yes" over all questions. A failed answer is wrong whatever the truth."""
    truth = np.array([row["answer"] == "yes" for row in rows])
    said = [None if a is None else pope_label(a) for a in answers]
    right = np.array([s == r["answer"] for s, r in zip(said, rows, strict=True)])
    columns = np.stack([truth & right, ~truth & ~right, truth & ~right], axis=1).astype(float)
    ids, sums = sum_per_image(rows, columns)
    details = category_accuracy(rows, right.astype(float))
    return Sheet(ids, sums, right.astype(float), _f1, details=details)


def _f1(totals: np.ndarray) -> np.ndarray:
    return 100 * f1(totals[..., 0], totals[..., 1], totals[..., 2])


def _read(scene: SecondScene, number: int, rng: np.random.Generator) -> Asked | None:
    """The number, and whether it is a given one; the OCR engine is right every second time."""
    true = scene.plate.number if scene.plate is not None else ""
    hinted = ("right", "wrong")[number % 2]
    for _ in range(TRIES):
        question = FAMILIES["read_number"](scene, rng)
        if question is not None and question.text.endswith(true) == (hinted == "right"):
            return [(f"salient/read_number_{hinted}_hint", question)]
    return None


def _describe(scene: SecondScene, number: int, rng: np.random.Generator) -> Asked | None:
    question = FAMILIES["describe"](scene, rng)
    return None if question is None else [(f"{len(scene.things)} things", question)]


def _seeds(first: int) -> int:
    """First seeds lie behind those of the first generation."""
    return 50_000_000 + first * 1_000_000


_NUMBER = count()


def _benchmark(name: str, official: str, metric: str, ask: Asker, **changes: object
               ) -> SecondBenchmark:  # fmt: skip
    settings: dict = {"headline_max": 100.0, "max_new_tokens": 4, "per_image": PER_IMAGE,
                      "score": _exact, **changes}  # fmt: skip
    return SecondBenchmark(id=name, stands_for=official, metric=metric,
                           first_seed=_seeds(next(_NUMBER)), ask=ask, **settings)  # fmt: skip


_ALL = (
    _benchmark(
        "pocket-gqa-2", "GQA", "exact match",
        Mix(("main_color", "main_kind", "color_of", "place_of"),
            ("neighbour_color", "relation", "color_of", "neighbour_kind", "which_first",
             "same_color")),
    ),
    _benchmark(
        "pocket-pope-2", "POPE", "F1", Mix(("presence",), ("presence",)),
        score=_pope, max_new_tokens=3,
    ),
    _benchmark(
        "pocket-mme-2", "MME (perception)", "accuracy",
        Mix(("main_check", "presence"), ("relation", "same_color", "presence")), max_new_tokens=3,
    ),
    _benchmark(
        "pocket-textvqa-2", "TextVQA", "exact match", _read,
        per_image=1, max_new_tokens=5, printed=True,
    ),
    _benchmark(
        "pocket-sqa-2", "ScienceQA (image part)", "accuracy",
        Mix(("choice_present", "choice_color", "choice_place"),
            ("choice_present", "choice_color", "choice_place"), LETTERS),
        score=_letters, max_new_tokens=3,
    ),
    _benchmark(
        "pocket-vqav2-2", "VQAv2", "exact match",
        Mix(("main_place", "main_check", "main_color", "kind_of"),
            ("count", "color_of", "kind_at", "place_of", "color_at")),
    ),
)  # fmt: skip
SECOND_BENCHMARKS: dict[str, SecondBenchmark] = {b.id: b for b in _ALL}
# The same questions about scenes of 192 x 192 pixels, in which print and things are small.
SECOND_HD_BENCHMARKS: dict[str, SecondBenchmark] = {
    f"{id}-hd": replace(
        benchmark, id=f"{id}-hd", first_seed=benchmark.first_seed + 20_000_000, side=2 * IMAGE_SIZE
    )
    for id, benchmark in SECOND_BENCHMARKS.items()
}
# Where a choice of tokens that knows one question only is said to fail.
SECOND_EXTRAS: dict[str, SecondBenchmark] = {
    b.id: b
    for b in (
        _benchmark(
            "pocket-dialogue-2", "conversations of several turns", "exact match",
            Mix(("follow_up",), ("follow_up",)),
        ),
        _benchmark(
            "pocket-caption-2", "NoCaps (captions)", "F1 of objects", _describe,
            score=POCKET_CAPTION.score, per_image=1, max_new_tokens=56,
        ),
    )
}  # fmt: skip
