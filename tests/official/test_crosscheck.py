"""lmms-eval's own prompts and scores of the same rows and answers; every difference is named.

Skipped without lmms-eval. It wants some hundred libraries; its scoring runs with few:
`pip install --no-deps lmms-eval==0.7.3` and `pip install loguru sacrebleu evaluate pytz`.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
from miniatures import MADE

from frugalvlm.benchmarks.official import OFFICIAL

tasks = pytest.importorskip("lmms_eval.tasks")

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
MODULES = {  # module, its prefix of names
    "gqa": ("gqa.utils", "gqa"), "pope": ("pope.utils", "pope"), "mme": ("mme.utils", "mme"),
    "scienceqa": ("scienceqa.utils", "sqa"), "textvqa": ("textvqa.utils", "textvqa"),
    "textvqa-plain": ("textvqa.utils", "textvqa"), "vqav2": ("vqav2.utils", "vqav2"),
    "vizwiz": ("vizwiz_vqa.utils", "vizwiz_vqa"), "seed": ("seedbench.utils", "seed"),
    "chartqa": ("chartqa.utils", "chartqa"), "docvqa": ("docvqa.utils", "docvqa"),
    "ocrbench": ("ocrbench.utils", "ocrbench"),
}  # fmt: skip
TOLD: dict[str, Any] = {  # each task's own settings, of its YAML file
    "default": {"pre_prompt": "", "post_prompt": SHORT},
    "scienceqa": {"format": "default", "pre_prompt": "", "post_prompt": LETTER},
    "textvqa": {"pre_prompt": "", "post_prompt": SHORT, "ocr": True},
    "vizwiz": {"pre_prompt": "", "post_prompt": "\nWhen the provided information is insufficient, "
               f"respond with 'Unanswerable'.{SHORT}"},
    "chartqa": {"pre_prompt": "", "post_prompt": "\nAnswer the question with a single word."},
    "ocrbench": {"pre_prompt": "", "post_prompt": ""},
}  # fmt: skip
# lmms-eval writes these questions with a capital first letter and all others small.
CAPITAL = {"textvqa", "textvqa-plain", "vizwiz"}
SHAPES = (
    "{}", "{}.", " {} ", "The answer is {}", "{} or so", "", "Yes", "no", "No, it is not.", "A",
    "B.", "the {}", "2", "two", "go", "unanswerable",
)  # fmt: skip


def _module(name: str) -> tuple[Any, str]:
    module, prefix = MODULES[name]
    return importlib.import_module(f"lmms_eval.tasks.{module}"), prefix


def _documents(name: str) -> tuple[list[dict], list[dict]]:
    """The kit's rows, and the raw rows that they come from."""
    benchmark = OFFICIAL[name]
    raw, _ = MADE[benchmark.source.repo](benchmark.source.config)
    kept = [row for i, row in enumerate(raw) if benchmark.read(row, i) is not None]
    return benchmark.dataset("test", 0).texts, kept


@pytest.mark.parametrize("name", MODULES)
def test_prompts_are_lmms_evals(name, offline):
    module, prefix = _module(name)
    ask = getattr(module, f"{prefix}_doc_to_text")
    told = TOLD.get(name, TOLD["default"])
    for row, document in zip(*_documents(name), strict=True):
        theirs = ask(document) if name == "seed" else ask(document, told)
        ours = row["question"]
        if name in CAPITAL:
            ours, theirs = ours.lower(), theirs.lower()
        assert ours == theirs


# By benchmark the name of lmms-eval's score, and whether the two rules differ on purpose.
SCORES = {
    "mme": (None, False), "textvqa": ("exact_match", False), "vqav2": ("exact_match", False),
    "vizwiz": ("exact_match", False), "chartqa": ("relaxed_overall", False),
    "ocrbench": ("ocrbench_accuracy", False), "seed": ("seed_image", False),
    "scienceqa": ("exact_match", True), "pope": ("pope_accuracy", True),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_lmms_evals(name, shape, offline):
    module, prefix = _module(name)
    process = getattr(module, f"{prefix}_process_result{'' if name == 'seed' else 's'}")
    rows, documents = _documents(name)
    said = [shape.format(row["answer"]) for row in rows]
    found = [process(copy.deepcopy(d), [a]) for d, a in zip(documents, said, strict=True)]
    sheet = OFFICIAL[name].sheet(rows, said)
    if name == "mme":
        theirs = sum(
            module.mme_aggregate_results([r[key] for r in found if key in r])
            for key in ("mme_perception_score", "mme_cognition_score")
        )
        assert sheet.headline == pytest.approx(theirs)
        return
    key, differ = SCORES[name]
    scores = [_number(r[key]) for r in found]
    if name == "pope":  # its F1 stands among the details
        together = module.pope_aggregate_f1_score([r["pope_f1_score"] for r in found])
        assert sheet.details["lmms_eval"] == pytest.approx(100 * together)
    elif differ:
        assert sheet.details["lmms_eval"] == pytest.approx(100 * sum(scores) / len(scores))
        differing = sum(a != b for a, b in zip(sheet.correct, scores, strict=True))
        assert sheet.details["rules_differ"] == differing
    else:
        assert sheet.correct.tolist() == pytest.approx(scores)


def _number(score: Any) -> float:
    if isinstance(score, dict) and "pred" in score:
        return float(score["pred"].lower().strip() == score["answer"].lower().strip())
    return float(score["score"] if isinstance(score, dict) else score)


def test_gqa_is_lmms_evals_exact_match(offline):
    evaluate = pytest.importorskip("lmms_eval.api.metrics").exact_match_hf_evaluate
    rows, _ = _documents("gqa")
    for shape in SHAPES:
        said = [shape.format(row["answer"]) for row in rows]
        theirs = [
            evaluate(predictions=[a], references=[r["answer"]], ignore_case=True,
                     ignore_punctuation=True)["exact_match"]
            for a, r in zip(said, rows, strict=True)
        ]  # fmt: skip
        assert (
            OFFICIAL["gqa"].sheet(rows, [a.strip() for a in said]).correct.tolist()
            == (pytest.approx([float(x) for x in theirs]))
            or shape != shape.strip()
        )
