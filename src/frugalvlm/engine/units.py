"""Behind the projector: what an encoder reducer sees and leaves where tokens keep their places.

The tower runs untouched, in the call or before it (`generate`); its run is remembered. At the
decoder's entrance the embeddings at an image's placeholders are what the projector made of it, in
every family. They are reduced image by image: a token that is left stays at the place, and keeps
the planes, of the patch that it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frugalvlm.engine.calls import arguments_of
from frugalvlm.engine.state import Placed, State
from frugalvlm.hosts.base import FamilyModule, ImageLayout, TowerPass
from frugalvlm.hosts.units import UnitHost
from frugalvlm.methods.base import EncoderReducer
from frugalvlm.views import Reduced, UnsupportedError


class TowerHooks:
    """Hooks on a vision tower that remember its runs."""

    def __init__(self, state: State) -> None:
        self.state = state

    def start(self, module: FamilyModule, args: tuple, kwargs: dict) -> None:
        """The tower starts."""
        self.state.now.tower.append(TowerPass(dict(arguments_of(module, args, kwargs))))

    def see(self, name: str) -> Any:
        """A hook behind a module that the host wants to read."""

        def hook(module: FamilyModule, args: tuple, kwargs: dict, output: Any) -> None:
            if self.state.now.tower:
                given = dict(arguments_of(module, args, kwargs))
                self.state.now.tower[-1].read[name] = (given, output)

        return hook


def images_of(
    state: State, placeholders: Tensor, kwargs: dict[str, Any], by_features: bool
) -> list[ImageLayout]:
    """The images of a prompt, in the order of their features.

    Args:
        state: of the session.
        placeholders: bool [batch, length] on the CPU.
        kwargs: what the model got.
        by_features: whether it got features, not pixels: those are repeated with their prompts,
            the tower's run is not.
    """
    now, host = state.now, state.host
    if not by_features:
        return host.images(placeholders, kwargs)
    copies = now.copies
    images = host.images(placeholders[::copies], kwargs, now.tower[-1])
    return [
        ImageLayout(row * copies + copy, image.slots, image.crops, grid=image.grid)
        for row in range(len(placeholders) // copies)
        for copy in range(copies)
        for image in images
        if image.row == row
    ]


def reduced_in_place(state: State, embeds: Tensor, planes: list[Tensor]) -> list[Placed] | None:
    """What the encoder reducer leaves of every image; None where it leaves all as it is."""
    assert isinstance(state.host, UnitHost)
    assert state.encoder is not None
    if not state.now.tower:
        raise UnsupportedError("The vision tower did not run inside this block.")
    known: dict[int, Placed] = {}  # images that several rows show, in beams
    placed = []
    for image in state.call.images:
        found = known.get(image.crops.start)
        if found is None:
            found = known[image.crops.start] = _reduced(state, image, embeds, planes)
        placed.append(found)
    whole = [
        len(p.places) == len(image.slots) and p.origin == list(range(len(image.slots)))
        for p, image in zip(placed, state.call.images, strict=True)
    ]
    return None if all(whole) else placed


def _reduced(state: State, image: ImageLayout, embeds: Tensor, planes: list[Tensor]) -> Placed:
    host, method = state.host, state.encoder
    assert isinstance(host, UnitHost)
    assert isinstance(method, EncoderReducer)
    crops, width = len(image.crops), embeds.shape[-1]
    at = image.slots.to(embeds.device)
    whole = [values[image.row, at].unflatten(0, (crops, -1)) for values in (embeds, *planes)]
    view = host.view(state.now.tower[-1], image, torch.cat(whole, -1), whole[0])
    answer = method.fitted(view.patch_count).reduce(view)
    origin, patches = _placed(answer, view.patch_count)
    tokens = answer.tokens.flatten(0, 1)[origin.to(embeds.device)]
    features, *more = tokens.split(width, -1)
    source = answer.source.flatten().cpu()[origin] if not answer.source.is_meta else -1 - 0 * origin
    number = origin // answer.source.shape[1] * view.patch_count
    stands_for = torch.where(source < 0, -1, source + number).tolist()
    return Placed(image.slots[patches], features, tuple(more), stands_for, answer.merged_into)


def _placed(answer: Reduced, patches: int) -> tuple[Tensor, Tensor]:
    """Which of the flattened tokens are there, in the order of their places, and these: patches of
    the image; on the CPU."""
    crops, kept = answer.source.shape
    slots = torch.arange(crops * kept).view(crops, kept)
    # Without values, the first places.
    places = slots % kept if answer.source.is_meta else answer.places.cpu()
    places = places + torch.arange(crops)[:, None] * patches
    counts = torch.tensor(answer.counts or [kept] * crops)[:, None]
    there = (slots % kept) < counts
    order = places[there].argsort()
    return slots[there][order], places[there][order]
