"""Shared by all tests: one thread, tensor shapes checked, helper modules on the path."""

import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)

for room in ("contract", "runs"):
    sys.path.insert(0, str(Path(__file__).parent / room))

# The axes written in annotations are checked while tests run, and only then.
install_import_hook(
    [f"frugalvlm.{name}" for name in ("views", "trace", "engine", "hosts", "methods")],
    "shape_checks.check",
)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The work folder and the published one, both elsewhere than the repository's."""
    work, published = tmp_path / "work", tmp_path / "published"
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(work))
    monkeypatch.setattr("frugalvlm.paths.published_dir", lambda: published)
    monkeypatch.setattr("frugalvlm.reproduce.publish.published_dir", lambda: published)
    return work, published


@pytest.fixture
def put(monkeypatch):
    """Writes a record under the name that its run would give it."""
    from frugalvlm.runs import records  # behind the hook above

    monkeypatch.setattr(records, "_told", set())

    def write(folder, record):
        made = record["provenance"]
        name = records.record_name(record["request"], made["code"], made["machine"])
        return records.write(folder / f"{name}.json", record)

    return write
