"""Problems with records, said once on the console and not by every part of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from frugalvlm.runs.options import folders_of
from frugalvlm.runs.records import RecordWarning, read_records

__all__ = ["problems_told", "tell_problems"]


@contextmanager
def problems_told(console: Console) -> Iterator[None]:
    """Print warnings about records as lines of their own, without places in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RecordWarning)
        before = warnings.showwarning

        def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if issubclass(category, RecordWarning):
                console.print(f"[yellow]{escape(str(message))}[/]")
            else:
                before(message, category, *rest, **more)

        warnings.showwarning = show
        yield


def tell_problems(keys: Iterable[str], scale: str, console: Console) -> None:
    """Say which records of these papers cannot be used, before anything is run."""
    with problems_told(console):
        for key in keys:
            for folder in folders_of(key, scale):
                for own in (folder / "records", *sorted(folder.glob("*/records"))):
                    read_records(own)
