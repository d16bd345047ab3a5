"""One call that loads a model and its processor: embedded, local, or from the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging

from frugalvlm.pocket.installed import WeightsError, file_hash, models_dir, verify
from frugalvlm.pocket.models import SPECS
from frugalvlm.pocket.onevision import PocketOnevisionProcessor

# What a full-scale checkpoint asks for in bfloat16: gigabytes on disk, gigabytes of GPU memory
# (weights, activations and the KV cache of one prompt). Parameters times two, and some room.
FULL_SCALE_NEEDS: dict[str, tuple[float, float]] = {
    "llava-hf/llava-1.5-7b-hf": (14.1, 16.0),
    "llava-hf/llava-1.5-13b-hf": (26.7, 30.0),
    "llava-hf/llava-v1.6-vicuna-7b-hf": (14.1, 20.0),
    "llava-hf/llava-v1.6-vicuna-13b-hf": (26.7, 34.0),
}


def load_vlm(
    name: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a vision-language model and its processor, ready for inference.

    Args:
        name: an embedded model (`pocket-llava-base`), a folder, or a Hub id
            (`llava-hf/llava-1.5-7b-hf`).
        revision: branch, tag or commit on the Hub.
        device: "cpu", "cuda", "cuda:1", ...
        dtype: float type of the weights; float32 for embedded models, the checkpoint's otherwise.
        attn_implementation: "sdpa", "eager" or "flash_attention_2".

    Raises:
        WeightsError: weights are missing, damaged or cannot be fetched; says what to do.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise WeightsError(
            f"No GPU was found for device='{device}'; use device='cpu' or a CUDA build of torch."
        )
    source, options = _locate(name, revision)
    # A bar over a handful of small files only clutters what the caller shows.
    hide_bars = name in SPECS and transformers_logging.is_progress_bar_enabled()
    if hide_bars:
        transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype or "auto", attn_implementation=attn_implementation, **options
        )
        own = name in SPECS and SPECS[name].family == "llava_onevision"
        loader = PocketOnevisionProcessor if own else AutoProcessor
        processor = loader.from_pretrained(source, **options)
    except ImportError as error:  # video processors of the library need torchvision
        raise WeightsError(f"The processor of '{name}' cannot be loaded: {error}") from error
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise WeightsError(
                f"{source} does not hold a loadable model ({_first_line(error)}); it needs "
                "config.json, safetensors weights and the processor's files."
            ) from error
        raise WeightsError(_out_of_reach(name, error)) from error
    finally:
        if hide_bars:
            transformers_logging.enable_progress_bar()
    # Left padding: with it the last position of every row is the one to continue from.
    processor.tokenizer.padding_side = "left"
    return model.to(device).eval(), processor


def _locate(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    if name in SPECS:
        folder = models_dir() / name
        verify(folder)
        return str(folder), {"local_files_only": True}
    if Path(name).is_dir():
        return name, {"local_files_only": True}
    if name.startswith("pocket-"):
        raise WeightsError(f"Unknown embedded model '{name}'. Known: {', '.join(SPECS)}.")
    if name.count("/") != 1:
        raise WeightsError(
            f"'{name}' is no embedded model ({', '.join(SPECS)}), no folder and no Hub id of the "
            "form owner/name."
        )
    # Without a network the cache alone is asked: otherwise every file is retried for half a minute.
    return name, {"revision": revision, "local_files_only": not _hub_answers()}


def _hub_answers() -> bool:
    """Whether the Hub can be reached: one request, no retries."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP library calls its failures
        return False
    return True


def model_hash(name: str, revision: str | None = None) -> str:
    """What identifies a model's weights in a record: a hash, or Hub id and revision."""
    if name in SPECS:
        return verify(models_dir() / name)["model.safetensors"][:16]
    if Path(name).is_dir():
        files = sorted(Path(name).glob("*.safetensors"))
        return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()[:16]
    return f"{name}@{revision or 'main'}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _out_of_reach(name: str, error: Exception) -> str:
    disk, memory = FULL_SCALE_NEEDS.get(name, (None, None))
    needs = (
        f" It needs about {disk:.0f} GB of disk and {memory:.0f} GB of GPU memory in bfloat16."
        if disk and memory
        else ""
    )
    return (
        f"Cannot load '{name}' ({_first_line(error)}): run `hf download {name}` on a machine with "
        f"internet access, then pass the id again or the folder.{needs}"
    )
