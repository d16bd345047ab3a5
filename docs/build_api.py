"""Write docs/api.md from the docstrings of what users call: `python docs/build_api.py`.

A test compares the page with what this makes of the code.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import frugalvlm
from frugalvlm import carbon, errors, methods, trace, views

PAGE = Path(__file__).with_name("api.md")
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
# What the page shows, in order: a heading, what is said under it, and the things themselves.
CHAPTERS: list[tuple[str, str, list[Any]]] = [
    (
        "The front",
        "`from frugalvlm import ...`",
        [
            value
            for name in frugalvlm.__all__
            if callable(value := getattr(frugalvlm, name)) and not inspect.ismodule(value)
        ],
    ),
    (
        "Methods",
        "`from frugalvlm import methods`. Every method is a frozen object of its paper's "
        "hyper-parameters: `with methods.FastV(16).on(model) as trace:` puts it on a model, "
        "`methods.FastV.for_budget(16, 144)` makes it for a budget of visual tokens.",
        [
            *(v for v in (*methods.METHODS.values(), *methods.VARIANTS.values())),
            methods.method_class,
        ],
    ),
    ("What all methods share", "", list(methods.KINDS)),
    ("Traces", "What `on` gives.", [trace.Trace, trace.ExitTrace]),
    (
        "Carbon",
        "`from frugalvlm import carbon`. What a fine-tuning emits against what it gains, and after "
        "how many questions it has paid for itself.",
        [getattr(carbon, name) for name in carbon.__all__ if name != "CarbonError"],
    ),
    (
        "Errors",
        "Every known problem is a `FrugalError`: one sentence that names the remedy.",
        [
            errors.FrugalError,
            views.UnsupportedError,
            views.BudgetError,
            trace.TraceError,
            carbon.CarbonError,
        ],
    ),
]


def page() -> str:
    """The whole page, in Markdown."""
    parts = [
        "# API",
        "Written by `python docs/build_api.py` from the docstrings; `help(...)` shows the same.",
    ]
    parts += [f"- [{title}](#{title.lower().replace(' ', '-')})" for title, _, _ in CHAPTERS]
    parts = [*parts[:2], "\n".join(parts[2:])]
    for title, words, things in CHAPTERS:
        parts += [f"## {title}", *([words] if words else [])]
        seen: set[str] = set()  # modules whose paper has been shown
        for thing in things:
            parts += _entry(thing, thing.__module__ in seen)
            seen.add(thing.__module__)
    return "\n\n".join(parts) + "\n"


def _entry(thing: Any, paper_shown: bool) -> Iterator[str]:
    is_method = inspect.isclass(thing) and thing in (
        *methods.METHODS.values(),
        *methods.VARIANTS.values(),
    )
    yield f"### {thing.__name__}"
    if is_method:
        yield f"`methods.{thing.__name__}{_signature(thing)}`, named `{thing.key}` in records"
    elif not inspect.isclass(thing):
        yield f"`{thing.__name__}{_signature(thing)}`"
    doc = inspect.getdoc(thing) or ""
    if is_method and paper_shown:
        doc = doc.removesuffix((sys.modules[thing.__module__].__doc__ or "").strip())
    yield from _markdown(doc)
    if is_method:
        for name in ("for_budget", "for_mean"):
            if hasattr(thing, name):
                yield from _member(name, getattr(thing, name))
    elif inspect.isclass(thing) and not issubclass(thing, Exception):
        for name, member in vars(thing).items():
            if not name.startswith("_") and _is_call(member) and not name.startswith("note_"):
                yield from _member(name, member)


def _is_call(member: Any) -> bool:
    return isinstance(member, property | classmethod) or inspect.isfunction(member)


def _member(name: str, member: Any) -> Iterator[str]:
    member = getattr(member, "__func__", member)
    call = "" if isinstance(member, property) else _signature(member, skip=("self", "cls"))
    yield f"**`{name}{call}`**"
    yield from _markdown(inspect.getdoc(member) or "")


class _Words:
    """An annotation, as it stands in the code."""

    def __init__(self, text: Any) -> None:
        self.text = text if isinstance(text, str) else getattr(text, "__name__", str(text))

    def __repr__(self) -> str:
        return self.text


def _signature(thing: Any, skip: tuple[str, ...] = ()) -> str:
    empty, signature = inspect.Signature.empty, inspect.signature(thing)
    parameters = [
        p if p.annotation is empty else p.replace(annotation=_Words(p.annotation))
        for p in signature.parameters.values()
        if p.name not in skip
    ]
    gives = signature.return_annotation
    gives = empty if gives is empty or inspect.isclass(thing) else _Words(gives)
    return str(inspect.Signature(parameters, return_annotation=gives))


def _markdown(doc: str) -> Iterator[str]:
    """A docstring's paragraphs, its sections as lists."""
    doc = re.sub(r"\n(?=(Complexity|Deviations): )|(?<=:)\n(?=\d+\. )", "\n\n", doc.strip())
    for block in re.split(r"\n\s*\n", doc):
        title, _, rest = block.partition(":\n")
        if title not in SECTIONS:
            yield _escaped(block)
        elif title in ("Returns", "Yields"):
            yield f"{title}: {_escaped(' '.join(rest.split()))}"
        else:
            indent = len(rest) - len(rest.lstrip())
            entries = re.split(rf"\n {{{indent}}}(?=\S)", "\n" + rest)[1:]
            lines = [" ".join(entry.split()) for entry in entries]
            yield f"{title}:"
            yield "\n".join(
                re.sub(r"^([\w.*]+)", r"- `\1`", line, count=1) for line in map(_escaped, lines)
            )


def _escaped(text: str) -> str:
    """No accidental emphasis or tags; code stays as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE}.")
