"""Reading one paper's files: YAML and CSV into the classes, or a sentence with file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from frugalvlm.errors import FrugalError
from frugalvlm.papers.classes import (
    EQUALS,
    KINDS,
    ONCE,
    ORIGINS,
    QUANTITY_KINDS,
    RELATIONS,
    SCALES,
    STATES,
    Anomaly,
    Average,
    Budget,
    Claim,
    Code,
    Column,
    LayoutModel,
    Paper,
    Row,
    Table,
    Unverified,
    suggestion,
)
from frugalvlm.papers.figures import Complaint, complaints_of_figures, text_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

__all__ = ["PARTS", "PaperFormatError", "read_paper"]

# By the field that holds it, the class of a part; "" is the whole file.
PARTS: Mapping[str, type] = {
    "": Paper,
    "code": Code,
    "claims": Claim,
    "tables": Table,
    "models": LayoutModel,
    "budgets": Budget,
    "rows": Row,
    "columns": Column,
    "unverified": Unverified,
    "anomalies": Anomaly,
    "averages": Average,
}
_Place = tuple[str | int, ...]  # fields and numbers of list entries, from the whole to the part
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\dZ")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's reads five times as fast


class PaperFormatError(FrugalError, ValueError):
    """A paper's file that cannot be used; the message gives file, line and remedy."""


def read_paper(key: str, folder: Path) -> Paper:
    """A paper from `KEY.yaml`; its `KEY.csv` is looked at, too.

    Raises:
        PaperFormatError: for a file that breaks the format.
    """
    path = folder / f"{key}.yaml"
    text = text_of(path)
    if isinstance(text, tuple):
        raise _error(path, [text])
    try:
        loader = _LOADER(text)  # looks at the characters
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise _error(path, [_broken(error, text)]) from None
    twice = list(_fields_twice(root, set()))
    if twice:
        raise _error(path, twice)
    paper, complaints = _build(loader, root, key)
    if paper is None or complaints:
        raise _error(path, [(_line(root, place), what) for place, what in complaints])
    figures = folder / f"{key}.csv"
    wrong = list(complaints_of_figures(figures, key))
    if wrong:
        raise _error(figures, wrong)
    return paper


def _error(path: Path, complaints: list[Complaint]) -> PaperFormatError:
    line, what = complaints[0]
    more = f" ({len(complaints) - 1} more like this in the file)" if complaints[1:] else ""
    return PaperFormatError(f"{path}:{line}: {what}{more}. See docs/papers_format.md.")


# -- text ------------------------------------------------------------------------------------------


def _broken(error: yaml.YAMLError, text: str) -> Complaint:
    """Where and why text is no YAML."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # a character that may not stand in YAML at all
        place = getattr(error, "position", 0)
        return text[:place].count("\n") + 1, "a control character stands here; remove it"
    problem = " ".join(str(getattr(error, "problem", None) or "no YAML").split())
    lines = text.splitlines()
    here = lines[mark.line] if mark.line < len(lines) else ""
    remedy = "put text with colons, braces or % in quotes and close what was opened"
    if "\t" in here[: len(here) - len(here.lstrip())]:
        remedy = "indent with spaces, not with tabs"
    return mark.line + 1, f"this is no YAML ({problem}); {remedy}"


def _fields_twice(node: yaml.Node | None, seen: set[int]) -> Iterator[Complaint]:
    """Fields that stand twice in one part: YAML would silently take the last."""
    if node is None or id(node) in seen:  # anchors show the same part in several places
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            yield from _fields_twice(part, seen)
    if isinstance(node, yaml.MappingNode):
        names: dict[str, int] = {}
        for name, part in node.value:
            line = name.start_mark.line + 1
            if name.value in names:
                first = names[name.value]
                yield line, f"{name.value!r} stands in line {first} already; remove one of them"
            names[str(name.value)] = line
            yield from _fields_twice(part, seen)


def _line(node: yaml.Node | None, place: _Place) -> int:
    """The line, from 1, of a part, or of the nearest part around it that is there."""
    line = 1
    for step in place:
        if isinstance(node, yaml.MappingNode):
            for name, part in node.value:
                if name.value == step:
                    line, node = name.start_mark.line + 1, part
                    break
            else:
                break
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line


# -- fields ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _validator() -> TypeAdapter[Paper]:
    from pydantic import TypeAdapter  # late: who lists papers does not need it

    return TypeAdapter(Paper)


def _build(
    loader: Any, root: yaml.Node | None, key: str
) -> tuple[Paper | None, list[tuple[_Place, str]]]:
    """The paper, or what is wrong with it and where."""
    from pydantic import ValidationError

    try:
        raw = None if root is None else loader.construct_document(root)
        if not isinstance(raw, dict):
            shape = {list: "a list", type(None): "nothing but comments"}.get(type(raw), "text")
            return None, [((), f"this is {shape}, no fields; begin with key: {key}")]
        added = [f.name for f in fields(Paper) if f.metadata.get("added") and f.name in raw]
        if added:
            return None, [((name,), _unknown("", name)) for name in added]
        # By way of JSON, for there lists may stand for tuples although types are taken strictly.
        paper = _validator().validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
        found.sort(key=lambda detail: detail["type"] == "missing")  # a misspelt field is, too
        return None, [_told(detail) for detail in found]
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        return None, [((), f"this cannot be read ({' '.join(str(error).split())}); simplify it")]
    return paper, list(_checked(paper, key))


_WISHES = {
    "string_type": "text (numbers in quotes)",
    "tuple_type": "a list",
    "dataclass_type": "fields with values",
    "mapping_type": "names with values",
    "dict_type": "names with values",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
}


def _told(detail: ErrorDetails) -> tuple[_Place, str]:
    """Place and sentence of what the validator found."""
    place = tuple(detail["loc"])
    where, name = _name(place[:-1]), place[-1] if place else ""
    if detail["type"] == "missing":
        return place, f"{where} lacks the field {name!r}; add it"
    if detail["type"] == "unexpected_keyword_argument":
        return place, _unknown(_holder(place[:-1]), str(name), where)
    wish = _WISHES.get(detail["type"], detail["msg"].replace("Input should be ", ""))
    given = "nothing" if detail["input"] is None else json.dumps(detail["input"], default=str)
    given = given if len(given) < 60 else f"{given[:57]}..."
    return place, f"{_name(place)} must be {wish}, not {given}"


def _unknown(holder: str, name: str, where: str = "the paper") -> str:
    known = [f.name for f in fields(PARTS[holder]) if not f.metadata.get("added")]
    return f"{where} has no field {name!r}{suggestion(name, known)}; it has {', '.join(known)}"


def _holder(place: _Place) -> str:
    """Which class a part is of, as a key of PARTS."""
    names = [step for step in place if isinstance(step, str)]
    return names[-1] if names and names[-1] in PARTS else ""


def _name(place: _Place) -> str:
    """A place in words: `claims[2].threshold`; entries count from 0."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.lstrip(".") or "the paper"


# -- meaning ---------------------------------------------------------------------------------------


def _checked(paper: Paper, key: str) -> Iterator[tuple[_Place, str]]:
    """What types alone do not tell."""
    if paper.key != key:
        yield ("key",), f"this describes {paper.key!r}, not {key!r}: name key and files alike"
    if not paper.arxiv.replace(".", "").isdigit():
        yield ("arxiv",), f'{paper.arxiv!r} is no arXiv number; write it like "2412.04467"'
    yield from _among(("kind",), paper.kind, KINDS)
    if set(paper.status) != set(SCALES) or not set(paper.status.values()) <= set(STATES):
        yield ("status",), f"status must give one of {', '.join(STATES)} for each of {SCALES}"
    yield from _once("claims", [claim.id for claim in paper.claims])
    yield from _once("tables", [table.id for table in paper.tables])
    for number, claim in enumerate(paper.claims):
        yield from _of_claim(("claims", number), claim)
    for number, table in enumerate(paper.tables):
        yield from _of_table(("tables", number), table, table is paper.pocket_table)


def _of_claim(place: _Place, claim: Claim) -> Iterator[tuple[_Place, str]]:
    where = f"claim {claim.id}: "
    yield from _among((*place, "scales"), claim.scales, SCALES, where)
    if sorted([*claim.scales, *claim.why_not]) != sorted(SCALES):
        yield (
            (*place, "scales"),
            (f"{where}each scale needs to be in scales or, once, in why_not (with its reason)"),
        )
    yield from _among((*place, "origin"), [claim.origin], ORIGINS, where)
    if claim.written and not _MOMENT.fullmatch(claim.written):
        yield (*place, "written"), f'{where}write the moment like "2026-11-21T16:16Z"'
    if claim.margin and not claim.why_margin:
        yield (*place, "margin"), f"{where}a margin needs its reason; add why_margin"
    if claim.quantity is not None:
        yield from _of_quantity((*place, "quantity"), claim.quantity, where)
        yield from _among((*place, "relation"), [claim.relation], RELATIONS, where)
        if claim.threshold is None:
            yield (*place, "quantity"), f"{where}a quantity needs a threshold; add the field"
    turned = claim.effect is not None and claim.effect * (1 if claim.relation == ">" else -1) <= 0
    if turned:
        yield (
            (*place, "reported"),
            f"{where}the paper's own number does not meet it; turn the relation or the sides round",
        )


def _of_quantity(
    place: _Place, quantity: Mapping[str, Any], where: str
) -> Iterator[tuple[_Place, str]]:
    yield from _among((*place, "kind"), [quantity.get("kind")], QUANTITY_KINDS, where)
    if quantity.get("kind") != "difference":
        return
    sides = [quantity.get(side) for side in ("a", "b")]
    methods = [side.get("method") for side in sides if isinstance(side, Mapping)]
    if len(methods) < 2:
        yield place, f"{where}a difference needs its sides a and b"
    elif quantity.get("of", "retention") in ("retention", "score") and methods[0] != methods[1]:
        yield from _among((*place, "equal"), [quantity.get("equal")], EQUALS, where)


def _of_table(place: _Place, table: Table, main: bool) -> Iterator[tuple[_Place, str]]:
    where = f"layout {table.id}: "
    yield from _among((*place, "scales"), table.scales, SCALES, where)
    if table.pocket_model and main:
        yield (
            (*place, "pocket_model"),
            f"{where}the main table must stand before it, and has no model of its own",
        )
    if table.baseline not in [row.method for row in table.rows]:
        yield (*place, "baseline"), f"{where}its baseline is none of its rows; add that row"
    if not table.models:
        yield (*place, "models"), f"{where}it needs a model"
    rows = [row.method for row in table.rows]
    yield from _once((*place, "rows"), rows, "method", where)
    for number, row in enumerate(table.rows):
        yield from _of_row((*place, "rows", number), table, row, where)
    columns = [column.id for column in table.columns]
    yield from _once((*place, "columns"), columns, "id", where)
    yield from _once((*place, "models"), [model.name for model in table.models], "name", where)


def _of_row(place: _Place, table: Table, row: Row, where: str) -> Iterator[tuple[_Place, str]]:
    name = f"{where}row {row.method}: "
    if row.once is not None:
        yield from _among((*place, "once"), [row.once], ONCE, name)
        if row.at or row.values or row.settings:
            yield (*place, "once"), f"{name}once goes with none of at, values and settings"
    budgets = [budget for model in table.models for budget in model.budgets]
    known = [str(budget.paper_tokens) for budget in budgets]
    yield from _among((*place, "at"), map(str, row.at), known, name)
    for field, values in (*row.values.items(), ("settings", row.settings)):
        if len(values) not in ({0} if field == "settings" else set()) | {len(budgets)}:
            yield place, f"{name}{field} needs {len(budgets)} entries, one for each budget"


def _among(
    place: _Place, values: Iterable[object], allowed: Collection[str], where: str = ""
) -> Iterator[tuple[_Place, str]]:
    for value in values:
        if value not in allowed:
            yield (
                place,
                (
                    f"{where}{place[-1]}: {value!r} is none of "
                    f"{', '.join(allowed)}{suggestion(value, allowed)}"
                ),
            )


def _once(
    place: str | _Place, names: list[str], field: str = "id", where: str = ""
) -> Iterator[tuple[_Place, str]]:
    place = (place,) if isinstance(place, str) else place
    for number, name in enumerate(names):
        if name in names[:number]:
            yield (
                (*place, number, field),
                f"{where}the {field} {name!r} stands twice in {place[-1]}; rename one of them",
            )
