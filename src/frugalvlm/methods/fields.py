"""What the fields of a method may hold: said by their annotations, checked in one place.

    kept_tokens: Annotated[Tokens, "T; 144 of 576 at a reduction ratio of 75 %"]
    k: Annotated[int, Limits(1), "K; 2 in the paper's main setting"] = 2
    merge: Annotated[Literal["sum", "mean"], "how a group becomes one token"] = "sum"

Types are whole numbers, finite numbers, True or False, texts, literals, classes, tuples of these,
and each of these or None. Any other is not checked, nor is what a class inside a function names.
A text in the annotation describes the field: `help(method)` shows it together with what the field
may hold. Numbers of numpy are made plain ones, lists tuples.
"""

from __future__ import annotations

import inspect
import math
import reprlib
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np

from frugalvlm.errors import FrugalError
from frugalvlm.views import BudgetError, UnsupportedError

__all__ = [
    "RUNTIME",
    "FullDoc",
    "Limits",
    "PlainSignature",
    "Rule",
    "Share",
    "Tokens",
    "refuse",
    "rules_of",
    "short",
    "shown",
    "validate",
    "whole",
]

# Marks fields that the engine fills in while a method is on a model; no hyper-parameters.
RUNTIME = {"runtime": True}


@dataclass(frozen=True)
class Limits:
    """What a number must be, or every number of a tuple.

    Attributes:
        least: the smallest that is possible.
        most: the largest.
        unit: what a whole number counts.
        error: what is raised for any other value.
    """

    least: float | None = None
    most: float | None = None
    unit: str = ""
    error: type[FrugalError] = UnsupportedError


Tokens = Annotated[int, Limits(1, unit="visual tokens", error=BudgetError)]
Share = Annotated[float, Limits(0, 1)]


@dataclass(frozen=True)
class Rule:
    """What one field may hold.

    Attributes:
        hint: its type, without what annotates it.
        limits: of its numbers; None: none but being finite.
        text: its description.
    """

    hint: Any
    limits: Limits | None = None
    text: str = ""

    @property
    def kind(self) -> Any:
        """The type without its parameters."""
        return UnionType if get_origin(self.hint) is Union else get_origin(self.hint) or self.hint

    @property
    def parts(self) -> list[Rule]:
        """Rules of what a tuple holds, or of the choices that there are; with its limits."""
        if self.kind not in (tuple, UnionType):
            return []
        inner = [_rule(hint) for hint in get_args(self.hint) if hint is not ...]
        return [replace(rule, limits=rule.limits or self.limits) for rule in inner]

    @property
    def error(self) -> type[FrugalError]:
        """What is raised for any other value."""
        limits = [rule.limits for rule in (self, *self.parts) if rule.limits]
        return limits[0].error if limits else UnsupportedError

    @property
    def words(self) -> str:
        """What is possible, for a sentence."""
        if self.kind in (int, float):
            limits = self.limits or Limits()
            noun = "a whole number" if self.kind is int else "a finite number"
            noun += f" of {limits.unit}" if limits.unit else ""
            noun += "" if limits.least is None else f" from {limits.least:g}"
            return noun + ("" if limits.most is None else f" to {limits.most:.10g}")
        if self.kind is Literal:
            return f"one of {', '.join(map(repr, get_args(self.hint)))}"
        if self.kind is tuple and not self.parts:
            return "a tuple"
        if self.kind is tuple:
            return f"a tuple of which each is {self.parts[0].words}"
        if self.kind is UnionType:
            return " or ".join(part.words for part in self.parts)
        known = {bool: "True or False", str: "a text", NoneType: "None", Any: "anything"}
        return known.get(self.kind) or f"a {getattr(self.kind, '__name__', self.kind)}"

    def plain(self, value: Any) -> Any:
        """The value as records keep it.

        Raises:
            ValueError: when it is not possible.
        """
        if self.kind in (int, float):
            return self._number(value)
        if self.kind is tuple:
            return self._tuple(value)
        if self.kind is UnionType:
            return self._any(value)
        if self.kind is Literal:
            known = [k for k in get_args(self.hint) if isinstance(value, type(k)) and value == k]
            if not known:
                raise ValueError
            return known[0]
        if self.kind is bool and isinstance(value, np.bool_):
            return bool(value)
        checked = isinstance(self.kind, type) and self.kind is not Any  # a class since 3.11
        if checked and not isinstance(value, self.kind):
            raise ValueError
        return str(value) if self.kind is str else value

    def _number(self, value: Any) -> int | float:
        if not (whole(value) or (self.kind is float and isinstance(value, float | np.floating))):
            raise ValueError
        plain = int(value) if whole(value) else float(value)
        limits = self.limits or Limits()
        least = -math.inf if limits.least is None else limits.least
        most = math.inf if limits.most is None else limits.most
        if not least <= plain <= most or (self.kind is float and not _finite(plain)):
            raise ValueError
        return plain

    def _tuple(self, value: Any) -> tuple:
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise ValueError
        if not self.parts:  # of anything
            return tuple(value)
        (inner,) = self.parts
        return tuple(inner.plain(part) for part in value)

    def _any(self, value: Any) -> Any:
        for part in self.parts:
            try:
                return part.plain(value)
            except ValueError:
                continue
        raise ValueError


def rules_of(method: type) -> dict[str, Rule]:
    """The rule of every field of a method's class that a user sets, in their order."""
    return {f.name: _declared(_owner(method, f.name), f.name) for f in _own(method)}


def validate(method: Any) -> None:
    """Check every field of a new method, and make its values plain.

    Raises:
        BudgetError: for a number of visual tokens that cannot be.
        UnsupportedError: for any other field.
    """
    for name, rule in rules_of(type(method)).items():
        value = getattr(method, name)
        try:
            plain = rule.plain(value)
        except ValueError:
            raise refuse(method, name, rule.words, rule.error) from None
        if plain is not value:
            object.__setattr__(method, name, plain)


def refuse(
    method: Any, name: str, possible: str, error: type[FrugalError] = UnsupportedError
) -> FrugalError:
    """The error for a field: one sentence with the method, the field, its value, and a remedy.

    Args:
        method: the object.
        name: of the field.
        possible: what it may be, as in "a whole number from 1".
        error: its class.
    """
    call = f"{type(method).__name__}({name}={shown(getattr(method, name))})"
    return error(f"{call} is impossible: {name} is {possible}.")


def whole(value: object) -> bool:
    """Whether this is a whole number, of Python or of numpy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value in a sentence: on one line, and not too long."""
    return " ".join(reprlib.repr(value).split())


def short(method: Any) -> str:
    """How a method is written: without what is as by default."""
    parts = []
    for i, f in enumerate(_own(type(method))):
        value, default = getattr(method, f.name), _default(f)
        if type(value) is type(default) and value == default:
            continue
        named = f.kw_only or (i > 0 and default is not MISSING)
        parts.append(f"{f.name}={value!r}" if named else repr(value))
    return f"{type(method).__name__}({', '.join(parts)})"


class PlainSignature:
    """The signature that help shows: names and defaults, for `FullDoc` says what they may be."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        kinds = inspect.Parameter
        return inspect.Signature([
            kinds(f.name, kinds.KEYWORD_ONLY if f.kw_only else kinds.POSITIONAL_OR_KEYWORD,
                  default=kinds.empty if _default(f) is MISSING else _default(f))
            for f in (_own(owner) if is_dataclass(owner) else ())
        ])  # fmt: skip


class FullDoc:
    """A class docstring that goes on with the arguments and with the paper, made when it is read.

    Args:
        own: the class's own words.
        module: the docstring of its module: idea, paper, algorithm.
    """

    def __init__(self, own: str, module: str) -> None:
        self.own, self.module = own, module

    def __get__(self, instance: object, owner: type) -> str:
        parts = [inspect.cleandoc(self.own)] if self.own else []
        told = [_argument(f, rules_of(owner)[f.name]) for f in _own(owner)]
        if told and "Attributes:" not in self.own and "Args:" not in self.own:
            parts.append("\n".join(["Args:", *told]))
        return "\n\n".join([*parts, *([self.module.strip()] if self.module else [])])


def _argument(f: Field, rule: Rule) -> str:
    default = "" if _default(f) is MISSING else f"; default {_default(f)!r}"
    text = f": {rule.text}" if rule.text else ""
    return textwrap.fill(
        f"{f.name} ({rule.words}{default}){text}",
        width=100, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False,
    )  # fmt: skip


def _own(method: type) -> list[Field]:
    """The fields that a user sets, in the order in which they are given."""
    told = [f for f in fields(method) if f.init and not f.metadata.get("runtime")]
    return sorted(told, key=lambda f: bool(f.kw_only))


def _default(f: Field) -> Any:
    """The value that is taken where none is given, or `MISSING`.

    By type: a class that was pickled by value, as notebooks' are, has a `MISSING` of its own.
    """
    if callable(f.default_factory):
        return f.default_factory()
    return MISSING if isinstance(f.default, type(MISSING)) else f.default


def _owner(method: type, name: str) -> type:
    """The class that says last what a field is."""
    return next(c for c in method.__mro__ if name in inspect.get_annotations(c))


@cache
def _declared(owner: type, name: str) -> Rule:
    hint = inspect.get_annotations(owner)[name]
    if isinstance(hint, str):
        module = sys.modules.get(owner.__module__)
        try:
            hint = eval(hint, dict(vars(module)) if module else {})
        except NameError as error:
            if "<locals>" in owner.__qualname__:
                return Rule(Any)
            raise UnsupportedError(
                f"The annotation of {owner.__name__}.{name} cannot be read ({error}): import what "
                "it names, and not for type checking only."
            ) from error
    return _rule(hint)


def _rule(hint: Any) -> Rule:
    if get_origin(hint) is not Annotated:
        return Rule(hint)
    hint, *more = get_args(hint)
    # A named type may be annotated itself; what stands further out counts.
    limits = [m for m in more if isinstance(m, Limits)]
    texts = [m for m in more if isinstance(m, str)]
    return Rule(hint, limits[-1] if limits else None, texts[-1] if texts else "")


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float can hold
        return False
