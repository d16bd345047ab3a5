"""The start of a forward pass: where the images of the prompt stand, and what cannot be served."""

from __future__ import annotations

import inspect

import torch
from jaxtyping import Bool
from torch import Tensor

from frugalvlm.engine.state import Call, State
from frugalvlm.hosts.base import FamilyModule
from frugalvlm.methods.base import FrameReducer
from frugalvlm.views import UnsupportedError


def enter(state: State, module: FamilyModule, args: tuple, kwargs: dict) -> None:
    """The whole model starts: find the images of the prompt.

    Raises:
        UnsupportedError: for a call that the methods cannot serve.
    """
    call = state.now.call = Call()
    if args:
        kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    pixels, clips = kwargs.get("pixel_values"), kwargs.get("pixel_values_videos")
    features = kwargs.get("mm_encoder_outputs") or {}
    if all(x is None for x in (pixels, clips, features.get("image"), features.get("video"))):
        return
    call.clips = pixels is None and clips is not None
    if state.encoder is not None and pixels is None and not reduces_frames(state):
        raise UnsupportedError(
            f"{state.encoder.key} works inside the vision tower: pass pixel_values, not "
            "features computed before, and no video (its frames are pooled behind the "
            "projector; methods that cut inside the decoder or merge frames take videos)."
        )
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.is_compileable:
        raise UnsupportedError(
            "A static cache keeps room for every token, so nothing would be saved; use the "
            "default dynamic cache."
        )
    if not isinstance(kwargs.get("attention_mask"), Tensor | None):
        raise UnsupportedError("Pass the attention mask as a 2-D or 4-D tensor.")
    if cache is not None and cache.get_seq_length() > 0:
        raise UnsupportedError(
            "An image behind an existing cache is not supported: pass the whole conversation."
        )
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        if kwargs.get(name) not in (None, getattr(state.host.model.config, name)):
            raise UnsupportedError(f"Set {name} in the model's config, not in the call.")
    placeholders, call.real = _see_prompt(state, kwargs)
    call.images = state.host.images(placeholders, kwargs)
    rows = [image.row for image in call.images]
    if state.now.copies > 1 and len(set(rows)) < len(rows):
        raise UnsupportedError(
            "Several images in one prompt together with beams or several returned sequences "
            "are not supported; repeat the prompt in the batch instead."
        )


def reduces_frames(state: State) -> bool:
    """Whether this call's videos are reduced frame by frame, behind the pooling."""
    return state.call.clips and isinstance(state.encoder, FrameReducer)


def _see_prompt(
    state: State, kwargs: dict
) -> tuple[Bool[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Where images stand and where no padding is, on the CPU: the one look at values."""
    given = [e.placeholders for e in state.entries if e.placeholders is not None]
    if given:
        return given[-1], torch.ones_like(given[-1])
    ids = kwargs.get("input_ids")
    if ids is None or ids.is_meta:
        raise UnsupportedError(
            "Where the image stands is read from input_ids; for inputs without values pass "
            "placeholders= to on()."
        )
    placeholders = state.host.placeholders(ids)
    mask = kwargs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        mask = torch.ones_like(ids)
    real = mask.to(ids.device) != 0
    placeholders, real = torch.stack([placeholders, real]).cpu()
    return placeholders, real
