"""What every official benchmark shares: its data set, a sample of its questions, and their prompt.

A benchmark is data again: where its rows lie (`Source`), what becomes of a row (`read`), how
answers are scored. The text of a question is the one that LLaVA-1.5 was evaluated with, and so the
papers that start from it; what frames it is the model's own (`frames`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset

from frugalvlm.benchmarks.base import Row, Scorer, Sheet, checked_sheet, mean_sheet
from frugalvlm.benchmarks.official.data import Source, commit_of, picture_columns, rows_of
from frugalvlm.checks import check_whole
from frugalvlm.errors import FrugalError

__all__ = ["LETTER", "SHORT", "Asked", "Official", "RefusedError", "options", "sample",
           "scored"]  # fmt: skip

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

Reader = Callable[[Row, int], Mapping[str, Any] | None]


class RefusedError(FrugalError, ValueError):
    """A benchmark that gives no number here; the message says what it would need."""


class Asked(Sequence[Row]):
    """Rows of questions; a picture is read and decoded when its row is looked at, and not kept.

    Attributes:
        texts: the rows without pictures.
        column_names: of a whole row.
    """

    def __init__(self, texts: list[dict[str, Any]], pictures: Dataset, places: Sequence[int],
                 column: str = "image") -> None:  # fmt: skip
        self.texts = texts
        self.column_names = [*(texts[0] if texts else ()), "image"]
        self._pictures, self._places, self._column = pictures, places, column

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return {**self.texts[i], "image": self.picture(i)}

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def picture(self, i: int) -> PIL.Image.Image:
        """The picture of row i, in colour."""
        shown = self._pictures[self._places[i]][self._column]
        return (shown[0] if isinstance(shown, list) else shown).convert("RGB")


@dataclass(frozen=True, eq=False)
class Official:
    """One official benchmark, with the interface of the pocket ones.

    Attributes:
        id: the name in `OFFICIAL`.
        stands_for: what papers call it.
        metric: name of the headline metric.
        headline_max: its largest value.
        max_new_tokens: of an answer.
        source: its rows.
        read: from a row and its number to question_id, image_id, question (as it is asked),
            answer, category and whatever `score` needs; None leaves the row out.
        score: turns rows and answers into a sheet.
        pictures: where these lie, if not in the rows.
        picture_id: of such pictures and of rows, the columns that join them.
        group: column of rows that are scored together and never parted.
        strata: whether categories take turns in a sample, for the metric is a sum over them.
        differs: what a reader who compares it with a paper's number must know.
    """

    id: str
    stands_for: str
    metric: str
    headline_max: float
    max_new_tokens: int
    source: Source
    read: Reader
    score: Scorer
    pictures: Source | None = None
    picture_id: tuple[str, str] = ("id", "image_id")
    group: str = "question_id"
    strata: bool = False
    differs: str = ""
    sources: tuple[Source, ...] = field(init=False)

    def __post_init__(self) -> None:
        every = (self.source,) if self.pictures is None else (self.source, self.pictures)
        object.__setattr__(self, "sources", every)

    @property
    def data_name(self) -> str:
        """Data set, configuration, split and commit, as records carry them.

        Raises:
            DataError: the data set is not here.
        """
        return replace(self.source, revision=commit_of(self.source)).name

    def dataset(self, split: str, n: int) -> Asked:
        """A fixed sample of the questions, the same on every machine.

        Args:
            split: "test": there is one split here, the one that papers report (`source.split`).
            n: how many questions; 0, or more than there are: all of them. What is scored together
                is not parted, so there may be a few more.

        Raises:
            RefusedError: for another split.
            DataError: the data set is not here, or has other columns.
        """
        if split != "test":
            raise RefusedError(
                f"{self.id} is asked on its {self.source.split} split alone, which is to report: "
                "choose anything with the pocket benchmarks' dev split."
            )
        check_whole("n", n, 0)
        raw = rows_of(self.source)
        texts, places = [], []
        for place, row in enumerate(raw.remove_columns(picture_columns(raw))):
            read = self.read(row, place)
            if read is not None:
                texts.append({"category": "all", **read})
                places.append(place)
        chosen = sample(texts, n, self.group, self.strata)
        texts, places = [texts[i] for i in chosen], [places[i] for i in chosen]
        if self.pictures is None:
            return Asked(texts, raw, places)
        there, here = self.picture_id
        apart = rows_of(self.pictures)
        at = {str(name): i for i, name in enumerate(apart[there])}
        return Asked(texts, apart, [at[row[here]] for row in texts])

    def sheet(self, rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
        """Score answers, None for one that never came: it counts as wrong.

        Raises:
            ValueError: when there are no rows or not exactly one answer per row.
        """
        rows = rows.texts if isinstance(rows, Asked) else list(rows)
        return checked_sheet(self.id, self.headline_max, self.score, rows, answers)


def sample(rows: Sequence[Row], n: int, group: str = "question_id", strata: bool = False
           ) -> list[int]:  # fmt: skip
    """Which rows a sample of n questions holds, in their own order.

    Pictures take turns, in an order that a hash fixes: each gives one group of questions before any
    gives a second, for questions about one picture stand or fall together and say less. With
    `strata`, categories take turns above that. A smaller sample is part of a larger one.

    Args:
        rows: all questions.
        n: how many; 0: all.
        group: column of rows that are never parted.
        strata: whether the categories take turns.
    """
    if not n or n >= len(rows):
        return list(range(len(rows)))
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        stratum = row["category"] if strata else ""
        groups[stratum, row["image_id"], str(row[group])].append(i)
    of_picture: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)
    for key in groups:
        of_picture[key[:2]].append(key)
    turns: dict[str, list[tuple[int, str, tuple[str, str, str]]]] = defaultdict(list)
    for (stratum, picture), keys in of_picture.items():
        for turn, key in enumerate(sorted(keys, key=lambda k: _order(k[2]))):
            turns[stratum].append((turn, _order(picture), key))
    queue = [
        (place, _order(stratum), key)
        for stratum, found in turns.items()
        for place, (_, _, key) in enumerate(sorted(found))
    ]
    chosen: list[int] = []
    for _, _, key in sorted(queue):
        if len(chosen) >= n:
            break
        chosen += groups[key]
    return sorted(chosen)


def _order(name: str) -> str:
    return hashlib.sha256(f"frugalvlm {name}".encode()).hexdigest()


def options(texts: Sequence[str]) -> str:
    """Choices as LLaVA lists them, a line each, "A. ..."."""
    return "".join(f"\n{chr(ord('A') + i)}. {text}" for i, text in enumerate(texts))


def scored(rule: Callable[[str, Row], float], second: Callable[[str, Row], float] | None = None
           ) -> Scorer:  # fmt: skip
    """A scorer whose headline is the mean over questions.

    Args:
        rule: of an answer and its row, 0 to 1.
        second: another reading of the same answers in use elsewhere; the sheet's details hold its
            mean (`lmms_eval`) and on how many answers the two differ (`rules_differ`).
    """

    def score(rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
        own = [0.0 if a is None else rule(a, r) for r, a in zip(rows, answers, strict=True)]
        sheet = mean_sheet(rows, own)
        if second is None:
            return sheet
        other = [0.0 if a is None else second(a, r) for r, a in zip(rows, answers, strict=True)]
        differ = float(sum(a != b for a, b in zip(own, other, strict=True)))
        more = {"lmms_eval": 100 * float(np.mean(other)), "rules_differ": differ}
        return replace(sheet, details={**sheet.details, **more})

    return score
