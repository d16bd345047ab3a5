"""What the papers say: citation, reported figures, claims, layouts of their tables."""

from typing import Any

from frugalvlm.papers.classes import (
    COLUMNS,
    EQUALS,
    KINDS,
    ORIGINS,
    QUANTITY_KINDS,
    RELATIONS,
    SCALES,
    AmbiguousFigureError,
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
)
from frugalvlm.papers.paper import (
    UnknownPaperError,
    all_papers,
    keys,
    load_paper,
    readable_paper,
)
from frugalvlm.papers.reading import PaperFormatError

__all__ = [
    "COLUMNS",
    "EQUALS",
    "KINDS",
    "ORIGINS",
    "QUANTITY_KINDS",
    "RELATIONS",
    "SCALES",
    "AmbiguousFigureError",
    "Anomaly",
    "Average",
    "Budget",
    "Claim",
    "Code",
    "Column",
    "LayoutModel",
    "Paper",
    "PaperFormatError",
    "Row",
    "Table",
    "UnknownPaperError",
    "Unverified",
    "all_papers",
    "keys",
    "load_paper",
    "readable_paper",
]


def __getattr__(name: str) -> Any:
    if name == "KEYS":
        return keys()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
