"""The lines of a method in the registry: `methods/__init__.py`, read as a syntax tree."""

from __future__ import annotations

import ast
import re

__all__ = ["RegistryError", "names_in", "with_method"]

PACKAGE = "frugalvlm.methods"


class RegistryError(ValueError):
    """A registry that does not look as it should; the message says what to write by hand."""


def names_in(text: str) -> set[str]:
    """All names that a module binds at its top."""
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        else:
            found |= {
                part.id
                for part in ast.walk(node)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return found


def with_method(text: str, key: str, name: str) -> str:
    """The registry with one method more: its import, its entry, its public name.

    Args:
        text: the registry's source.
        key: the method's module.
        name: its class.

    Raises:
        RegistryError: when a place cannot be found; the message gives the lines.
    """
    module = ast.parse(text)
    entry = _entry(module)
    public = _assigned(module, "__all__")
    insertions = [_import_line(module, key, name)]
    if entry is None:
        raise RegistryError(
            f"the tuple of methods in METHODS is not where it was; add `{name}` there by hand, and "
            f"`from {PACKAGE}.{key} import {name}` above."
        )
    insertions.append((entry.end_lineno or 0, f"{' ' * _indent(text, entry)}{name},"))
    if isinstance(public, ast.List) and getattr(entry, "id", None) in _texts(public):
        insertions.append(_public_line(public, name))
    lines = text.splitlines()
    for after, line in sorted(insertions, reverse=True):
        lines.insert(after, line)
    made = "\n".join(lines) + "\n"
    try:
        whole = ast.parse(made)
    except SyntaxError:
        whole = ast.Module([], [])
    again = _entry(whole)
    if again is None or getattr(again, "id", None) != name:
        raise RegistryError(
            f"add `{name}` to METHODS by hand, each method on a line ended by a comma."
        )
    return made


def _import_line(module: ast.Module, key: str, name: str) -> tuple[int, str]:
    """Behind which line the import stands, sorted among its kin."""
    kin = [
        node
        for node in module.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}.")
    ]
    own = f"{PACKAGE}.{key}"
    before = [node for node in kin if (node.module or "") < own]
    if not kin:
        raise RegistryError(f"no method is imported; add `from {own} import {name}` by hand.")
    after = before[-1].end_lineno or 0 if before else kin[0].lineno - 1
    return after, f"from {own} import {name}"


def _assigned(module: ast.Module, name: str) -> ast.expr | None:
    """What is assigned to a name at the top of a module."""
    for node in module.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=found)]) if found == name:
                return node.value
            case ast.AnnAssign(target=ast.Name(id=found)) if found == name:
                return node.value
    return None


def _entry(module: ast.Module) -> ast.expr | None:
    """The last class in the tuple of METHODS."""
    value = _assigned(module, "METHODS")
    for node in ast.walk(value) if value is not None else ():
        if isinstance(node, ast.Tuple) and node.elts:
            last = node.elts[-1]
            if all(isinstance(part, ast.Name) for part in node.elts):
                return last
    return None


def _texts(listed: ast.List) -> list[str]:
    return [str(part.value) for part in listed.elts if isinstance(part, ast.Constant)]


def _indent(text: str, node: ast.expr) -> int:
    line = text.splitlines()[(node.end_lineno or 1) - 1]
    return len(line) - len(line.lstrip())


def _public_line(public: ast.List, name: str) -> tuple[int, str]:
    """Behind which line the public name stands, in the order that ruff keeps."""
    listed = [
        part
        for part in public.elts
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    before = [part for part in listed if _order(str(part.value)) < _order(name)]
    after = before[-1].end_lineno or 0 if before else public.lineno
    return after, f'    "{name}",'


def _order(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Constants, then classes, then the rest; numbers in names by value."""
    group = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    parts = re.split(r"(\d+)", name)
    return group, [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]
