"""A model of random weights that loads at once, and a work folder that is looked at afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from frugalvlm.pocket.installed import save_vlm
from frugalvlm.pocket.models import build_model, build_processor

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_vlm(build_model("pocket-llava-tiny"), build_processor(), folder)
    return str(folder)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder, which does not exist yet."""
    monkeypatch.setenv("FRUGALVLM_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"
