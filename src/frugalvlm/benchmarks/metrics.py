"""The official metrics, each written once.

Sources: GQA as lmms-eval scores it; POPE and ScienceQA as LLaVA scores them
(haotian-liu/LLaVA, llava/eval/eval_pope.py and eval_science_qa.py); MME as its authors' tool and
lmms-eval do; VQA accuracy as in the VQA challenge, with the answer normaliser of EvalAI.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, truth: str) -> float:
    """GQA: 1.0 when both are equal after lower-casing and removing punctuation, else 0.0."""
    return float(_plain(answer) == _plain(truth))


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def pope_label(answer: str) -> str:
    """LLaVA's reading of a POPE answer: "no" if its first sentence says no or not, else "yes"."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def f1(true_yes: np.ndarray, false_yes: np.ndarray, false_no: np.ndarray) -> np.ndarray:
    """F1 of the class "yes", 0 to 1, elementwise; 0 where nobody says yes and nothing is yes."""
    wrong = false_yes + false_no
    return 2 * true_yes / np.maximum(2 * true_yes + wrong, 1e-12)


def mme_label(answer: str) -> str:
    """MME's reading of an answer: "yes", "no" or "other", from its first four characters."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    # The order is the official one: "yes" wins over "no".
    return next((label for label in ("yes", "no") if label in text[:4]), "other")


def mme_score(right: np.ndarray, both_right: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """MME of one category, 0 to 200: accuracy plus accuracy+ (both of a pair right).

    Args:
        right: questions answered correctly.
        both_right: pairs of which both questions are answered correctly.
        pairs: number of pairs; 0 gives 0.
    """
    return 100 * (right / 2 + both_right) / np.maximum(pairs, 1e-12)


def option_letter(answer: str, letters: str = "ABCD") -> str | None:
    """LLaVA's reading of a multiple-choice answer: a letter, "B. ..." or "The answer is B".

    One deviation: a letter alone or before a period counts in lower case too, because the pocket
    tokenizer knows no upper case.
    """
    text = answer.strip().replace("\n", ". ")
    if (alone := text.upper()) in set(letters):
        return alone
    if text[:1].upper() in set(letters) and text[1:3] == ". ":
        return text[0].upper()
    for pattern in (rf"The answer is ([{letters}])\.", rf"The answer is ([{letters}])"):
        if found := re.search(pattern, text):
            return found[1]
    return None


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy, 0 to 1: min(1, matches / 3), averaged over leaving out each reference once."""
    given = evalai_normalise(answer)
    matches = [evalai_normalise(reference) == given for reference in references]
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3) for own in matches) / len(matches)


_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
# The list repairs a word in which exactly one apostrophe is missing.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED for i, c in enumerate(word) if c == "'"
}


def evalai_normalise(text: str) -> str:
    """EvalAI's normal form of a VQA answer: case, punctuation, number words, articles."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for sign in _PUNCTUATION:
        # A sign at a word's edge goes; one inside a word parts it.
        at_edge = f"{sign} " in text or f" {sign}" in text
        spaced = spaced.replace(sign, "" if at_edge else " ")
    spaced = re.sub(r"\.(?!\d)", "", spaced)
    words = [_NUMBERS.get(word, word) for word in spaced.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
