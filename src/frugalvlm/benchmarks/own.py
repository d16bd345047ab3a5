"""Questions of one's own as a benchmark: a list, a folder, or a `datasets.Dataset`.

A folder holds pictures and one file `questions.jsonl` (or `questions.csv`); a line of it:

    {"image": "pictures/cat.png", "question": "what is it?", "answer": "cat"}

`image` is a path relative to the file. Several right answers are a list `answers` (in CSV one
column, separated by `|`). `category` is optional: its scores are kept apart, too.

An answer is right when it equals one of the right ones after lower-casing and removing punctuation
(`exact_match`); METRICS names the kit's other rules, and a function of one's own, `score(answer,
answers) -> 0..1`, may take their place.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from frugalvlm.benchmarks.base import Row, Sheet, mean_sheet, png, without_pictures
from frugalvlm.benchmarks.metrics import exact_match, option_letter, pope_label, vqa_accuracy
from frugalvlm.digest import request_hash
from frugalvlm.errors import FrugalError

__all__ = ["METRICS", "OwnBenchmark", "OwnDataError", "Score", "own_benchmark"]

Score = Callable[[str, Sequence[str]], float]  # the model's answer and the right ones -> 0..1
QUESTION_FILES = ("questions.jsonl", "questions.csv")
MAX_NEW_TOKENS = 16


class OwnDataError(FrugalError, ValueError):
    """Questions of one's own that cannot be asked; the message names the place and the remedy."""


def _any_exact(answer: str, answers: Sequence[str]) -> float:
    return max(exact_match(answer, right) for right in answers)


def _letter(answer: str, answers: Sequence[str]) -> float:
    return float(option_letter(answer) in {right.strip().upper() for right in answers})


def _yes_or_no(answer: str, answers: Sequence[str]) -> float:
    return float(pope_label(answer) in {right.strip().lower() for right in answers})


METRICS: dict[str, Score] = {
    "exact_match": _any_exact,  # one of the right answers, case and punctuation aside
    "vqa_accuracy": lambda answer, answers: vqa_accuracy(answer, _ten(answers)),
    "option_letter": _letter,  # multiple choice: A to D
    "yes_no": _yes_or_no,  # POPE's reading of an answer
}

FEATURES = Features(
    {
        "question_id": Value("string"),
        "image_id": Value("string"),
        "image": Image(mode="RGB"),
        "question": Value("string"),
        "answer": Value("string"),
        "answers": List(Value("string")),
        "category": Value("string"),
    }
)


def _ten(answers: Sequence[str]) -> Sequence[str]:
    """VQA accuracy is made for ten people's answers; one agreed answer stands for all of them."""
    return list(answers) * 10 if len(answers) == 1 else answers


@dataclass(frozen=True, eq=False)
class OwnBenchmark:
    """Questions of one's own, asked and scored like the kit's benchmarks.

    Attributes:
        name: for people.
        data: all questions, with the columns of FEATURES.
        score: of an answer, 0 to 1.
        metric: name of the score.
        max_new_tokens: enough for the longest answer and the end of sequence.
        id: the name and a hash of pictures, questions and answers, so that the records of other
            questions under the same name are never taken for these.
    """

    name: str
    data: Dataset
    score: Score
    metric: str
    max_new_tokens: int = MAX_NEW_TOKENS
    headline_max: float = 100.0

    @cached_property
    def id(self) -> str:
        """The name that records carry."""
        return f"{self.name}@{request_hash(list(without_pictures(self.data)))[:8]}"

    def dataset(self, split: str, n: int) -> Dataset:
        """The first `n` questions, all of them where there are fewer; own data has one split."""
        return self.data.select(range(min(n, len(self.data))))

    def sheet(self, rows: Sequence[Row], answers: Sequence[str | None]) -> Sheet:
        """Score answers; one that never came (None) counts as wrong.

        Raises:
            OwnDataError: the score gives something else than a number from 0 to 1.
        """
        pairs = zip(rows, answers, strict=True)
        scores = [0.0 if a is None else self._scored(a, row["answers"]) for row, a in pairs]
        known = [a for a in answers if a is not None]
        state = {
            "failed": float(len(answers) - len(known)),
            "blank": float(sum(not a.strip() for a in known)),
        }
        sheet = mean_sheet(rows, scores)
        return replace(sheet, details={**sheet.details, **state})

    def _scored(self, answer: str, right: Sequence[str]) -> float:
        try:
            value = self.score(answer, right)
        except Exception as error:  # of the user's own function
            raise OwnDataError(
                f"{self.name}: the score of {answer!r} against {list(right)} ended in "
                f"{type(error).__name__} ({error}): correct the function; the answers are kept."
            ) from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number <= 1:
            raise OwnDataError(
                f"{self.name}: the score of {answer!r} against {list(right)} is {value!r}; a score "
                "is a number from 0 (wrong) to 1 (right)."
            )
        return number


def own_benchmark(
    data: Any,
    name: str = "",
    *,
    score: str | Score = "exact_match",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> OwnBenchmark:
    """A benchmark from questions of one's own.

    Args:
        data: a list of (picture, question, answers), pictures as PIL images or paths, answers a
            string or a list of strings; a folder, or its questions file (see this module); or a
            `datasets.Dataset` with the columns `image`, `question` and `answer` or `answers`.
        name: for tables; default: the folder's, else "own".
        score: a name in METRICS, or a function `(answer, answers) -> 0..1`.
        max_new_tokens: enough for the longest answer.

    Raises:
        OwnDataError: for what cannot be asked; says where, and what would do.
    """
    metric, rule = _rule(score)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int):
        raise OwnDataError(f"max_new_tokens is a whole number, not {max_new_tokens!r}.")
    if max_new_tokens < 1:
        raise OwnDataError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    usual, lines = _lines_of(data)
    columns: dict[str, list[Any]] = {column: [] for column in FEATURES}
    count, last = 0, None
    for count, line in enumerate(lines, 1):
        picture, question, answers, category = line
        where = f"question {count}"
        if last is None or picture is not last[0]:  # one that is asked several times: read once
            last = picture, _picture(picture, where)
        image_id, image = last[1]
        right = _answers(answers, where)
        _check_question(question, where)
        row = {
            "question_id": request_hash([count, image_id, question]),
            "image_id": image_id,
            "image": image,
            "question": question.strip(),
            "answer": right[0],
            "answers": right,
            "category": str(category or "all"),
        }
        for column, value in row.items():
            columns[column].append(value)
    if not count:
        raise OwnDataError("There is no question in this data: give at least one.")
    made = Dataset.from_dict(columns, features=FEATURES)
    return OwnBenchmark(name or usual, made, rule, metric, max_new_tokens)


# -- where the questions come from ----------------------------------------------------------------

Line = tuple[Any, Any, Any, Any]  # picture, question, answers, category


def _lines_of(data: Any) -> tuple[str, Iterable[Line]]:
    """A name, and the questions."""
    if isinstance(data, DatasetDict):
        raise OwnDataError(
            f"This data set has the splits {', '.join(data)}: give one of them, as in "
            f"data['{next(iter(data), 'test')}']."
        )
    if isinstance(data, Dataset):
        return str(data.info.dataset_name or "own"), _dataset_lines(data)
    if isinstance(data, str | Path):
        return _file_lines(Path(data).expanduser())
    if isinstance(data, Sequence):
        return "own", [_triple(item, i) for i, item in enumerate(data, 1)]
    raise OwnDataError(
        f"{type(data).__name__} is no data: give a benchmark id, a list of (picture, question, "
        "answers), a folder, or a datasets.Dataset."
    )


def _triple(item: Any, number: int) -> Line:
    if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 3:
        raise OwnDataError(
            f"question {number} is {str(item)[:80]!r}: give (picture, question, answers) for each."
        )
    return (*item, None)


def _dataset_lines(data: Dataset) -> Iterable[Line]:
    names = data.column_names
    answers = next((name for name in ("answers", "answer") if name in names), None)
    missing = [name for name in ("image", "question") if name not in names]
    if missing or answers is None:
        wanted = ", ".join([*missing, *([] if answers else ["answer"])])
        raise OwnDataError(
            f"The data set has no column {wanted}; it has {', '.join(names)}: rename them with "
            "data.rename_columns({...}) to image, question and answer (or answers)."
        )
    return ((r["image"], r["question"], r[answers], r.get("category")) for r in data)


_NONE: tuple[Any, ...] = (None, "", [])  # what stands for no answer; 0 is one


def _file_lines(path: Path) -> tuple[str, Iterable[Line]]:
    file, name = path, path.stem
    if path.is_dir():
        name = path.resolve().name
        file = next((path / q for q in QUESTION_FILES if (path / q).is_file()), path)
        if file is path:
            raise OwnDataError(f"{path} holds no {' and no '.join(QUESTION_FILES)}: add one.")
    if not file.is_file():
        raise OwnDataError(f"{path} does not exist: give a folder with {QUESTION_FILES[0]}.")
    rows = _read_csv(file) if file.suffix == ".csv" else _read_jsonl(file)
    lines = []
    for number, row in rows:
        missing = [n for n in ("image", "question") if not row.get(n)]
        answers = next((row[n] for n in ("answers", "answer") if row.get(n) not in _NONE), None)
        if missing or answers is None:
            wanted = ", ".join([*missing, *([] if answers is not None else ["answer"])])
            raise OwnDataError(f"{file}, line {number}: {wanted} is missing.")
        if file.suffix == ".csv" and row.get("answers"):
            answers = [part.strip() for part in str(answers).split("|")]
        lines.append((file.parent / str(row["image"]), row["question"], answers,
                      row.get("category")))  # fmt: skip
    return name, lines


def _read_jsonl(file: Path) -> list[tuple[int, Mapping[str, Any]]]:
    rows = []
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OwnDataError(f"{file} cannot be read as UTF-8 text ({error}).") from error
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise OwnDataError(f"{file}, line {number} is no JSON: {error}.") from error
        if not isinstance(row, Mapping):
            raise OwnDataError(f"{file}, line {number} is no JSON object.")
        rows.append((number, row))
    return rows


def _read_csv(file: Path) -> list[tuple[int, Mapping[str, Any]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened)
            rows: list[tuple[int, Mapping[str, Any]]] = [(reader.line_num, r) for r in reader]
            names = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OwnDataError(f"{file} cannot be read as a CSV file ({error}).") from error
    if names and "image" not in names:
        raise OwnDataError(
            f"{file}, line 1 names the columns {', '.join(map(str, names))}: name them image, "
            "question and answer, separated by commas."
        )
    return rows


def _check_question(question: Any, where: str) -> None:
    if not isinstance(question, str) or not question.strip():
        raise OwnDataError(f"{where}: a question is a text, not {question!r}.")
    for mark in ("<image>", "<video>"):
        if mark in question:
            raise OwnDataError(
                f"{where}: {mark} stands for the picture, which is put in front of every question: "
                "leave it out."
            )
    if not _is_unicode(question):
        raise OwnDataError(f"{where}: {question!r} is no Unicode text: correct its characters.")


def _is_unicode(text: str) -> bool:
    """Not so names of files in another encoding, and halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _picture(picture: Any, where: str) -> tuple[str, dict[str, Any]]:
    """What identifies a picture, and how the data set stores it."""
    if isinstance(picture, PIL.Image.Image):
        try:
            stored = png(picture.convert("RGB"))
        except (OSError, ValueError) as error:  # closed, half, or without pixels
            raise OwnDataError(f"{where}: this picture cannot be read ({error}).") from error
        return hashlib.sha256(stored["bytes"]).hexdigest()[:16], stored
    if not isinstance(picture, str | Path):
        raise OwnDataError(
            f"{where}: a picture is a PIL image or the path of one, not {type(picture).__name__}."
        )
    path = Path(picture).expanduser()
    if not _is_unicode(str(path.absolute())):
        raise OwnDataError(f"{where}: the name of {str(path)!r} is no Unicode text: rename it.")
    try:
        with PIL.Image.open(path) as opened:
            opened.load()  # all of it: `verify` looks at the beginning of some formats alone
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise OwnDataError(f"{where}: the picture {path} does not exist.") from error
    except Exception as error:  # each format's reader has errors of its own
        raise OwnDataError(f"{where}: {path} is no readable picture ({error}).") from error
    return hashlib.sha256(content).hexdigest()[:16], {"path": str(path.resolve()), "bytes": None}


def _answers(answers: Any, where: str) -> list[str]:
    given: Any = [answers] if isinstance(answers, str | int | float) else answers
    if isinstance(given, Mapping):  # VQA's own files: several people's answers
        given = given.get("answer", given.get("answers"))
    if isinstance(given, Sequence) and given and all(isinstance(a, Mapping) for a in given):
        given = [a.get("answer") for a in given]
    if not isinstance(given, Sequence) or not given or not all(map(_is_answer, given)):
        raise OwnDataError(f"{where}: the answers are {answers!r}; give a text or a list of texts.")
    return [str(a) for a in given]


def _is_answer(answer: Any) -> bool:
    """A text or a number; no blank, which a model that says nothing would meet."""
    if isinstance(answer, str):
        return bool(answer.strip()) and _is_unicode(answer)
    return isinstance(answer, int) or (isinstance(answer, float) and math.isfinite(answer))


def _rule(score: str | Score) -> tuple[str, Score]:
    if callable(score):
        return getattr(score, "__name__", "own score"), score
    key = str(score).replace(" ", "_").lower()
    if key not in METRICS:
        raise OwnDataError(
            f"Unknown score {score!r}: one of {', '.join(METRICS)}, or a function (answer, answers)"
            " -> 0..1."
        )
    return key.replace("_", " "), METRICS[key]
