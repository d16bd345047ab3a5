"""Which code a result depends on, in 16 hexadecimal digits.

Taken over syntax trees: every top-level statement of the files that a result depends on is hashed,
and the identity is the hash of these hashes in sorted order. Docstrings, comments, layout, import
lines, `__all__`, file names and the order of definitions are not part of it, so a sentence can be
corrected and a definition moved from one of these files to another; a statement that decides an
answer cannot change unnoticed.

A method depends on the rooms of `ALWAYS` and, within methods/, on its own module and what that
imports. Of a class that is defined elsewhere (a user's file, a notebook cell, a study) the class
counts, with the functions, classes and plain constants that its code names.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from frugalvlm.digest import request_hash
from frugalvlm.errors import FrugalError
from frugalvlm.hosts import Host
from frugalvlm.methods import METHODS, VARIANTS, Method
from frugalvlm.paths import command
from frugalvlm.runs.records import Record, method_key

__all__ = ["ALWAYS", "CodeError", "code_hash", "code_of", "of_other_code", "other_code_line"]

PACKAGE = "frugalvlm"
# What decides every answer, and the scores made of it. Left out on purpose: where results lie and
# how they are named and shown (runs.records, runs.setting, runs.options, digest, paths, drawing,
# formats, report), the list of known methods (methods/__init__), how embedded models are built and
# verified (pocket.models, pocket.installed: a record names their weights), and measure, on which
# costs depend and answers do not. Of the hosts, those of the embedded models; a model of another
# family adds its own host's file, so that a new family makes no record stale.
ALWAYS = (
    "views", "operators", "trace", "loading", "hosts.base", "hosts.llava", "engine",
    "methods.base", "benchmarks", "pocket.scenes", "pocket.questions", "pocket.clips",
    "pocket.onevision", "runs.accuracy",
)  # fmt: skip
# A room in one of these rooms, on which only who names it depends.
APART = ("benchmarks.official",)
SHOWN = {"plot", "__repr__", "__str__", "_repr_html_"}  # draws or prints; decides nothing
PLAIN = (bool, int, float, complex, str, bytes, type(None))


class CodeError(FrugalError, ValueError):
    """Code whose source cannot be had, or that does not exist; the message names the remedy."""


def code_of(method: Method, host: Host | None = None, *more: str) -> str:
    """Identity of all code that decides a method's answers.

    Args:
        method: the method.
        host: of the model that answers; default: one of the embedded models'.
        more: modules that decide them, too, such as an official benchmark's.

    Raises:
        CodeError: the source of the method's class cannot be had.
    """
    own = () if host is None else (type(host).__module__,)
    return code_hash(*own, method, *more)


def of_other_code(records: Iterable[Record]) -> list[Record]:
    """The accuracy records that other code made than the kit has now.

    Not those of methods that the kit does not list: their code is not known here. Records from
    before identities were taken over syntax trees are all of other code.
    """
    own: dict[str, str] = {}
    found = []
    for record in records:
        key = method_key(record) if record["kind"] == "accuracy" else None
        cls = None if key is None else METHODS.get(key) or VARIANTS.get(key)
        if key is not None and cls is not None:
            if key not in own:
                own[key] = code_hash(cls)
            if record["provenance"].get("code") != own[key]:
                found.append(record)
    return found


def other_code_line(records: Iterable[Record]) -> str:
    """What a reader must know of records of other code, in a sentence; "" if there are none."""
    answered = [r for r in records if r["kind"] == "accuracy"]
    other = len(of_other_code(answered))
    if not other:
        return ""
    return (
        f"{other} of {len(answered)} accuracy records were made by other code than this kit has "
        "now, so its answers may differ from theirs: "
        f"`{command('reproduce --paper KEY')}` makes them anew."
    )


def code_hash(*parts: str | ModuleType | type | Method) -> str:
    """Identity of what decides every answer, and of more code.

    Args:
        parts: modules or rooms of the package by their dotted names ("runs.costs", "measure"), or
            as modules; classes of methods, or methods.

    Raises:
        CodeError: an unknown name, or a class whose source cannot be had.
    """
    found = _Found()
    for part in (*ALWAYS, *parts):
        if isinstance(part, ModuleType):
            part = part.__name__
        if isinstance(part, str):
            found.add_files(part)
        elif isinstance(part, type):
            found.add_class(part)
        else:
            found.add_method(part)
    return found.identity()


class _Found:
    """What was found to be depended on: files of the package, and pieces of other code."""

    def __init__(self) -> None:
        self.files: set[Path] = set()
        self.pieces: dict[str, str] = {}  # by qualified name the hash of a definition or constant
        self.homes: set[str] = set()  # top-level packages that the methods asked for come from

    def identity(self) -> str:
        every = [tree for file in self.files for tree in _statements(file)]
        text = "\n".join([*sorted(every), *sorted(self.pieces.values())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def add_files(self, name: str) -> None:
        """A module or room of the package; of modules of methods/ also what they import of it."""
        waiting = list(_files(name.removeprefix(f"{PACKAGE}.")))
        while waiting:
            file = waiting.pop()
            if file not in self.files:
                self.files.add(file)
                waiting += [f for other in _methods_imported(file) for f in _files(other)]

    def add_method(self, method: Method) -> None:
        """A method, and the methods it is made of."""
        self.add_class(type(method))
        values = [getattr(method, f.name) for f in fields(method)] if is_dataclass(method) else []
        for value in values:
            for part in value if isinstance(value, tuple | list) else [value]:
                if isinstance(part, Method):
                    self.add_method(part)

    def add_class(self, cls: type) -> None:
        """A method's class with its bases."""
        for kind in cls.__mro__:
            if issubclass(kind, Method):
                self.homes.add(kind.__module__.split(".")[0])
        self._follow(cls)

    def _follow(self, value: Any, name: str = "") -> None:
        """Whatever code of ours or of the user's refers to."""
        if isinstance(value, PLAIN):
            if not name.startswith("__"):  # __file__ is no constant
                self.pieces.setdefault(f"= {name}", request_hash([name, repr(value)]))
            return
        if isinstance(value, tuple | list | dict | set | frozenset):
            parts = (
                [p for pair in value.items() for p in pair] if isinstance(value, dict) else value
            )
            parts = sorted(parts, key=repr) if isinstance(parts, set | frozenset) else list(parts)
            plain = [repr(part) if isinstance(part, PLAIN) else "" for part in parts]
            self.pieces.setdefault(f"= {name}", request_hash([name, plain]))
            for place, part in enumerate(parts):
                if not isinstance(part, PLAIN):
                    self._follow(part, f"{name}[{place}]")
            return
        if isinstance(value, ModuleType):
            if _in_methods(value.__name__):
                self.add_files(value.__name__)
            elif self._is_own(value.__name__) and (value.__file__ or "").endswith(".py"):
                every = ",".join(sorted(_statements(Path(value.__file__ or ""))))
                self.pieces[value.__name__] = request_hash(every)
            return
        module = getattr(value, "__module__", None)
        if not isinstance(module, str) or not (inspect.isclass(value) or callable(value)):
            return
        if _in_methods(module):
            self.add_files(module)
        elif not _is_always(module) and self._is_own(module):
            self._define(value, module)
        if inspect.isclass(value):
            for base in value.__bases__:
                self._follow(base)

    def _define(self, value: Any, module: str) -> None:
        value = inspect.unwrap(value)
        name = f"{module}.{getattr(value, '__qualname__', '')}"
        if name in self.pieces or not hasattr(value, "__qualname__"):
            return
        tree = _tree_of(value)
        # Without the indentation or file that it happens to stand in.
        self.pieces[name] = _hashed(tree)
        known = vars(sys.modules[module]) if module in sys.modules else {}
        for used, attribute in sorted(_names(tree)):
            if used not in known:
                continue
            thing = known[used]
            if isinstance(thing, ModuleType) and attribute and hasattr(thing, attribute):
                if not _is_foreign(thing.__name__):
                    self._follow(getattr(thing, attribute), attribute)
            else:
                self._follow(thing, used)

    def _is_own(self, module: str) -> bool:
        """Whether a module is the user's or the package's, not a library's."""
        return module.split(".")[0] in self.homes or not _is_foreign(module)


def _in_methods(module: str) -> bool:
    return module == f"{PACKAGE}.methods" or module.startswith(f"{PACKAGE}.methods.")


def _is_always(module: str) -> bool:
    inside = module.removeprefix(f"{PACKAGE}.")
    return module != inside and any(inside == a or inside.startswith(f"{a}.") for a in ALWAYS)


def _is_foreign(module: str) -> bool:
    """Whether a module belongs to Python or to an installed library."""
    top = module.split(".")[0]
    if top in (PACKAGE, "__main__"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    return top in sys.stdlib_module_names or bool(installed) or not file


@lru_cache(maxsize=256)
def _files(name: str) -> tuple[Path, ...]:
    """The files of a module, or of a room and all rooms in it."""
    root = Path(__file__).resolve().parents[1]
    path = root.joinpath(*name.split("."))
    if path.is_dir():
        apart = {root.joinpath(*a.split(".")) for a in APART if not f"{name}.".startswith(f"{a}.")}
        return tuple(f for f in sorted(path.rglob("*.py")) if not apart & set(f.parents))
    if path.with_suffix(".py").is_file():
        return (path.with_suffix(".py"),)
    raise CodeError(f"There is no module or room '{name}' in {PACKAGE}, so it has no identity.")


@lru_cache(maxsize=256)
def _methods_imported(file: Path) -> tuple[str, ...]:
    """Modules of methods/ that a module of methods/ imports, wherever in it; else none."""
    root = Path(__file__).resolve().parents[1] / "methods"
    if root not in file.parents or file == root / "__init__.py":
        return ()
    found = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if _in_methods(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and _in_methods(node.module):
            if node.module != f"{PACKAGE}.methods":
                found.add(node.module)
            else:  # a class of the room's front, or a module of it
                room = importlib.import_module(node.module)
                things = [getattr(room, a.name, None) for a in node.names]
                found |= {
                    t.__name__ if isinstance(t, ModuleType) else t.__module__
                    for t in things
                    if isinstance(t, ModuleType | type)
                }
    return tuple(sorted(name.removeprefix(f"{PACKAGE}.") for name in found))


@lru_cache(maxsize=512)
def _statements(file: Path) -> tuple[str, ...]:
    """A hash of every top-level statement that does something."""
    return tuple(_hashed(node) for node in ast.parse(file.read_bytes()).body if not _idle(node))


def _hashed(node: ast.AST) -> str:
    text: list[str] = []
    _write(node, text)
    return hashlib.sha256("".join(text).encode()).hexdigest()[:16]


def _write(value: Any, text: list[str]) -> None:
    """A syntax tree as text: no places, nothing idle, no empty fields.

    Not `ast.dump`, whose text differs between versions of Python.
    """
    if isinstance(value, ast.AST):
        text.append(f"{type(value).__name__}(")
        for name, part in ast.iter_fields(value):
            if part is None or part == [] or isinstance(part, ast.expr_context):
                continue
            text.append(f"{name}=")
            _write(part, text)
        text.append(")")
    elif isinstance(value, list):
        for part in value:
            if not (isinstance(part, ast.stmt) and _idle(part)):
                _write(part, text)
                text.append(",")
    else:
        text.append(repr(value))


def _idle(node: ast.AST) -> bool:
    """Whether a statement decides nothing: documentation, imports, lists of names, drawing."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom() | ast.Pass():
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.FunctionDef(name=name):
            return name in SHOWN
    return False


def _names(tree: ast.AST) -> set[tuple[str, str]]:
    """Names that code uses, with the attribute that it asks of each ("" for none)."""
    nodes = list(ast.walk(tree))
    asked = {
        (n.value.id, n.attr)
        for n in nodes
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    # One that is used with attributes alone is followed by these.
    inside = {id(n.value) for n in nodes if isinstance(n, ast.Attribute)}
    return asked | {(n.id, "") for n in nodes if isinstance(n, ast.Name) and id(n) not in inside}


def _tree_of(thing: Any) -> ast.AST:
    """The syntax tree of a class or function.

    Raises:
        CodeError: when nobody knows its source.
    """
    with suppress(OSError, TypeError, SyntaxError):
        return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    for lines, near in _cells(thing):
        with suppress(SyntaxError):
            wanted = thing.__qualname__.split(".")[-1]
            nodes = [
                node
                for node in ast.walk(ast.parse("".join(lines)))
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == wanted
                if near is None or node.lineno <= near <= (node.end_lineno or near)
            ]
            if nodes:
                return nodes[-1]
    raise CodeError(
        f"The source of '{thing.__qualname__}' cannot be found, so its results could not be told "
        "from those of other code: define it in a file or in a notebook cell."
    )


def _cells(thing: Any) -> Iterator[tuple[list[str], int | None]]:
    """Notebook cells that may define a class: those of its functions, then all, newest first.

    `inspect` finds no class in a notebook, for its module has no file there.
    """
    for value in _functions(vars(thing).values() if inspect.isclass(thing) else [thing]):
        lines = linecache.getlines(value.__code__.co_filename)
        if lines:
            yield lines, value.__code__.co_firstlineno
    for name in reversed(list(linecache.cache)):
        if not Path(name).is_file():
            yield linecache.getlines(name), None


def _functions(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        inner = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
        if inspect.isfunction(inner) and not inner.__code__.co_filename.startswith("<string"):
            yield inner
