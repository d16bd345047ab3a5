"""The embedded models as they lie in data/models/: whole or damaged, and how they are written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.errors import FrugalError
from frugalvlm.paths import data_dir

HASHES = "SHA256SUMS.json"


class WeightsError(FrugalError, OSError):
    """Weights that are missing, damaged or out of reach; the message names the remedy."""


def models_dir() -> Path:
    """The folder of the embedded models."""
    return data_dir() / "models"


def verify(folder: Path) -> dict[str, str]:
    """Check an embedded model against its hashes and return them.

    Raises:
        WeightsError: when a file is missing or differs.
    """
    remedy = (
        f"restore it with `git checkout -- {folder}`, or train it anew with "
        f"`invoke train --model {folder.name}`"
    )
    sums = folder / HASHES
    if not sums.is_file():
        raise WeightsError(f"The embedded model {folder.name} is not in {folder}: {remedy}.")
    hashes: dict[str, str] = json.loads(sums.read_text())
    for file, expected in hashes.items():
        path = folder / file
        if not path.is_file() or file_hash(path) != expected:
            what = "differs from its recorded hash" if path.is_file() else "is missing"
            raise WeightsError(f"{path} {what}: {remedy}.")
    return hashes


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_vlm(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Write an embedded model: half-precision safetensors, processor, hashes.

    Weights are stored in float16 to keep the repository small and load as float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    half = {key: value.to(torch.float16).contiguous() for key, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    processor.save_pretrained(folder)
    write_hashes(folder)


def write_hashes(folder: Path) -> None:
    """Record the hashes of the files that loading reads, as they are now; the card is free."""
    read = {".json", ".jinja", ".safetensors"}
    files = sorted(p for p in folder.iterdir() if p.suffix in read and p.name != HASHES)
    hashes = {p.name: file_hash(p) for p in files}
    (folder / HASHES).write_text(json.dumps(hashes, indent=1) + "\n")
