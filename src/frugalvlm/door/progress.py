"""One progress bar over all runs of a comparison, in terminals and in notebooks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from frugalvlm.runs.setting import Reporter, Silent

__all__ = ["Bar", "progress_over"]


@contextmanager
def progress_over(total: int | None, shown: bool | Reporter | None) -> Iterator[Reporter]:
    """A reporter while the runs last.

    Args:
        total: steps of all runs together; None: not known, the bar grows with each run.
        shown: True, False, a reporter of one's own, or None: where somebody can see it, that is in
            terminals and notebooks, unless TQDM_DISABLE is set.
    """
    if shown is None:
        shown = sys.stderr.isatty() or _in_notebook()
    if not isinstance(shown, bool):
        yield shown
    elif not shown:
        yield Silent()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a notebook without widgets gets a plain bar
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            with tqdm(total=total, leave=False, unit="", dynamic_ncols=True) as bar:
                yield Bar(bar, grows=total is None)


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    if "IPython" not in sys.modules:
        return False
    return hasattr(sys.modules["IPython"].get_ipython(), "kernel")


class Bar:
    """A `Reporter` over a tqdm bar."""

    def __init__(self, bar: Any, grows: bool = False) -> None:
        self.bar, self.grows = bar, grows
        if grows:
            bar.total = 0

    def start(self, description: str, total: int) -> None:
        """A run begins."""
        if self.grows:
            self.bar.total += total
        self.bar.set_description(description)

    def advance(self, steps: int) -> None:
        """So many questions or rounds are done."""
        self.bar.update(steps)
