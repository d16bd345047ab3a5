"""Saving a source notebook in JupyterLab leaves it without outputs, as it is under version control.

What was run is shown by the executed copies in the results, and stays in the open tab until it is
closed. `invoke lab` starts the server with this hook.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["HOOK", "without_outputs"]

HOOK = f"{__name__}.without_outputs"  # as the server's option names it


def without_outputs(model: dict[str, Any], path: str, contents_manager: Any, **more: Any) -> None:
    """A pre-save hook of the Jupyter server: drop outputs, counts, and what kernels note.

    Args:
        model: what is about to be written; changed in place.
        path: of the file, below the server's root.
        contents_manager: of the server.
        more: what later servers may add.
    """
    content = model.get("content")
    if model.get("type") != "notebook" or not isinstance(content, dict):
        return
    for cell in content.get("cells", ()):
        if cell.get("cell_type") == "code":
            cell["outputs"], cell["execution_count"] = [], None
            for name in ("execution", "collapsed", "scrolled", "trusted"):
                cell.get("metadata", {}).pop(name, None)
    # Kernels and editors note their versions; the notebook keeps what it says of itself.
    file = Path(contents_manager.root_dir) / path.lstrip("/")
    if file.is_file():
        content["metadata"] = json.loads(file.read_text(encoding="utf-8"))["metadata"]
