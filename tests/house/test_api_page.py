"""The API page is what the docstrings say now."""

import importlib.util
from pathlib import Path

import frugalvlm
from frugalvlm import methods

DOCS = Path(__file__).parents[2] / "docs"


def built():
    spec = importlib.util.spec_from_file_location("build_api", DOCS / "build_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    assert (DOCS / "api.md").read_text(encoding="utf-8") == built().page(), (
        "docs/api.md is old: run `python docs/build_api.py`"
    )


def test_the_page_names_everything_public():
    page = built().page()
    calls = [name for name in frugalvlm.__all__ if callable(getattr(frugalvlm, name))]
    for name in (*calls, *(k.__name__ for k in methods.METHODS.values()), "Trace", "BudgetError"):
        assert page.count(f"\n### {name}\n") == 1, name
    assert page.count("arXiv:2412.04467") == 1, "a paper is told once"
