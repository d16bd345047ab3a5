"""The study of early_exit: what it measures beside its table, and how that is shown."""

from frugalvlm.studies.base import Study
from frugalvlm.studies.early_exit.analysis import run

__all__ = ["STUDY"]

STUDY = Study("early_exit", analysis=run)
