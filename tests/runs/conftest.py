"""Two places for results, and what writes a record into one; helper modules on the path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from frugalvlm.runs import records

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The work folder and the published one, both elsewhere than the repository's."""
    work, published = tmp_path / "work", tmp_path / "published"
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(work))
    monkeypatch.setattr("frugalvlm.paths.published_dir", lambda: published)
    monkeypatch.setattr("frugalvlm.reproduce.publish.published_dir", lambda: published)
    return work, published


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a record under the name that its run would give it."""
    monkeypatch.setattr(records, "_told", set())

    def write(folder: Path, record: dict[str, Any]) -> Path:
        made = record["provenance"]
        name = records.record_name(record["request"], made["code"], made["machine"])
        return records.write(folder / f"{name}.json", record)

    return write
