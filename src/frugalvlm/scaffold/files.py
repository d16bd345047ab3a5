"""Which files a new method or paper has, and writing all of them or none."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from string import Template

from frugalvlm.errors import FrugalError
from frugalvlm.paths import project_root
from frugalvlm.scaffold.registry import RegistryError, names_in, with_method

__all__ = ["ScaffoldError", "new_method", "new_paper"]

LONGEST = 24  # letters of a key, so that what is laid out keeps to the line length
REGISTRY = "src/frugalvlm/methods/__init__.py"
# Where each file goes, and the template that it is made of.
METHOD = {
    "src/frugalvlm/methods/{key}.py": "method.py.txt",
    "tests/methods/test_{key}.py": "test_method.py.txt",
}
PAPER = {
    "data/papers/{key}.yaml": "paper.yaml.txt",
    "data/papers/{key}.csv": "paper.csv.txt",
    "src/frugalvlm/studies/{key}.py": "study.py.txt",
    "notebooks/papers/{key}.ipynb": "paper.ipynb.txt",
}


class ScaffoldError(FrugalError, ValueError):
    """Files that cannot be laid out; nothing was written."""


def new_method(key: str, root: Path | None = None) -> list[Path]:
    """Lay out a method: its file, its lines in the registry, its test.

    The rule in it is a placeholder that runs and passes every contract: patches at even steps.

    Args:
        key: the method's one name everywhere; lower case, a Python identifier.
        root: the repository; default: the one that this package runs from.

    Returns:
        The files that were written, the registry last.

    Raises:
        ScaffoldError: for a bad key, or one that is taken; nothing was written.
    """
    root = _repository(root)
    _check_key(key)
    return _write(root, _method_files(key, root))


def new_paper(key: str, root: Path | None = None) -> list[Path]:
    """Lay out a paper: its data, study and notebook, and its method where there is none yet.

    Args:
        key: the paper's one name everywhere, that of its method too.
        root: the repository; default: the one that this package runs from.

    Returns:
        The files that were written.

    Raises:
        ScaffoldError: for a bad key, or one that is taken; nothing was written.
    """
    root = _repository(root)
    _check_key(key)
    made = _filled(PAPER, key, root)
    if not (root / "src/frugalvlm/methods" / f"{key}.py").exists():
        made |= _method_files(key, root)
    return _write(root, made)


def _repository(root: Path | None) -> Path:
    root = project_root() if root is None else root
    for needed in (REGISTRY, "tests/methods", "data/papers", "notebooks/papers"):
        if not (root / needed).exists():
            raise ScaffoldError(
                f"{root} has no {needed}: new methods and papers are laid out in a clone of the "
                "repository; clone it and install it with `pip install -e '.[dev]'`."
            )
    return root


def _check_key(key: str) -> None:
    fits = isinstance(key, str) and re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", key)
    if not fits or len(key) > LONGEST or keyword.iskeyword(key):
        raise ScaffoldError(
            f"{key!r} is no key: choose 1 to {LONGEST} lower-case letters and digits, a letter "
            "first, single underscores between, and no word of Python's own (like 'visionzip')."
        )


def _method_files(key: str, root: Path) -> dict[Path, str]:
    """The files of a method, the registry with its lines included."""
    made, registry = _filled(METHOD, key, root), root / REGISTRY
    text, name = registry.read_text(encoding="utf-8"), _class_name(key)
    if name in names_in(text):
        raise ScaffoldError(
            f"The methods have a {name} already, so {key!r} is taken: choose another."
        )
    try:
        return {**made, registry: with_method(text, key, name)}
    except RegistryError as error:
        raise ScaffoldError(f"{registry}: {error}") from None


def _filled(templates: Mapping[str, str], key: str, root: Path) -> dict[Path, str]:
    """Files that do not exist yet, by path, with their texts.

    Raises:
        ScaffoldError: one of them exists.
    """
    made = {}
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}"  # a claim is written before its data
    for where, name in templates.items():
        path = root / where.format(key=key)
        if path.exists() or path.with_suffix("").is_dir():
            raise ScaffoldError(f"{path} exists already, so {key!r} is taken: choose another key.")
        source = resources.files("frugalvlm.scaffold") / "templates" / name
        text = source.read_text(encoding="utf-8")
        made[path] = Template(text).substitute(key=key, name=_class_name(key), now=now)
    return made


def _class_name(key: str) -> str:
    return "".join(part.capitalize() for part in key.split("_"))


def _write(root: Path, made: Mapping[Path, str]) -> list[Path]:
    """All files, or none."""
    before = {path: path.read_bytes() if path.exists() else None for path in made}
    done: list[Path] = []
    try:
        for path, text in made.items():
            done.append(path)
            path.write_text(text, encoding="utf-8")
    except BaseException as error:
        for path in done:
            old = before[path]
            if old is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(old)
        if isinstance(error, OSError):
            raise ScaffoldError(
                f"{done[-1]} cannot be written ({error.strerror}): nothing was laid out in {root}."
            ) from error
        raise
    return done
