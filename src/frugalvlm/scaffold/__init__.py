"""Laying out the files of a new method or paper; what is laid out runs and passes every test."""

from frugalvlm.scaffold.files import ScaffoldError, new_method, new_paper

__all__ = ["ScaffoldError", "new_method", "new_paper"]
