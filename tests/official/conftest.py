"""A cache that holds miniatures of the official data sets, and no network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import miniatures

from frugalvlm.benchmarks.official.data import rows_of


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    miniatures.write(folder)
    return folder


@pytest.fixture
def offline(cache, tmp_path, monkeypatch) -> Path:
    """Everything is read from the cache of miniatures."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    rows_of.cache_clear()
    yield cache
    rows_of.cache_clear()
