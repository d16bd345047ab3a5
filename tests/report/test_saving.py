"""A notebook that was run and saved in JupyterLab is the file that it was."""

import shutil

import nbformat
import pytest
from jupyter_server.services.contents.filemanager import FileContentsManager

from frugalvlm.paths import notebooks_dir
from frugalvlm.report.saving import HOOK

SOURCES = sorted(notebooks_dir().rglob("*.ipynb"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_saved_run_leaves_the_file_as_it_was(source, tmp_path):
    file = shutil.copy(source, tmp_path / source.name)
    before = (tmp_path / source.name).read_bytes()
    manager = FileContentsManager(root_dir=str(tmp_path), pre_save_hook=HOOK)
    model = manager.get(source.name)
    notebook = model["content"]
    notebook["metadata"]["language_info"]["version"] = "3.13.1"
    for count, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
        cell["execution_count"] = count + 1
        cell["metadata"]["execution"] = {"iopub.status.busy": "now"}
        cell["outputs"] = [nbformat.v4.new_output("stream", text="ran\n")]
    manager.save(model, source.name)
    assert (tmp_path / source.name).read_bytes() == before, file


def test_what_is_no_notebook_is_saved_as_it_is(tmp_path):
    manager = FileContentsManager(root_dir=str(tmp_path), pre_save_hook=HOOK)
    manager.save({"type": "file", "format": "text", "content": "kept"}, "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "kept"
