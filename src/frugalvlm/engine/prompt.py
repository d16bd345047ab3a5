"""The start of a forward pass: where the images of the prompt stand, and what cannot be served."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import GenerationMixin

from frugalvlm.engine.calls import arguments_of, cache_of
from frugalvlm.engine.state import Call, State
from frugalvlm.engine.units import images_of
from frugalvlm.hosts.base import FamilyModule, ImageLayout
from frugalvlm.methods.base import FrameReducer
from frugalvlm.views import UnsupportedError


def enter(state: State, module: FamilyModule, args: tuple, kwargs: dict) -> None:
    """The whole model starts: find the images of the prompt.

    Raises:
        UnsupportedError: for a call that the methods cannot serve.
    """
    if module is not state.host.inner:
        raise UnsupportedError(
            "This is a replica of the model (torch.nn.DataParallel, or a copy that was made inside "
            "the block); put the method on the model itself and run that, one process per GPU."
        )
    call, host = Call(), state.host
    state.now.call = call
    kwargs = arguments_of(module, args, kwargs)
    call.positions = kwargs.get("position_ids") is not None
    pixels, clips = kwargs.get("pixel_values"), kwargs.get("pixel_values_videos")
    features = kwargs.get("mm_encoder_outputs") or {}
    if all(x is None for x in (pixels, clips, features.get("image"), features.get("video"))):
        return
    by_features = pixels is None and clips is None
    if host.behind_projector:
        _expect_tower(state, by_features)
    else:
        call.clips = pixels is None and clips is not None
        if state.encoder is not None and pixels is None and not reduces_frames(state):
            raise UnsupportedError(_without_pixels(state))
    cache = cache_of(kwargs)
    if cache is not None and cache.is_compileable:
        raise UnsupportedError(
            "A static cache keeps room for every token, so nothing would be saved; use the "
            "default dynamic cache."
        )
    if cache is not None and cache.get_seq_length() > 0:
        raise UnsupportedError(
            "Pictures came together with a filled cache: where it holds them already, leave "
            "pixel_values out; for a new picture pass the whole conversation and no cache."
        )
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        if kwargs.get(name) not in (None, getattr(host.model.config, name, None)):
            raise UnsupportedError(f"Set {name} in the model's config, not in the call.")
    placeholders, call.real = _see_prompt(state, kwargs)
    if host.behind_projector:
        call.images = images_of(state, placeholders, kwargs, by_features)
        if not by_features and state.now.copies > 1:
            _check_repeated(state, pixels, len(placeholders))
        call.grids = tuple(host.grid(image) for image in call.images)
        return
    call.images = host.images(placeholders, kwargs)
    rows = [image.row for image in call.images]
    if state.now.copies > 1 and len(set(rows)) < len(rows):
        raise UnsupportedError(
            "Several images in one prompt together with beams or several returned sequences "
            "are not supported; repeat the prompt in the batch instead."
        )
    if state.now.copies > 1 and pixels is not None and len(pixels) != len(rows):
        raise UnsupportedError(
            f"{len(pixels)} rows of pixel_values stand for {len(rows)} pictures, so beams or "
            "several returned sequences would mix them up: pass one row per picture, as the "
            "processor returns them."
        )


def _expect_tower(state: State, by_features: bool) -> None:
    """Pictures come: their tower runs in this call, or `generate` has run it.

    Raises:
        UnsupportedError: for features that were made somewhere else.
    """
    if not by_features:
        state.now.tower = []
    elif not state.now.tower or not state.now.generating:
        raise UnsupportedError(
            "Features that were computed before do not say what their pictures look like: pass "
            "pixel_values, or call generate, which was looked up inside the block."
        )


def _check_repeated(state: State, pixels: Any, batch: int) -> None:
    """Pixels that `generate` repeated for beams must still be those of their prompts.

    Raises:
        UnsupportedError: for crops of several prompts in one row of tensors, which releases of
            Transformers that repeat pixels instead of features take apart.
    """
    own = type(state.host.model)._expand_inputs_for_generation
    flat = isinstance(pixels, Tensor) and pixels.ndim == 4
    shown = [image.row for image in state.call.images for _ in image.crops]
    plain = own is GenerationMixin._expand_inputs_for_generation
    if plain and flat and shown != list(range(batch)):
        raise UnsupportedError(
            "This release of Transformers mixes up the pictures of prompts in tiles when it "
            "repeats them for beams: install 5.19 or newer, or repeat the prompt in the batch."
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
        return _fitting(given[-1], kwargs), torch.ones_like(given[-1])
    ids = kwargs.get("input_ids")
    if ids is None or ids.is_meta:
        raise UnsupportedError(
            "Where the image stands is read from input_ids; for inputs without values pass "
            "placeholders= to on()."
        )
    placeholders = state.host.placeholders(ids)
    mask = _checked(kwargs.get("attention_mask"), ids)
    if mask is None or mask.ndim != 2:
        mask = torch.ones_like(ids)
    real = mask.to(ids.device) != 0
    placeholders, real = torch.stack([placeholders, real]).cpu()
    _check_shown(placeholders, real)
    return placeholders, real


def _fitting(placeholders: Any, kwargs: dict) -> Bool[Tensor, "batch length"]:
    """What was passed to on(), if it is of this prompt.

    Raises:
        UnsupportedError: it is not.
    """
    ids = kwargs.get("input_ids")
    prompt = (kwargs["inputs_embeds"][..., 0] if ids is None else ids).shape
    whole = isinstance(placeholders, Tensor) and placeholders.dtype == torch.bool
    if not whole or placeholders.shape != prompt:
        got = list(placeholders.shape) if whole else type(placeholders).__name__
        raise UnsupportedError(
            f"placeholders= of on() is a bool tensor as long as the prompt, {list(prompt)}, True "
            f"where visual tokens stand; got {got}."
        )
    return placeholders


def _check_shown(
    placeholders: Bool[Tensor, "batch length"], real: Bool[Tensor, "batch length"]
) -> None:
    """A mask may hide padding only."""
    if not real.any(1).all():
        raise UnsupportedError(
            "The attention mask hides a whole prompt of the batch; leave that row out."
        )
    for row, hidden in enumerate((placeholders & ~real).sum(1).tolist()):
        if hidden:
            raise UnsupportedError(
                f"The attention mask hides {hidden} visual tokens of prompt {row}: only padding "
                "may be hidden, so mask no part of a picture."
            )


def _checked(mask: Any, ids: Tensor) -> Tensor | None:
    """A mask that fits the prompt.

    Raises:
        UnsupportedError: for one that does not.
    """
    batch, length = ids.shape
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise UnsupportedError("Pass the attention mask as a 2-D or 4-D tensor.")
    fits = mask.shape == ids.shape if mask.ndim == 2 else mask.shape[2:] == (length, length)
    if not fits or mask.shape[0] not in (1, batch):
        raise UnsupportedError(
            f"The attention mask has the shape {list(mask.shape)}, but the prompt needs "
            f"{[batch, length]} or {[batch, 1, length, length]}; pass the processor's own."
        )
    return mask


def _without_pixels(state: State) -> str:
    assert state.encoder is not None
    if state.call.clips:
        return (
            f"{state.encoder.key} works inside the vision tower and takes no video, whose frames "
            "are pooled behind the projector: pass pixel_values, or use a method that cuts inside "
            "the decoder or merges frames."
        )
    looked_up = "" if state.now.decisions is not None else (
        " A model.generate that was looked up before the block computes them itself: look it up "
        "inside the block."
    )  # fmt: skip
    return (
        f"{state.encoder.key} works inside the vision tower: pass pixel_values, not features "
        f"computed before.{looked_up}"
    )


def watch(state: State, module: FamilyModule, args: tuple, kwargs: dict) -> None:
    """The untouched model starts: tell the traces of its prompt, and refuse nothing."""
    call = state.now.call = Call()
    kwargs = arguments_of(module, args, kwargs)
    cache = cache_of(kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        return
    call.images = _images(state, kwargs)
    host, images = state.host, call.images
    call.grids = tuple(host.grid(image) for image in images)
    counts = tuple(len(image.slots) for image in images)
    for entry in state.entries:
        entry.note_prompt(call, counts, lambda: [host.origin(image) for image in images])


def _images(state: State, kwargs: dict) -> list[ImageLayout]:
    """The images of an untouched model's prompt; none where nothing tells."""
    features = kwargs.get("mm_encoder_outputs") or {}
    shown = (kwargs.get("pixel_values"), kwargs.get("pixel_values_videos"), *features.values())
    if all(x is None for x in shown):
        return []
    given = [e.placeholders for e in state.entries if e.placeholders is not None]
    ids, copies = kwargs.get("input_ids"), state.now.copies
    if given:
        placeholders = given[-1]
    elif ids is None or ids.is_meta:
        return []
    else:
        placeholders = state.host.placeholders(ids[::copies]).cpu()
    try:
        return state.host.images(placeholders, state.now.described or kwargs)
    except UnsupportedError:  # features that were computed before, without the pictures' sizes
        return []
