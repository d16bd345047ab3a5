"""One call that loads a model and its processor: embedded, local, or from the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging

from frugalvlm.checks import OptionError, check_name, check_present
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
        WeightsError: weights are missing, damaged, do not fit the configuration or cannot be
            fetched; says what to do.
        OptionError: for a device that is not here.
    """
    device = check_present(device)
    _check_dtype(dtype)
    source, options = _locate(name, revision)
    try:
        with _quiet(bars=name not in SPECS):
            model, found = AutoModelForImageTextToText.from_pretrained(
                source,
                dtype=dtype or "auto",
                attn_implementation=attn_implementation,
                use_safetensors=True,  # a pickle can run any code when it is read
                ignore_mismatched_sizes=True,  # so that the sentence below can name them
                output_loading_info=True,
                **options,
            )
            _check_fit(source, found)
            _check_layers(source, model)
            own = name in SPECS and SPECS[name].family == "llava_onevision"
            loader = PocketOnevisionProcessor if own else AutoProcessor
            processor = loader.from_pretrained(source, **options)
    except WeightsError:
        raise
    except ImportError as error:  # processors need torchvision, kernels of attention a package
        extra = any(part in str(error).lower() for part in ("torchvision", "num2words"))
        remedy = (
            "run `pip install 'frugalvlm[full]'`, which brings torchvision and num2words" if extra
            else "install what is missing, or choose another attn_implementation"
        )  # fmt: skip
        raise WeightsError(
            f"'{name}' cannot be loaded ({_first_line(error)}): {remedy}."
        ) from error
    # Damaged files and values end in whatever the libraries below trip over.
    except Exception as error:
        if Path(source).is_dir():
            raise WeightsError(
                f"{source} does not hold a loadable model ({_first_line(error)}); it needs "
                "config.json, safetensors weights and the processor's files."
            ) from error
        if _is_pickled(name, revision, error):
            raise WeightsError(_pickled(name, "as pickles alone")) from error
        if isinstance(error, OSError | ValueError):
            raise WeightsError(_out_of_reach(name, error)) from error
        raise
    if getattr(processor, "tokenizer", None) is None:
        raise WeightsError(
            f"{source} holds no processor for pictures and text: it needs the files that "
            "`processor.save_pretrained` writes beside the weights."
        )
    _check_placeholder(source, model, processor)
    # Left padding: with it the last position of every row is the one to continue from.
    processor.tokenizer.padding_side = "left"
    return model.to(device).eval(), processor


def _check_dtype(dtype: Any) -> None:
    kind = getattr(torch, dtype, 0) if isinstance(dtype, str) else dtype
    if kind is not None and not getattr(kind, "is_floating_point", False):
        raise OptionError(
            f"dtype is a float type such as torch.bfloat16, or None for the model's own; got "
            f"{dtype!r}."
        )


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Inside, the library prints no load report, for what it says is refused in a sentence.

    Nor bars, where they would count a handful of small files.
    """
    verbosity, shown = (
        transformers_logging.get_verbosity(),
        (transformers_logging.is_progress_bar_enabled()),
    )
    transformers_logging.set_verbosity_error()
    if not bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


# Buffers that older releases stored, and that are computed today.
COMPUTED = (".position_ids", ".rotary_emb.inv_freq")


def _check_fit(source: str, found: dict[str, Any]) -> None:
    """Refuse weights that do not fit: what is missing would be answered by random numbers."""
    unknown = {key for key in found["unexpected_keys"] if not key.endswith(COMPUTED)}
    # A mismatch is a key, or a key with both shapes.
    shapes = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    for keys, what in (
        (found["missing_keys"], "has no weights for"),
        (shapes, "has weights of another shape for"),
        (unknown, "has weights that config.json has no place for:"),
    ):
        if keys:
            first, more = min(keys), len(keys) - 1
            others = f" and {more} more" if more else ""
            raise WeightsError(
                f"{source} {what} {first}{others}: weights and config.json belong to different "
                "models; restore both from where they came."
            )


def _check_layers(source: str, model: PreTrainedModel) -> None:
    """Refuse a configuration that reads layers of the vision tower that are not there."""
    config: Any = model.config
    depth = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    read = getattr(config, "vision_feature_layer", None)
    for layer in read if isinstance(read, list | tuple) else [read]:
        # Hidden states: what enters the first layer, and what leaves each.
        if depth is not None and layer is not None and not -depth - 1 <= layer <= depth:
            raise WeightsError(
                f"{source}: config.json reads layer {layer} of a vision tower of {depth} layers; "
                f"vision_feature_layer is from {-depth - 1} to {depth}."
            )


def _check_placeholder(source: str, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Refuse a model that looks for pictures at another token than its processor writes."""
    config: Any = model.config
    read, written = (getattr(x, "image_token_id", None) for x in (config, processor))
    if read is not None and written is not None and read != written:
        raise WeightsError(
            f"{source}: config.json puts pictures at token {read} (image_token_index), and the "
            f"processor writes token {written} for them: restore both from where they came."
        )


def _locate(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    _check_source(name, revision)
    if name in SPECS:
        folder = models_dir() / name
        verify(folder)
        return str(folder), {"local_files_only": True}
    if Path(name).is_dir():
        return name, {"local_files_only": True}
    # Without a network the cache alone is asked: otherwise every file is retried for half a minute.
    return name, {"revision": revision, "local_files_only": not hub_answers()}


def hub_answers() -> bool:
    """Whether the Hub can be reached: one request, no retries."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the HTTP library calls its failures
        return False
    return True


def _check_source(name: str, revision: str | None) -> None:
    """Refuse what cannot be meant: no name, a version of a folder, weights that are pickles."""
    check_name("model", name, "an embedded model, a folder or a Hub id")
    here = name in SPECS or Path(name).is_dir()
    if not here and name.startswith("pocket-"):
        raise WeightsError(f"Unknown embedded model '{name}'. Known: {', '.join(SPECS)}.")
    if not here and not _is_hub_id(name):
        raise WeightsError(
            f"{name!r} is no embedded model ({', '.join(SPECS)}), no folder and no Hub id of the "
            "form owner/name."
        )
    if revision is not None and here:
        kind = "an embedded model" if name in SPECS else "a folder"
        raise WeightsError(
            f"'{name}' is {kind}, which has no revision '{revision}': leave the revision out, or "
            "name a model of the Hub."
        )
    if here and name not in SPECS and not any(Path(name).glob("*.safetensors")):
        pickles = sorted(
            p.name for kind in ("*.bin", "*.pt", "*.pth") for p in Path(name).glob(kind)
        )
        raise WeightsError(
            _pickled(name, f"as {pickles[0]}")
            if pickles
            else f"{name} holds no *.safetensors: it needs config.json, safetensors weights and "
            "the processor's files."
        )


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _is_pickled(name: str, revision: str | None, error: Exception) -> bool:
    """Whether a model of the Hub could not be read because it has no safetensors."""
    if isinstance(error, OSError) and "cannot be loaded with `safetensors`" in str(error):
        return True
    cached = (
        huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        for file in ("pytorch_model.bin", "pytorch_model.bin.index.json")
    )
    return any(isinstance(path, str) for path in cached)  # and no safetensors, or it had loaded


def _pickled(name: str, how: str) -> str:
    return (
        f"{name} holds its weights {how}, which can run any code when it is read: convert them "
        "with `model.save_pretrained(FOLDER)` where you trust them; only safetensors are loaded."
    )


def model_hash(name: str, revision: str | None = None) -> str:
    """What identifies a model's weights in a record: a hash, or Hub id and revision.

    Raises:
        WeightsError: as `load_vlm`, for what is seen without reading the weights.
    """
    _check_source(name, revision)
    if name in SPECS:
        return verify(models_dir() / name)["model.safetensors"][:16]
    if Path(name).is_dir():
        files = sorted(Path(name).glob("*.safetensors"))
        return hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()[:16]
    return f"{name}@{revision or 'main'}"


def _first_line(error: Exception) -> str:
    lines = str(error).split("\n")
    if len(lines) > 1 and lines[0].endswith(":"):  # a heading
        lines[0] = f"{lines[0]} {lines[1].strip()}"
    return lines[0].strip() or type(error).__name__


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
