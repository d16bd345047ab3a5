"""What every pocket benchmark shares: the prompt, the rows of a data set, and a scored sheet.

A benchmark is data: two functions (what to ask about a scene, how to score the answers) and a few
numbers. Its pictures come from development or test scans that training never saw; its scene seeds
are its own (`first_seed`, with the upper half of a million kept for what is reported), and those of
training start at a hundred million. The split "replication" is a second test set: other scenes of
the test scans, for asking whether a finding comes again.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image, List, Value

from frugalvlm.pocket.questions import Question
from frugalvlm.pocket.scenes import IMAGE_SIZE, make_scene

EvalSplit = Literal["dev", "test", "replication"]
Scans = Literal["dev", "test"]  # those with scans of their own; replication has those of test
EVAL_SPLITS: tuple[Scans, ...] = ("dev", "test")
SEEDS_PER_SPLIT = 500_000
# Behind a benchmark's `first_seed`; "replication" shares no scene with 50,000 test questions.
SEEDS_OF: Mapping[EvalSplit, int] = {
    "dev": 0, "test": SEEDS_PER_SPLIT, "replication": SEEDS_PER_SPLIT + SEEDS_PER_SPLIT // 2,
}  # fmt: skip
MAX_QUESTIONS = 100_000  # so that no benchmark runs into the seeds of the next one

Row = Mapping[str, Any]
Shown = TypeVar("Shown")  # a scene or a clip
Asked = list[tuple[str, Question]]  # (category, question)
Asker = Callable[[Any, int, np.random.Generator], Asked | None]
Scorer = Callable[[Sequence[Row], Sequence[str | None]], "Sheet"]

FEATURES = Features(
    {
        "question_id": Value("string"),
        "image_id": Value("string"),
        "scene_seed": Value("int64"),
        "image": Image(),
        "question": Value("string"),
        "answer": Value("string"),
        "category": Value("string"),
        "about": List(List(Value("int64"))),
    }
)
PICTURES = ("image", "frames")  # the columns that hold pictures


def prompt(question: str, shown: str = "<image>") -> str:
    """The text given to the processor: what the pocket chat template makes of one turn.

    Args:
        question: about the picture.
        shown: `<image>`, or `<video>` for a clip.
    """
    return f"USER: {shown}\n{question} ASSISTANT:"


def without_pictures(data: Dataset) -> Dataset:
    """The other columns of a data set: going through its rows would decode every picture."""
    return data.remove_columns([name for name in PICTURES if name in data.column_names])


@dataclass(frozen=True)
class Sheet:
    """A model's answers, scored.

    Attributes:
        image_ids: the pictures in order of first appearance, [images].
        stats: sufficient statistics of the headline metric, summed per picture, [images, k].
        correct: score of each question in 0..1, in the order of the rows, [n].
        value: headline metric from summed statistics, [..., k] -> [...]; official scale.
        headline_max: the best possible headline.
        details: secondary figures, percentages unless named otherwise. `failed` counts answers
            that never came (scored as wrong), `blank` counts empty ones (scored by the metric's
            own rule: POPE's, for one, reads silence as yes).
    """

    image_ids: tuple[str, ...]
    stats: np.ndarray
    correct: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    headline_max: float = 100.0
    details: dict[str, float] = field(default_factory=dict)

    @property
    def headline(self) -> float:
        """The benchmark's metric over all questions, official scale."""
        return float(self.value(self.stats.sum(0)))

    @property
    def accuracy(self) -> float:
        """Mean score of the questions, in percent."""
        return 100 * float(self.correct.mean())


@dataclass(frozen=True)
class Benchmark:
    """One pocket benchmark.

    Attributes:
        id: the name in `BENCHMARKS`.
        stands_for: the official benchmark that it imitates.
        metric: name of the headline metric.
        headline_max: its largest value.
        max_new_tokens: enough for the longest answer and the end of sequence.
        first_seed: the scene seeds start here.
        per_image: questions asked about each picture.
        ask: gives the categorised questions about a scene, or None when the scene does not fit.
            Its second argument is the number of the picture, which decides families and wanted
            answers in turn, so that every prefix of the data set is balanced.
        score: turns rows and answers into a sheet.
        side: pixels of the pictures. Things and print keep their size, so in larger ones they are
            small.
    """

    id: str
    stands_for: str
    metric: str
    headline_max: float
    max_new_tokens: int
    first_seed: int
    per_image: int
    ask: Asker
    score: Scorer
    side: int = IMAGE_SIZE

    features: ClassVar[Features] = FEATURES

    def dataset(self, split: EvalSplit, n: int) -> Dataset:
        """The first `n` questions of a split, in memory: the same ones on every machine.

        Args:
            split: "dev" (to choose anything with), "test" (to report), or "replication" (to see
                whether it comes again).
            n: number of questions, rounded up so that no picture loses some of its questions.

        Raises:
            ValueError: for another split, or `n` outside 1..100,000.
        """
        if split not in SEEDS_OF:
            raise ValueError(f"Unknown split '{split}': dev or test, or replication.")
        if not 1 <= n <= MAX_QUESTIONS:
            raise ValueError(f"n must be 1 to {MAX_QUESTIONS}, got {n}.")
        images = -(-n // self.per_image)
        columns: dict[str, list] = {name: [] for name in self.features}
        seeds = count(self.first_seed + SEEDS_OF[split])
        scans: Scans = "dev" if split == "dev" else "test"
        for number in range(images):
            scene, asked = self._next(scans, seeds, number)
            image_id = f"{self.id}-{split}-{number:05d}"
            pictures = self._pictures(scene)  # encoded once, not once per row
            for i, (category, question) in enumerate(asked):
                row = {
                    "question_id": f"{image_id}-{i}",
                    "image_id": image_id,
                    "scene_seed": scene.seed,
                    **pictures,
                    "question": question.text,
                    "answer": question.answer,
                    "category": category,
                    "about": [list(cell) for cell in question.about],
                }
                for name, value in row.items():
                    columns[name].append(value)
        return Dataset.from_dict(columns, features=self.features)

    def make(self, split: Scans, seed: int) -> Any:
        """What is asked about: the scene (or clip) of a seed."""
        return make_scene(split, seed, side=self.side)

    def _pictures(self, scene: Any) -> dict[str, Any]:
        """The columns that hold its pictures."""
        return {"image": png(scene.image())}

    def _next(self, split: Scans, seeds: count[int], number: int) -> tuple[Any, Asked]:
        """The next scene that can be asked what picture `number` has to ask."""
        while True:
            scene = self.make(split, next(seeds))
            asked = self.ask(scene, number, np.random.default_rng([scene.seed, 11]))
            if asked is not None:
                return scene, asked

    def sheet(self, rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
        """Score answers.

        Args:
            rows: rows of `dataset`, as a Dataset or a sequence of mappings.
            answers: the model's strings; None where it failed, which counts as wrong.

        Raises:
            ValueError: when there are no rows or not exactly one answer per row.
        """
        if isinstance(rows, Dataset):
            rows = without_pictures(rows)
        return checked_sheet(self.id, self.headline_max, self.score, list(rows), answers)


def checked_sheet(
    id: str, headline_max: float, score: Scorer, rows: Sequence[Row], answers: Sequence[str | None]
) -> Sheet:
    """Score the answers of a benchmark, and count those that never came or are blank.

    Args:
        id: of the benchmark.
        headline_max: the best possible headline.
        score: turns rows and answers into a sheet.
        rows: what was asked.
        answers: one per row; None where the model failed.

    Raises:
        ValueError: when there are no rows or not exactly one answer per row.
    """
    if not rows or len(rows) != len(answers):
        raise ValueError(
            f"{id}: {len(rows)} rows and {len(answers)} answers; "
            "give one answer per row, None for a question that failed."
        )
    sheet = score(rows, answers)
    known = [a for a in answers if a is not None]
    state = {
        "failed": float(len(answers) - len(known)),
        "blank": float(sum(not a.strip() for a in known)),
    }
    return replace(sheet, headline_max=headline_max, details={**sheet.details, **state})


def png(image: PIL.Image.Image) -> dict[str, Any]:
    """A picture as a data set stores it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def ask_for(
    family: Callable[[Shown, np.random.Generator], Question | None],
    scene: Shown,
    rng: np.random.Generator,
    want: str | None = None,
) -> Question | None:
    """A question of a family, with the wanted answer if one is named; None if none comes up."""
    for _ in range(64):
        question = family(scene, rng)
        if question is None or want in (None, question.answer):
            return question
    return None


def sum_per_image(rows: Sequence[Row], columns: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Sums per picture of a table with one line per row: ids [images] and sums [images, k]."""
    places: dict[str, int] = {}
    index = [places.setdefault(row["image_id"], len(places)) for row in rows]
    sums = np.zeros((len(places), columns.shape[1]))
    np.add.at(sums, index, columns)
    return tuple(places), sums


def _percent(totals: np.ndarray) -> np.ndarray:
    return 100 * totals[..., 0] / totals[..., 1]


def mean_sheet(rows: Sequence[Row], scores: Sequence[float]) -> Sheet:
    """The sheet of a benchmark whose headline is the mean score of its questions, 0 to 100."""
    correct = np.asarray(scores, dtype=np.float64)
    ids, stats = sum_per_image(rows, np.stack([correct, np.ones_like(correct)], axis=1))
    return Sheet(ids, stats, correct, _percent, details=category_accuracy(rows, correct))


def category_accuracy(rows: Sequence[Row], correct: np.ndarray) -> dict[str, float]:
    """Mean score per category, in percent, as `accuracy/CATEGORY`."""
    categories = np.array([row["category"] for row in rows])
    return {
        f"accuracy/{name}": 100 * float(correct[categories == name].mean())
        for name in sorted(set(categories.tolist()))
    }
