"""The study of cegi: what two sizes of a model cost and score, and pages about the index."""

from frugalvlm.studies.base import Study
from frugalvlm.studies.cegi.analysis import run

__all__ = ["STUDY"]

STUDY = Study("cegi", analysis=run)
