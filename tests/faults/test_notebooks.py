"""Wrong parameters of notebooks end in one sentence, before anything is computed."""

import pytest

from frugalvlm.report.notebooks import NotebookError, execute, paper_notebook

WRONG = [
    ("n", -1, "n is a whole number from 1"),
    ("n", "20", "n is a whole number from 1"),
    ("budgets", -1, "budgets is a whole number"),
    ("benchmarks", "pocket-gqa", "benchmarks is a list of names"),
    ("repeats", 1, "repeats is a whole number from 2|repeats is a whole number at least 2"),
    ("energy_window_s", -1, "energy_window_s is a number above 0"),
    ("device", "gpu", "Unknown device 'gpu'"),
    ("model", "pocket-none", "Known: pocket-llava-base"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("name", "value", "sentence"), WRONG, ids=lambda x: str(x)[:20])
def test_wrong_parameters_end_in_a_sentence(name, value, sentence, work, tmp_path):
    target = tmp_path / "out" / "visionzip.ipynb"
    with pytest.raises(NotebookError, match=sentence) as error:
        execute(paper_notebook("visionzip"), target, {name: value})
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    assert not target.exists()
    assert not list(work.rglob("*.json")), "nothing is computed"
