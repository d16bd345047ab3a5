"""The problems that the kit knows: each is one sentence that names the remedy."""

from __future__ import annotations

from frugalvlm.loading import WeightsError
from frugalvlm.pocket.train import TrainingError
from frugalvlm.study.notebooks import NotebookError
from frugalvlm.study.papers import UnknownPaperError
from frugalvlm.study.readme import ReadmeError
from frugalvlm.study.records import MixedSettingError, RecordError
from frugalvlm.study.reproduce import ScaleError
from frugalvlm.study.side_by_side import LostProcessError
from frugalvlm.views import BudgetError, UnsupportedError

KNOWN: tuple[type[Exception], ...] = (
    BudgetError,
    FileNotFoundError,
    LostProcessError,
    MixedSettingError,
    NotebookError,
    ReadmeError,
    RecordError,
    ScaleError,
    TrainingError,
    UnknownPaperError,
    UnsupportedError,
    WeightsError,
)
