"""What papers measure beside their tables: one room per paper, `KEY.py` or `KEY/`.

A room holds a `STUDY`. It is found by the paper's key and imported when it is asked for; a paper
without one is a plain study.
"""

from __future__ import annotations

import importlib
import importlib.util

from frugalvlm.studies.base import Study

__all__ = ["Study", "study_of"]


def study_of(key: str) -> Study:
    """The study of a paper."""
    room = f"{__name__}.{key}"
    if importlib.util.find_spec(room) is None:
        return Study(key)
    return importlib.import_module(room).STUDY
