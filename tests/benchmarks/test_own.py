"""Questions of one's own: every form gives the same benchmark, every fault one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest

from frugalvlm.benchmarks import metrics
from frugalvlm.benchmarks.own import METRICS, OwnDataError, own_benchmark
from frugalvlm.paths import project_root

QUESTIONS = [("a", "what is it?", ["circle"]), ("a", "is it red?", ["yes", "yeah"]),
             ("b", "how many?", ["2"])]  # fmt: skip


def _image(name: str, mode: str = "RGB") -> PIL.Image.Image:
    values = np.random.default_rng(ord(name)).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "pets"
    (place / "pictures").mkdir(parents=True)
    for name in "ab":
        _image(name).save(place / "pictures" / f"{name}.png")
    return place


def _write(folder, rows, name="questions.jsonl"):
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / name).write_text(text + "\n\n")


def _rows(folder):
    return [
        {"image": f"pictures/{name}.png", "question": question, "answers": answers}
        for name, question, answers in QUESTIONS
    ]


def _told(benchmark):
    data = benchmark.dataset("test", 99)
    return [(r["question"], r["answers"], r["answer"], r["image"].tobytes()) for r in data]


def test_all_forms_are_the_same_questions(folder):
    _write(folder, _rows(folder))
    images = {name: _image(name) for name in "ab"}
    forms = {
        "pets": folder,
        "questions": folder / "questions.jsonl",
        "own": [(images[name], question, answers) for name, question, answers in QUESTIONS],
    }
    table = {
        "image": [images[name] for name, _, _ in QUESTIONS],
        "question": [question for _, question, _ in QUESTIONS],
        "answers": [answers for _, _, answers in QUESTIONS],
    }
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"),
        answers=datasets.List(datasets.Value("string")),
    )  # fmt: skip
    made = {name: own_benchmark(form) for name, form in forms.items()}
    made["dataset"] = own_benchmark(datasets.Dataset.from_dict(table, features=features), "dataset")
    made["paths"] = own_benchmark(
        [(str(folder / f"pictures/{n}.png"), q, a) for n, q, a in QUESTIONS], "paths"
    )
    lines = "\n".join(f"pictures/{n}.png,{q},{'|'.join(a)}" for n, q, a in QUESTIONS)
    (folder / "questions.jsonl").unlink()
    (folder / "questions.csv").write_text(f"image,question,answers\n{lines}\n")
    made["csv"] = own_benchmark(folder, "csv")
    wanted = [(q, a, a[0], images[n].tobytes()) for n, q, a in QUESTIONS]
    for name, benchmark in made.items():
        assert _told(benchmark) == wanted, name
        assert benchmark.name == name
        assert benchmark.id.startswith(f"{name}@")


def test_questions_about_one_picture_are_one_cluster_of_the_bootstrap(folder):
    _write(folder, _rows(folder))
    benchmark = own_benchmark(folder)
    rows = list(benchmark.dataset("test", 99).remove_columns("image"))
    sheet = benchmark.sheet(rows, ["Circle.", "Yeah", None])
    assert len(sheet.image_ids) == 2
    assert list(sheet.correct) == [1, 1, 0]
    assert sheet.headline == pytest.approx(200 / 3)
    assert sheet.details["failed"] == 1


def test_many_pictures_of_one_data_set_stay_apart():
    """Rows of a data set are decoded one by one; none may be taken for the one before."""
    pictures = [_image(chr(60 + i)) for i in range(30)]
    data = datasets.Dataset.from_dict(
        {"image": pictures, "question": ["what?"] * 30, "answer": ["x"] * 30},
        features=datasets.Features(image=datasets.Image(), question=datasets.Value("string"),
                                   answer=datasets.Value("string")),
    )  # fmt: skip
    made = own_benchmark(data).dataset("test", 30)
    assert [row["image"].tobytes() for row in made] == [p.tobytes() for p in pictures]
    assert len(set(made["image_id"])) == 30


def test_the_id_changes_with_pictures_questions_and_answers_only():
    base = [(_image("a"), "what?", "x")]
    ids = [
        own_benchmark(form, "n").id
        for form in (
            base,
            [(_image("b"), "what?", "x")],
            [(_image("a"), "who?", "x")],
            [(_image("a"), "what?", "y")],
            [*base, *base],
        )
    ]
    assert len(set(ids)) == 5
    assert own_benchmark([(_image("a"), "what?", ["x"])], "n").id == ids[0]


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_pictures_of_any_mode_come_as_rgb(mode, tmp_path):
    image = _image("a", mode)
    forms = [image]
    if mode != "CMYK":
        image.save(tmp_path / "a.png")
        forms.append(tmp_path / "a.png")
    for form in forms:
        row = own_benchmark([(form, "what?", "x")]).dataset("test", 1)[0]
        assert row["image"].mode == "RGB"
        assert row["image"].size == (30, 20)


def test_named_scores_are_the_kits():
    assert METRICS["exact_match"]("A Circle!", ["square", "a circle"]) == 1
    assert METRICS["exact_match"]("circles", ["circle"]) == 0
    ten = ["yes"] * 2 + ["no"] * 8
    assert METRICS["vqa_accuracy"]("yes", ten) == metrics.vqa_accuracy("yes", ten) < 1
    assert METRICS["vqa_accuracy"]("two", ["2"]) == 1, "one agreed answer counts whole"
    assert METRICS["option_letter"]("B. the cat", ["b"]) == 1
    assert METRICS["option_letter"]("A", ["b"]) == 0
    assert METRICS["yes_no"]("No, it is not.", ["no"]) == 1
    assert METRICS["yes_no"]("yes", ["no"]) == 0


def test_the_documentation_names_all_scores():
    text = (project_root() / "docs" / "own_benchmark.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split('"')[1] for line in table[1:]] == list(METRICS)


def test_a_function_scores_and_must_say_0_to_1():
    half = own_benchmark([(_image("a"), "what?", "x")], score=lambda answer, answers: 0.5)
    rows = list(half.dataset("test", 1).remove_columns("image"))
    assert half.sheet(rows, ["x"]).headline == 50
    for wrong in (2, -1, None, "good", float("nan")):
        bad = own_benchmark([(_image("a"), "what?", "x")], score=lambda a, b, w=wrong: w)
        with pytest.raises(OwnDataError, match="a score is a number from 0"):
            bad.sheet(rows, ["x"])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ([], "no question in this data"),
        ([("a.png", "q")], r"question 1 is .* give \(picture, question, answers\)"),
        (["abc"], "question 1"),
        ([("no.png", "q", "a")], "the picture no.png does not exist"),
        ([(3, "q", "a")], "PIL image or the path of one, not int"),
        ([(None, "q", "a")], "not NoneType"),
        (3, "int is no data"),
        ({1, 2}, "set is no data"),
        ("no/such/place", "does not exist: give a folder"),
    ],
)
def test_wrong_data(wrong, sentence):
    with pytest.raises(OwnDataError, match=sentence):
        own_benchmark(wrong)


@pytest.mark.parametrize(
    ("question", "answers", "sentence"),
    [
        ("", "a", "a question is a text"),
        (None, "a", "a question is a text, not None"),
        (7, "a", "a question is a text"),
        ("q", [], r"the answers are \[\]"),
        ("q", None, "the answers are None"),
        ("q", ["a", None], "the answers are"),
        ("q", [["a"]], "the answers are"),
        ("q", "", "the answers are"),
        ("q", ["a", " "], "the answers are"),
        ("q", float("nan"), "the answers are nan"),
        ("q", "\ud800", "the answers are"),
        ("what <image> is it?", "a", "<image> stands for the picture.*leave it out"),
        ("what \ud800?", "a", "is no Unicode text"),
    ],
)
def test_wrong_questions_and_answers_are_named_by_their_number(question, answers, sentence):
    right = (_image("a"), "q", "a")
    with pytest.raises(OwnDataError, match=f"question 2: .*{sentence}"):
        own_benchmark([right, (_image("a"), question, answers)])


def test_numbers_as_answers_are_texts():
    row = own_benchmark([(_image("a"), "how many?", 2)]).dataset("test", 1)[0]
    assert row["answers"] == ["2"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 is no JSON object"),
        ('{"question": "q", "answer": "a"}', "line 1: image is missing"),
        ('{"image": "pictures/a.png", "question": "q"}', "line 1: answer is missing"),
        ('\n{"image": "no.png", "question": "q", "answer": "a"}', "does not exist"),
        ("", "no question in this data"),
        ("[" * 100_000, "line 1 is no JSON"),
    ],
)
def test_wrong_files(folder, text, sentence):
    (folder / "questions.jsonl").write_text(text)
    with pytest.raises(OwnDataError, match=sentence):
        own_benchmark(folder)


@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "bmp", "webp"])
def test_half_a_picture_is_noticed_before_anything_is_asked(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    _image("a").save(path)
    own_benchmark([(path, "q", "a")])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OwnDataError, match=rf"question 1: .*a\.{kind} is no readable picture"):
        own_benchmark([(path, "q", "a")])


def test_pictures_in_memory_that_cannot_be_read(tmp_path):
    _image("a").save(tmp_path / "a.png")
    closed = PIL.Image.open(tmp_path / "a.png")
    closed.close()
    for picture in (closed, PIL.Image.new("RGB", (0, 0)), PIL.Image.new("RGB", (0, 5))):
        with pytest.raises(OwnDataError, match="question 1: this picture cannot be read"):
            own_benchmark([(picture, "q", "a")])


def test_names_of_files_in_any_language_and_none(tmp_path):
    names = ["Größe.png", "猫 と 犬.png", "a\u2028b.png", " .png", "'\"<b>.png"]
    for name in names:
        _image("a").save(tmp_path / name)
    made = own_benchmark([(tmp_path / name, "q", "a") for name in names])
    assert len({row["image"].tobytes() for row in made.dataset("test", 9)}) == 1
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    latin.write_bytes((tmp_path / names[0]).read_bytes())
    with pytest.raises(OwnDataError, match=r"question 1: the name of .* is no Unicode text"):
        own_benchmark([(latin, "q", "a")])


def test_files_with_zeros_for_answers_and_odd_line_ends(folder):
    (folder / "questions.jsonl").write_text(
        '{"image": "pictures/a.png", "question": "how\u2028many?", "answer": 0}\r\n\n'
        '{"image": "pictures/a.png", "question": "which?", "answers": [], "answer": "b"}'
    )
    rows = own_benchmark(folder).dataset("test", 9)
    assert [(r["question"], r["answers"]) for r in rows] == [
        ("how\u2028many?", ["0"]), ("which?", ["b"])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pictures/a.png,q,a", "line 1 names the columns pictures/a.png, q, a: name them image"),
        ("image;question;answer\npictures/a.png;q;a", "separated by commas"),
        ("image,question,answer\npictures/a.png,q", "line 2: answer is missing"),
        ("image,question,answers\npictures/a.png,q,|", "question 1: the answers are"),
        ('image,question,answer\npictures/a.png,"q,a', "line 2: answer is missing"),
        ("image,question,answer\n", "no question in this data"),
        ("", "no question in this data"),
    ],
)
def test_wrong_csv_files(folder, text, sentence):
    (folder / "questions.csv").write_text(text)
    with pytest.raises(OwnDataError, match=sentence):
        own_benchmark(folder)


def test_a_score_of_ones_own_that_fails_is_named():
    bad = own_benchmark([(_image("a"), "what?", "x")], "mine", score=lambda a, b: 1 / 0)
    rows = list(bad.dataset("test", 1).remove_columns("image"))
    with pytest.raises(OwnDataError, match=r"mine: the score of 'x' .* ZeroDivisionError"):
        bad.sheet(rows, ["x"])


def test_what_is_no_picture_and_no_text(folder):
    (folder / "pictures" / "a.png").write_bytes(b"not a picture")
    _write(folder, _rows(folder))
    with pytest.raises(OwnDataError, match=r"a\.png is no readable picture"):
        own_benchmark(folder)
    (folder / "questions.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OwnDataError, match="cannot be read as UTF-8"):
        own_benchmark(folder)
    (folder / "questions.jsonl").unlink()
    with pytest.raises(OwnDataError, match=r"holds no questions\.jsonl and no questions\.csv"):
        own_benchmark(folder)


def test_data_sets_with_other_columns_and_splits():
    plain = datasets.Dataset.from_dict({"text": ["q"], "label": [1]})
    with pytest.raises(
        OwnDataError, match=r"no column image, question, answer; it has text, label"
    ):
        own_benchmark(plain)
    with pytest.raises(OwnDataError, match=r"has the splits test: give one of them"):
        own_benchmark(datasets.DatasetDict(test=plain))
