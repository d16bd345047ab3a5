"""The page about the format, printed from the classes: `python -m frugalvlm.papers.page`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields

from frugalvlm.papers.classes import (
    EQUALS,
    FIGURE,
    KINDS,
    ORIGINS,
    QUANTITY_KINDS,
    RELATIONS,
    SCALES,
    STATES,
)
from frugalvlm.papers.reading import PARTS

__all__ = ["format_page"]

_HEAD = """# The files of a paper

<!-- Printed by `python -m frugalvlm.papers.page > docs/papers_format.md`; a test compares. -->

A paper is two files in `data/papers/`: `KEY.yaml` describes it, `KEY.csv` holds its reported
figures. `KEY` is the paper's one name everywhere and a Python identifier (`visionzip`). The kit
lists the papers of this folder by itself, in the order of their arXiv numbers, and looks at both
files whenever it reads one: what does not fit is refused with file, line and remedy, and the other
papers go on. `invoke new --paper KEY` lays both files out; `safe.yaml` is a short one to look at,
`visionzip.yaml` a complete one.

YAML is indented with spaces. Text with a colon, a brace or a number that is meant as text
(`arxiv: "2412.04467"`) stands in quotes. Fields in bold are required.
"""
_CSV = """
## KEY.csv

One printed number a line, in UTF-8, under this header. No cell is empty but `visual_tokens`, and no
figure stands twice. A paper of which no number could be read has the header alone.

```
{header}
```

| column | what it holds |
| --- | --- |
"""


def format_page() -> str:
    """The page as Markdown."""
    parts = [_HEAD, "\n## KEY.yaml\n"]
    parts += [_section(held_in, cls) for held_in, cls in PARTS.items()]
    lists = {"Kinds of papers": KINDS, "Scales": SCALES, "States": STATES, "Relations": RELATIONS}
    parts.append("\n### Words that fields may take\n\n")
    parts += [f"- {name}: {_codes(words)}\n" for name, words in lists.items()]
    parts += _words("Kinds of quantities", "kind", "what it measures", QUANTITY_KINDS)
    parts += _words("`equal`: fair pairs", "equal", "by what both sides are alike", EQUALS)
    parts += _words("`origin`: who says so", "origin", "who makes the claim", ORIGINS)
    parts.append(_CSV.format(header=",".join(FIGURE)))
    parts += [f"| `{column}` | {meaning} |\n" for column, meaning in FIGURE.items()]
    return "".join(parts)


def _words(title: str, word: str, meaning: str, words: Mapping[str, str]) -> list[str]:
    """A list of words that a field may take, as a table."""
    head = f"\n### {title}\n\n| {word} | {meaning} |\n| --- | --- |\n"
    return [head, *(f"| `{key}` | {text} |\n" for key, text in words.items())]


def _section(held_in: str, cls: type) -> str:
    """One class: its sentence, and a line for every field."""
    text = inspect.cleandoc(cls.__doc__ or "")
    intro, _, listed = text.partition("Attributes:\n")
    meanings = _meanings(listed)
    title = f"`{held_in}`: {cls.__name__}" if held_in else "The whole file"
    lines = [f"\n### {title}\n\n{intro.strip()}\n\n| field | default | what it holds |\n"]
    lines.append("| --- | --- | --- |\n")
    for one in fields(cls):
        if not one.metadata.get("added"):
            name = f"**`{one.name}`**" if _required(one) else f"`{one.name}`"
            lines.append(f"| {name} | {_default(one)} | {meanings[one.name]} |\n")
    return "".join(lines)


def _meanings(listed: str) -> dict[str, str]:
    """What the docstring's list says, by field."""
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", listed, re.MULTILINE)
    return {name: " ".join(text.split()).replace("|", "\\|") for name, text in found}


def _required(one: Field[object]) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _default(one: Field[object]) -> str:
    if _required(one):
        return ""
    if one.default is MISSING or one.default in ((), ""):
        return "none"
    return one.default if isinstance(one.default, str) else json.dumps(one.default)


def _codes(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    print(format_page(), end="")
