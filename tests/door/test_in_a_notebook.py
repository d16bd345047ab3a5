"""A method defined in a notebook cell: its source is its identity, a bar shows how far it is."""

import json

import nbformat
import pytest
from nbclient import NotebookClient

SETUP = """
from dataclasses import dataclass
from typing import ClassVar
import frugalvlm
from frugalvlm.methods import Uniform

def ask():
    return frugalvlm.compare(
        {model!r}, [Mine], "pocket-gqa", [16], 6, costs=False, folder={folder!r}
    )
"""
CELL = """
@dataclass(frozen=True)
class Mine(Uniform):
    key: ClassVar[str] = "mine"

    def reduce(self, view):
        return super().reduce(view){more}

ask()
"""


@pytest.mark.notebook
def test_a_class_of_a_cell_is_known_by_its_source(folder_of_64, tmp_path):
    folder = tmp_path / "out"
    sources = [
        SETUP.format(model=folder_of_64, folder=str(folder)),
        CELL.format(more=""),
        CELL.format(more=""),  # the cell run again
        CELL.format(more="  if view.crops else None"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    codes = [json.loads(p.read_text())["provenance"]["code"] for p in folder.rglob("mine--*.json")]
    assert len(set(codes)) == len(codes) == 2, "run again only where the source is another"
    shown = [
        output["data"]["text/html"]
        for cell in notebook.cells[1:]
        for output in cell.outputs
        if output["output_type"] == "execute_result"
    ]
    assert len(shown) == 3
    assert all("<table>" in html and "mine" in html for html in shown)
