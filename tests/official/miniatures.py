"""Schema-true miniatures of official data sets, laid out as the Hugging Face cache lays them out.

Columns and their types are those of the data sets' cards; pictures are noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image, List, Value

from frugalvlm.benchmarks.official import OFFICIAL, Source
from frugalvlm.benchmarks.official.mme import COGNITION, PERCEPTION

NEWEST = "c0ffee" * 6 + "c0ff"  # what main is, of data sets without a pinned revision
S, L = Value("string"), Value("int64")


def picture(seed: int) -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    return PIL.Image.fromarray(rng.integers(0, 255, (30, 48, 3), dtype=np.uint8))


def gqa(part: str) -> tuple[list[dict], Features]:
    if part == "testdev_balanced_images":
        return (
            [{"id": f"n{i}", "image": picture(i)} for i in range(3)],
            Features({"id": S, "image": Image()}),
        )
    kinds = {"detailed": S, "semantic": S, "structural": S}
    rows = [
        {"id": f"2{i:08d}", "imageId": f"n{(i * 2) % 3}", "isBalanced": True, "answer": answer,
         "question": f"Is thing {i} red?", "fullAnswer": f"{answer}.",
         "types": {"detailed": "a", "semantic": "attr", "structural": "verify"}}
        for i, answer in enumerate(("yes", "no", "left", "table", "yes", "no"))
    ]  # fmt: skip
    features = {"id": S, "imageId": S, "isBalanced": Value("bool"), "answer": S, "question": S,
                "fullAnswer": S, "types": kinds}  # fmt: skip
    return rows, Features(features)


def pope(_: str) -> tuple[list[dict], Features]:
    rows = [
        {"id": str(i), "question_id": str(i % 4), "question": f"Is there a thing {i} in the image?",
         "answer": ("yes", "no")[i % 2], "image_source": f"COCO_val2014_{i % 4 // 2}",
         "image": picture(i % 4 // 2), "category": ("random", "popular", "adversarial")[i // 4]}
        for i in range(12)
    ]  # fmt: skip
    names = ("id", "question_id", "question", "answer", "image_source", "category")
    return rows, Features({**dict.fromkeys(names, S), "image": Image()})


def mme(_: str) -> tuple[list[dict], Features]:
    rows = [
        {"question_id": f"{category}/{i:04d}.png", "image": picture(7 * c + i), "answer": answer,
         "question": f"Is this {answer} {i}? Please answer yes or no.", "category": category}
        for c, category in enumerate((*PERCEPTION, *COGNITION))
        for i in range(2)
        for answer in ("Yes", "No")
    ]  # fmt: skip
    names = ("question_id", "question", "answer", "category")
    return rows, Features({**dict.fromkeys(names, S), "image": Image()})


def scienceqa(_: str) -> tuple[list[dict], Features]:
    rows = [
        {"image": picture(i), "question": f"Which is {i}?", "choices": ["one", "two", "three"][: n],
         "answer": i % n, "hint": ("", "Look at it.")[i % 2], "task": "closed choice",
         "grade": "grade2", "subject": "natural science"}
        for i, n in enumerate((2, 3, 3, 2))
    ]  # fmt: skip
    names = ("question", "hint", "task", "grade", "subject")
    more = {"image": Image(), "choices": List(S), "answer": Value("int8")}
    return rows, Features({**dict.fromkeys(names, S), **more})


def textvqa(_: str) -> tuple[list[dict], Features]:
    rows = [
        {"image_id": f"{i // 2:016x}", "question_id": 34600 + i,
         "question": f"what does sign {i} say?",
         "image": picture(i // 2), "answers": [f"stop {i}"] * 4 + ["go"] * 6,
         "ocr_tokens": ["STOP", str(i)], "set_name": "val"}
        for i in range(4)
    ]  # fmt: skip
    more = {"question_id": L, "image": Image(), "answers": List(S), "ocr_tokens": List(S)}
    return rows, Features({**dict.fromkeys(("image_id", "question", "set_name"), S), **more})


def vqav2(_: str) -> tuple[list[dict], Features]:
    given = [("two", 3), ("2", 2), ("3", 5)]
    texts = [text for text, count in given for _ in range(count)]
    rows = [
        {"question_type": "how many", "multiple_choice_answer": "2", "answer_type": "number",
         "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": k}
                     for k, text in enumerate(texts, 1)],
         "image_id": 262148 + i // 2, "question_id": 262148000 + i, "image": picture(i // 2),
         "question": f"How many things {i}?"}
        for i in range(4)
    ]  # fmt: skip
    one = {"answer": S, "answer_confidence": S, "answer_id": L}
    names = ("question_type", "multiple_choice_answer", "answer_type", "question")
    more = {"answers": List(one), "image_id": L, "question_id": L, "image": Image()}
    return rows, Features({**dict.fromkeys(names, S), **more})


def mmbench(config: str) -> tuple[list[dict], Features]:
    index = S if config == "en" else L  # an early revision has texts in English
    options = ["a cat", "a dog", "a cow"]
    rows = []
    for base in (241, 252):
        for turn in range(2):
            turned = options[turn:] + options[:turn]
            number = base + 1_000_000 * turn
            rows.append(
                {"index": str(number) if config == "en" else number, "question": f"What is {base}?",
                 "hint": ("nan", "Look at it.")[base == 252],
                 "answer": "ABC"[turned.index("a cat")],
                 **dict(zip("ABC", turned, strict=True)), "D": "nan", "image": picture(base),
                 "category": "identity", "source": "x", "L2-category": "finegrained", "comment": "",
                 "split": "dev"}
            )  # fmt: skip
    names = ("question", "hint", "answer", "A", "B", "C", "D", "category", "source", "L2-category",
             "comment", "split")  # fmt: skip
    return rows, Features({**dict.fromkeys(names, S), "index": index, "image": Image()})


def vizwiz(_: str) -> tuple[list[dict], Features]:
    rows = [
        {"question_id": f"VizWiz_val_{i:08d}.jpg", "image": picture(i), "question": "What Is this?",
         "answers": ["unanswerable"] * 3 + ["can"] * 7, "category": "other"}
        for i in range(3)
    ]  # fmt: skip
    names = ("question_id", "question", "category")
    return rows, Features({**dict.fromkeys(names, S), "image": Image(), "answers": List(S)})


def seed(_: str) -> tuple[list[dict], Features]:
    rows = [
        {"answer": "ABCD"[i % 4], **{f"choice_{x}": f"{x} {i}" for x in "abcd"},
         "data_id": f"{i // 2}_0", "data_type": ("image", "image", "video", "image")[i],
         "question": f"Which {i}?", "question_id": str(i), "question_type_id": 1,
         "image": [picture(i)], "segment": []}
        for i in range(4)
    ]  # fmt: skip
    names = ("answer", *(f"choice_{x}" for x in "abcd"), "data_id", "data_type", "question",
             "question_id")  # fmt: skip
    more = {"question_type_id": L, "image": List(Image()), "segment": List(L)}
    return rows, Features({**dict.fromkeys(names, S), **more})


def chartqa(_: str) -> tuple[list[dict], Features]:
    told = (("human_test", "100"), ("human_test", "12%"), ("augmented_test", "Blue"))
    rows = [
        {"type": kind, "question": f"How much {i}?", "answer": answer, "image": picture(i)}
        for i, (kind, answer) in enumerate(told)
    ]
    names = ("type", "question", "answer")
    return rows, Features({**dict.fromkeys(names, S), "image": Image()})


def docvqa(_: str) -> tuple[list[dict], Features]:
    rows = [
        {"questionId": str(49150 + i), "question": f"What is value {i}?", "image": picture(i // 2),
         "question_types": ["form"], "docId": 14465 + i // 2, "ucsf_document_id": "pybv0228",
         "ucsf_document_page_no": "81", "answers": ["0.28", "zero"], "data_split": "val"}
        for i in range(3)
    ]  # fmt: skip
    names = ("questionId", "question", "ucsf_document_id", "ucsf_document_page_no", "data_split")
    more = {"image": Image(), "question_types": List(S), "docId": L, "answers": List(S)}
    return rows, Features({**dict.fromkeys(names, S), **more})


def ocrbench(_: str) -> tuple[list[dict], Features]:
    told = (("IIIT5K", "CENTRE"), ("HME100k", "x ^ 2"))
    rows = [
        {"dataset": part, "question": "what is written in the image?", "answer": [answer],
         "question_type": "Regular Text Recognition", "image": picture(i)}
        for i, (part, answer) in enumerate(told)
    ]  # fmt: skip
    names = ("dataset", "question", "question_type")
    return rows, Features({**dict.fromkeys(names, S), "answer": List(S), "image": Image()})


MADE: dict[str, Callable[[str], tuple[list[dict], Features]]] = {
    "lmms-lab/GQA": gqa, "lmms-lab/POPE": pope, "lmms-lab/MME": mme,
    "lmms-lab/ScienceQA": scienceqa, "lmms-lab/textvqa": textvqa, "lmms-lab/VQAv2": vqav2,
    "lmms-lab/MMBench": mmbench, "lmms-lab/VizWiz-VQA": vizwiz, "lmms-lab/SEED-Bench": seed,
    "lmms-lab/ChartQA": chartqa, "lmms-lab/DocVQA": docvqa, "echo840/OCRBench": ocrbench,
}  # fmt: skip


def write(cache: Path, names: Sequence[str] | None = None) -> None:
    """Lay out the data sets of these benchmarks (default: all) in a cache folder."""
    sources: dict[str, list[Source]] = {}
    for name in names or OFFICIAL:
        for source in OFFICIAL[name].sources:
            sources.setdefault(source.repo, []).append(source)
    for repo, parts in sources.items():
        home = cache / f"datasets--{repo.replace('/', '--')}"
        commit = NEWEST if parts[0].revision == "main" else parts[0].revision
        folder = home / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(commit)
        configs: dict[str, Any] = {}
        for source in parts:
            place = "data" if source.config == "default" else source.config
            pattern = f"{place}/{source.split}-*"
            configs[source.config] = {
                "config_name": source.config,
                "data_files": [{"split": "other", "path": f"{place}/other-*"},
                               {"split": source.split, "path": pattern}],
            }  # fmt: skip
            rows, features = MADE[repo](source.config)
            path = folder / place / f"{source.split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            Dataset.from_list(rows, features=features).to_parquet(path)
        card = json.dumps({"configs": list(configs.values())})
        (folder / "README.md").write_text(f"---\n{card}\n---\n# {repo}\n")
