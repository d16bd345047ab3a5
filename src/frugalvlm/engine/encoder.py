"""Between vision tower and decoder: what an encoder reducer sees, and the prompt that it shortens.

Hooks keep what went into the feature layer's attention; the projector gets the reduced tokens only,
and the model, which expects as many features as there are placeholders, gets blanks of that shape.
The stream is then made of the prompt's embeddings and the reduced tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from frugalvlm.engine.prompt import reduces_frames
from frugalvlm.engine.state import Call, State
from frugalvlm.engine.subset import Subset
from frugalvlm.engine.units import reduced_in_place
from frugalvlm.hosts import Host
from frugalvlm.hosts.base import FamilyModule, ImageLayout
from frugalvlm.methods.base import FrameReducer
from frugalvlm.views import EncoderView, Reduced, UnsupportedError


class EncoderHooks:
    """Hooks on the vision tower and the projector."""

    def __init__(self, state: State) -> None:
        self.state = state

    def see_pixels(self, module: FamilyModule, args: tuple, kwargs: dict) -> tuple | None:
        """The tower starts: the picture, smaller where the method wants it so."""
        state, call = self.state, self.state.call
        pixels = call.pixels = kwargs.get("pixel_values", args[0] if args else None)
        if not call.images or call.clips or pixels is None:
            return None
        assert state.encoder is not None
        seen = state.encoder.shrink(pixels, state.host.shape.grid)
        if seen is pixels:
            return None
        kwargs = {**kwargs, "interpolate_pos_encoding": True}
        if args:
            return (seen, *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": seen}

    def see_hidden(self, module: FamilyModule, args: tuple, kwargs: dict) -> None:
        """What goes into the feature layer's attention."""
        self.state.call.tower_hidden = kwargs.get("hidden_states", args[0] if args else None)

    def see_keys(self, module: FamilyModule, args: tuple, output: Tensor) -> None:
        """Its key projection."""
        self.state.call.tower_keys = output

    def see_output(self, module: FamilyModule, args: tuple, output: Any) -> None:
        """What leaves the feature layer."""
        self.state.call.tower_output = output if isinstance(output, Tensor) else output[0]

    def reduce(self, module: FamilyModule, args: tuple, kwargs: dict) -> tuple | None:
        """The projector starts: hand it the reduced tokens only."""
        call, (patches, *rest) = self.state.call, args
        if not call.images or call.clips:
            return None
        assert self.state.encoder is not None
        call.answer = self.state.encoder.reduce(encoder_view(self.state.host, call, patches))
        call.tower_hidden = call.tower_keys = call.tower_output = call.pixels = None
        if call.answer.counts is None and call.answer.tokens.shape[1] >= patches.shape[1]:
            return None  # nothing to shorten: the model packs its features itself
        return (call.answer.tokens, *rest), kwargs

    def hold_projected(self, module: FamilyModule, args: tuple, output: Tensor) -> Tensor | None:
        """The projector is done: keep its tokens, give the model blanks of the expected shape."""
        patches, answer = self.state.host.shape.patches, self.state.call.answer
        if answer is None or (answer.counts is None and output.shape[1] == patches):
            return None
        self.state.call.projected = output
        return output.new_zeros(()).expand(output.shape[0], patches, output.shape[-1])


def encoder_view(host: Host, call: Call, patches: Tensor) -> EncoderView:
    """What the method may look at: the crops of this call, and queries and keys of its tower."""
    if call.tower_hidden is None or call.tower_keys is None or call.tower_output is None:
        raise UnsupportedError("The vision tower did not run its feature layer.")
    states, pixels = call.tower_output, call.pixels

    def view(attention: FamilyModule, hidden: Tensor, keys: Tensor, **more: Any) -> EncoderView:
        return EncoderView(
            patches=patches,
            cls=states[:, :1] if host.shape.has_cls else None,
            grid=host.shape.grid,
            hidden=hidden,
            queries_of=lambda rows: host.tower_heads(attention.q_proj(rows)),
            raw_keys=host.tower_heads(keys),
            scale=host.tower_scale,
            pixels=pixels,
            # `forward`: this very module's hooks wait for the reduced tokens.
            project=host.projector.forward,
            **more,
        )

    def following() -> EncoderView:
        layer = host.following_module
        hidden = layer.layer_norm1(states)
        return view(layer.self_attn, hidden, layer.self_attn.k_proj(hidden))

    return view(host.feature_attention, call.tower_hidden, call.tower_keys, following=following)


def origins(host: Host, call: Call) -> Callable[[], list[list[int]]]:
    """What each visual token of each image stands for, worked out when a trace is read."""
    images, answer, placed = call.images, call.answer, call.placed
    if placed:
        return lambda: [p.origin for p in placed]
    if answer is None or call.projected is None:
        return lambda: [host.origin(image) for image in images]

    def reduced(image: ImageLayout) -> list[int]:
        source = answer.source[image.crops.start : image.crops.stop]
        crop = torch.arange(len(source), device=source.device)[:, None]
        origin = torch.where(source < 0, -1, source + crop * host.shape.patches).flatten()
        order = _reading_order(host, image, answer)
        return (origin if order is None else origin[order]).tolist()

    return lambda: [reduced(image) for image in images]


def merged_into(call: Call) -> Tensor | None:
    """Into which slot of its crop's tokens each patch was folded, of all crops of a call."""
    if not call.placed:
        return call.answer.merged_into if call.answer else None
    rows = [
        row
        for p, image in zip(call.placed, call.images, strict=True)
        for row in (
            torch.full((len(image.crops), 1), -1) if p.merged_into is None else p.merged_into.cpu()
        )
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def shortened(state: State, embeds: Tensor, kwargs: dict) -> tuple[dict, list[Tensor]] | None:
    """The decoder's arguments for the stream, and each image's places in it (on the CPU).

    None where no encoder reducer made it shorter than the prompt.
    """
    host, call = state.host, state.call
    if host.behind_projector:
        if state.encoder is None:
            return None
        call.placed = reduced_in_place(state, embeds, call.planes) or []
        return _shorten_in_place(host, call, embeds, kwargs) if call.placed else None
    if call.projected is not None:
        features = _read_pictures(host, call)
    elif reduces_frames(state):
        assert isinstance(state.encoder, FrameReducer)
        features = _read_clips(state.encoder, call.images, embeds, host.shape.patches)
    else:
        return None
    kept = [_last_slots(call, *pair) for pair in zip(call.images, features, strict=True)]
    return _shorten_prompt(host, call, embeds, kwargs, features, kept)


def _shorten_in_place(
    host: Host, call: Call, embeds: Tensor, kwargs: dict
) -> tuple[dict, list[Tensor]]:
    """Likewise, of tokens that keep their places; and the planes that go with them."""
    kept = [p.places for p in call.placed]
    made = _shorten_prompt(host, call, embeds, kwargs, [p.tokens for p in call.placed], kept)
    assert call.memory is not None
    assert call.memory.stream is not None
    stream, where = call.memory.stream, _rows_of(call.images, made[1])
    call.planes = [
        stream.take(plane).index_put(
            tuple(part.to(plane.device) for part in where),
            torch.cat([p.planes[i] for p in call.placed]).to(plane.dtype),
        )
        for i, plane in enumerate(call.planes)
    ]
    return made


def _last_slots(call: Call, image: ImageLayout, tokens: Tensor) -> Tensor:
    """Where an image's tokens stand that are packed together: at the end of its place."""
    gone = len(image.slots) - len(tokens)
    if gone < 0:
        adaptive = call.answer is not None and call.answer.counts is not None
        remedy = "set a budget" if adaptive else "lower the budget"
        raise UnsupportedError(
            f"This image has {len(image.slots)} tokens once its padding is cut away, fewer "
            f"than the {len(tokens)} to keep; {remedy} or use a square image."
        )
    return image.slots[gone:]


def _rows_of(images: list[ImageLayout], places: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Row and position of every token that images have left; on the CPU."""
    rows = [p.new_full(p.shape, i.row) for i, p in zip(images, places, strict=True)]
    return torch.cat(rows), torch.cat(places)


def _read_pictures(host: Host, call: Call) -> list[Tensor]:
    """The reduced tokens [kept, width] of every picture, in reading order."""
    features = []
    assert call.answer is not None
    assert call.projected is not None
    for image in call.images:
        tokens = call.projected[image.crops.start : image.crops.stop].flatten(0, 1)
        order = _reading_order(host, image, call.answer)
        features.append(tokens if order is None else tokens[order])
    return features


def _read_clips(
    method: FrameReducer, images: list[ImageLayout], embeds: Tensor, patches: int
) -> list[Tensor]:
    """The reduced tokens [kept, width] of every video, and the newline that ends it."""
    features = []
    for image in images:
        whole = embeds[image.row, image.slots.to(embeds.device)]
        frames, newline = whole[:-1].unflatten(0, (image.tiles[0], -1)), whole[-1:]
        reduced = method.reduce_frames(frames, patches)
        features.append(torch.cat([reduced.flatten(0, 1), newline]))
    return features


def _shorten_prompt(
    host: Host, call: Call, embeds: Tensor, kwargs: dict, features: list[Tensor],
    kept_slots: list[Tensor],
) -> tuple[dict, list[Tensor]]:  # fmt: skip
    """The stream's embeddings, mask and positions, and each image's places in it.

    Args:
        host: of the model.
        call: the forward pass.
        embeds: [batch, prompt, width] what the decoder was to read.
        kwargs: its arguments.
        features: [kept, width] what is left of each image.
        kept_slots: [kept] prompt positions where it stands.
    """
    memory = call.memory
    assert memory is not None
    assert call.real is not None
    stays = call.real.clone()
    for image, slots in zip(call.images, kept_slots, strict=True):
        stays[image.row, image.slots] = False
        stays[image.row, slots] = True
    stream = Subset.of(stays, tuple(stays.sum(1).tolist()))
    places = [
        stream.landing[image.row, slots]
        for image, slots in zip(call.images, kept_slots, strict=True)
    ]
    rows, at_places = _rows_of(call.images, places)
    call.present = stream.columns >= 0
    memory.stream = stream = stream.to(embeds.device)
    memory.removed = (call.real.sum(1) - stays.sum(1))[:, None].to(embeds.device)
    at = rows.to(embeds.device), at_places.to(embeds.device)
    short = stream.take(embeds).index_put(at, torch.cat(features).to(embeds.dtype))
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        mask = stream.mask(mask)
    elif stream.padded:
        mask = stream.own_mask
    if host.keeps_positions:
        positions = stream.positions(positions)
    elif positions is not None:
        # Each token moves up by what was removed before it.
        removed = (call.real.cumsum(1) - stays.cumsum(1)).to(embeds.device)
        moved = (positions - removed).clamp(min=0)
        positions = moved.gather(1, stream.columns.clamp(min=0))
    return {
        **kwargs, "inputs_embeds": short, "attention_mask": mask, "position_ids": positions
    }, places  # fmt: skip


def _reading_order(host: Host, image: ImageLayout, answer: Reduced) -> Int[Tensor, " kept"] | None:
    """The host's order of an image's reduced tokens, without padding."""
    order = host.order(image, answer)
    if answer.counts is None:
        return order
    device, kept = answer.source.device, answer.source.shape[1]
    if order is None:
        order = torch.arange(len(image.crops) * kept, device=device)
    counts = torch.tensor(answer.counts[image.crops.start : image.crops.stop]).to(device)
    order = order[order % kept < counts[order // kept]]
    if len(order) <= len(image.slots):
        return order
    # Crops see margins, too, which the model cuts away: their tokens go where there is no room.
    source = answer.source[image.crops.start : image.crops.stop].flatten()[order]
    place = source + order // kept * host.shape.patches
    shown = torch.isin(place, torch.tensor(host.origin(image), device=device))
    return order[(source < 0) | shown]
