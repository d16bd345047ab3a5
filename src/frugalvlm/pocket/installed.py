"""The embedded models as they lie in data/models/: whole or damaged, and how they are written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from frugalvlm.errors import FrugalError
from frugalvlm.paths import data_dir, repository

HASHES = "SHA256SUMS.json"
_SEED = re.compile(r"-seed\d+$")  # of a model's name


class WeightsError(FrugalError, OSError):
    """Weights that are missing, damaged or out of reach; the message names the remedy."""


def models_dir() -> Path:
    """The folder of the embedded models."""
    return data_dir() / "models"


def seeds_of(model: str) -> tuple[str, ...]:
    """An embedded model and those trained like it from other seeds, as far as they are installed.

    Args:
        model: its name, say pocket-llava-base, or that of another training of it.

    Returns:
        The name without a seed, then NAME-seed1, NAME-seed2 and so on, in this order.
    """
    name = _SEED.sub("", model)
    if Path(name).name != name:  # a folder, or a model of the Hub
        return (model,)
    others = [p.name for p in models_dir().glob(f"{name}-seed*") if p.is_dir()]
    numbered = [other for other in others if _SEED.sub("", other) == name]
    return (name, *sorted(numbered, key=lambda other: int(other.rpartition("-seed")[2])))


def verify(folder: Path) -> dict[str, str]:
    """Check an embedded model against its hashes and return them.

    Raises:
        WeightsError: when a file is missing or differs, no hash covers it, or the hashes
            themselves are damaged.
    """
    remedy = (
        f"train it anew with `invoke train --model {folder.name}`"
        if repository()
        else "install frugalvlm again with `pip install --force-reinstall --no-deps .` in a clone"
    )
    if repository():
        remedy = f"restore it with `git checkout -- {folder}`, or {remedy}"
    sums = folder / HASHES
    if not sums.is_file():
        raise WeightsError(f"The embedded model {folder.name} is not in {folder}: {remedy}.")
    hashes = _read_hashes(sums)
    if hashes is None:
        raise WeightsError(f"{sums} is damaged, so nothing vouches for the model: {remedy}.")
    for file, expected in hashes.items():
        path = folder / file
        if not path.is_file() or file_hash(path) != expected:
            what = "differs from its recorded hash" if path.is_file() else "is missing"
            raise WeightsError(f"{path} {what}: {remedy}.")
    for path in sorted(folder.iterdir()):
        if path.name not in {*hashes, HASHES} and not _is_free(path):
            raise WeightsError(f"{path} is no file of this model (no hash covers it): remove it.")
    return hashes


def _read_hashes(sums: Path) -> dict[str, str] | None:
    """SHA-256 by file name; None where the list is no such list, or leaves the weights out."""
    try:
        hashes = json.loads(sums.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(hashes, dict) and {"config.json", "model.safetensors"} <= hashes.keys()
    if not whole or not all(Path(file).name == file for file in hashes):
        return None
    return hashes if all(isinstance(value, str) for value in hashes.values()) else None


def _is_free(path: Path) -> bool:
    """What no hash covers and nothing loads: the card, hidden files, what a kill left behind."""
    return path.name.startswith(".") or path.suffix in {".md", ".tmp"}


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


def put_in_place(made: Path, target: Path) -> None:
    """Copy a folder's files over those of another, each whole, the hashes last.

    A kill meanwhile leaves hashes that do not fit, and no half of a file.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(made.iterdir(), key=lambda p: p.name == HASHES):
        temporary = target / f"{path.name}.tmp"
        shutil.copyfile(path, temporary)
        os.replace(temporary, target / path.name)


def write_hashes(folder: Path) -> None:
    """Record the hashes of the files that loading reads, as they are now; the card is free."""
    read = {".json", ".jinja", ".safetensors"}
    files = sorted(p for p in folder.iterdir() if p.suffix in read and p.name != HASHES)
    hashes = {p.name: file_hash(p) for p in files}
    (folder / HASHES).write_text(json.dumps(hashes, indent=1) + "\n")
