"""The study of fastervlm: what it measures beside its table, and how that is shown."""

from frugalvlm.studies.base import Study
from frugalvlm.studies.fastervlm.analysis import run

__all__ = ["STUDY"]

STUDY = Study("fastervlm", analysis=run)
