"""Putting methods on an unmodified model, with module hooks only.

Coordinates: *prompt* positions are those of the caller's input. An encoder reducer turns the prompt
into a shorter *stream* (what the decoder's first layer reads). Before layer k a layer reducer
picks a subset of the stream; each later layer gets hidden states, mask, positions and rotary
embeddings of that subset, and fills a KV cache that is really shorter (or, where the method only
masks, gets the same sequence with some keys hidden). On the way out hidden states return to their
prompt positions, so callers see the shapes they know; a token that is gone shows the state of the
last surviving token before it, which is what predicts the next token.

During decoding the caller's mask still has prompt length; hooks select the surviving columns. What
was cut is remembered on the cache object, so several generations can be under way, and a copy of a
cache knows as much as the original.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from frugalvlm.engine.subset import (
    Subset,
    compose,
    decode_arguments,
    hidden_keys,
    prefill_arguments,
)
from frugalvlm.hosts import Host, host_for
from frugalvlm.hosts.base import FamilyModule, ImageLayout
from frugalvlm.methods.base import EncoderReducer, FrameReducer, LayerReducer, Method
from frugalvlm.operators import operates
from frugalvlm.trace import Trace
from frugalvlm.views import EncoderView, Kept, LayerView, Reduced, Text, UnsupportedError

_MEMORY = "_frugalvlm_memory"  # where a cache keeps what was cut from its prompt
_SESSIONS: WeakKeyDictionary[PreTrainedModel, _Session] = WeakKeyDictionary()


@operates(Method)
@contextmanager
def operate(
    method: Method, model: PreTrainedModel, placeholders: Tensor | None = None
) -> Iterator[Trace]:
    """Run a model with a method; see `Method.on`."""
    host = host_for(model)
    method.check(host.shape)
    entry = _Entry(method, Trace(host.shape.grid, host.shape.decoder_layers), placeholders)
    session = _SESSIONS.setdefault(model, _Session(host))
    try:
        session.put_on(entry)
        yield entry.trace
    finally:
        session.take_off(entry)
        if not session.entries:
            _SESSIONS.pop(model, None)


# -- state ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Entry:
    """One method that is on."""

    method: Method
    trace: Trace
    placeholders: Tensor | None


@dataclass
class _Memory:
    """What was cut out of one prompt; lives as long as its cache."""

    prompt_length: int
    stream: Subset | None = None  # of the prompt; None: all of it
    removed: Tensor | None = None  # [batch, 1] visual tokens missing in the stream
    cuts: dict[int, Subset] = field(default_factory=dict)  # of the stream, by first layer
    hidden: dict[int, Tensor] = field(default_factory=dict)  # [batch, stream], by first layer

    @property
    def stream_length(self) -> int:
        return self.prompt_length if self.stream is None else self.stream.columns.shape[1]


@dataclass
class _Call:
    """State of one forward pass of the whole model.

    The sequence is what the next decoder layer reads: the stream at first, shorter after each cut.
    """

    images: list[ImageLayout] = field(default_factory=list)
    real: Tensor | None = None  # [batch, prompt] not padding; on the CPU
    clips: bool = False  # videos, whose frames are pooled behind the projector
    pixels: Tensor | None = None
    tower_hidden: Tensor | None = None  # what went into the feature layer's attention
    tower_keys: Tensor | None = None  # its key projection
    tower_output: Tensor | None = None  # what left the feature layer
    answer: Reduced | None = None  # what the encoder reducer said
    projected: Tensor | None = None  # its tokens behind the projector, where they are fewer
    memory: _Memory | None = None
    prefill: bool = False
    slots: list[Tensor] = field(default_factory=list)  # of each image in the stream; on the CPU
    present: Tensor | None = None  # [batch, stream] not padding; on the CPU
    embeds: Tensor | None = None  # what the decoder reads, where a cut may ask for it
    text: Text | None = None  # the text behind the images, with places in the stream
    visual: Tensor | None = None  # [images, visual] in the sequence, hidden ones left out
    counts: tuple[int, ...] = ()  # visual tokens of each image
    last: Tensor | None = None  # [batch] last prompt token, in the sequence
    attention_inputs: dict[str, Any] = field(default_factory=dict)  # of the layer before a cut
    raw_keys: Tensor | None = None  # its key projection
    layer_kwargs: dict[int, dict[str, Any]] = field(default_factory=dict)  # by first layer


class _Session:
    """All methods that are on one model, and the hooks that serve them."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.entries: list[_Entry] = []
        self.encoder: EncoderReducer | None = None
        self.cut_at: dict[int, LayerReducer] = {}
        self.handles: list[Any] = []
        self.own_generate: Callable | None = None  # one that was set on this very model before
        self.call = _Call()
        self.decisions: dict[int, Kept] | None = None  # inside generate(): taken once
        self.copies = 1  # sequences per prompt inside generate()
        self.surplus = 0  # tokens that generate() hands over although the cache holds them

    # -- which methods are on ---------------------------------------------------------------

    def put_on(self, entry: _Entry) -> None:
        method, total = entry.method, self.host.shape.decoder_layers
        if isinstance(method, EncoderReducer):
            if self.encoder is not None:
                raise UnsupportedError(
                    f"{method.key} cannot be put on top of {self.encoder.key}: both reduce tokens "
                    "right behind the vision tower. Leave the outer block first."
                )
            self.host.feature_attention  # noqa: B018 - raises where there is no such layer
        if isinstance(method, LayerReducer):
            for layer in method.layers(total):
                if not 1 <= layer < total:
                    raise UnsupportedError(
                        f"{method.key} cuts before layer {layer}; possible are 1 to {total - 1}."
                    )
                if layer in self.cut_at:
                    raise UnsupportedError(
                        f"{method.key} and {self.cut_at[layer].key} both cut before layer {layer}."
                    )
            for other in self.cut_at.values():
                if method.masks_only or other.masks_only:
                    raise UnsupportedError(
                        f"{method.key} and {other.key} do not go together: one only hides tokens, "
                        "which the other would have to find again. Leave the outer block first."
                    )
        self.entries.append(entry)
        self._rehook()

    def take_off(self, entry: _Entry) -> None:
        self.entries = [e for e in self.entries if e is not entry]
        self.call = _Call()
        self._rehook()

    # -- hooks ------------------------------------------------------------------------------

    def _rehook(self) -> None:
        host, methods = self.host, [entry.method for entry in self.entries]
        total, layers = host.shape.decoder_layers, host.language_model.layers
        if self.handles:
            host.model.__dict__.pop("generate", None)
            if self.own_generate is not None:
                host.model.generate = self.own_generate
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.encoder = next((m for m in methods if isinstance(m, EncoderReducer)), None)
        self.cut_at = {
            i: m for m in methods if isinstance(m, LayerReducer) for i in m.layers(total)
        }
        if self.encoder is None and not self.cut_at:
            return
        self._before(host.inner, self._enter)
        self._before(host.language_model, self._enter_decoder)
        if self.encoder is not None:
            attention = host.feature_attention
            self._before(host.tower, self._see_pixels)
            self._before(attention, self._see_tower_hidden)
            self._after(attention.k_proj, self._see_tower_keys)
            self._after(host.feature_module, self._see_tower_output)
            self._before(host.projector, self._reduce)
            self._after(host.projector, self._hold_projected)
        for i in self.cut_at:
            self._before(layers[i - 1].self_attn, self._see_attention_inputs)
            self._after(layers[i - 1].self_attn.k_proj, self._see_raw_keys)
        for i in range(min(self.cut_at, default=total), total):
            self._before(layers[i], self._enter_layer(i))
        self._after(host.language_model, self._leave_decoder)
        self.own_generate = host.model.__dict__.get("generate")
        host.model.generate = self._generate

    def _before(self, module: nn.Module, hook: Callable) -> None:
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable) -> None:
        self.handles.append(module.register_forward_hook(hook))

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate`, with decisions taken once, at the prompt, with and without a cache."""
        model = self.host.model
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        config = given or model.generation_config

        def setting(name: str) -> Any:
            return kwargs.get(name) or getattr(config, name, None)

        for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
            if setting(name):
                raise UnsupportedError(
                    f"generate({name}=...) takes the cache apart by prompt positions, which are "
                    "not those of a shortened prompt; leave it out."
                )
        self.decisions = {}
        self.copies = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
        memory = getattr(kwargs.get("past_key_values"), _MEMORY, None)
        ids: Any = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        mask = kwargs.get("attention_mask")
        if memory is not None and (mask is None or mask.shape[1] == ids.shape[1]):
            # A whole conversation: generate() skips as many tokens as the shorter cache holds.
            self.surplus = memory.prompt_length - memory.stream_length
        # Since 5.19 generate() runs the tower before the model and drops what describes the images;
        # the older path, which hands pixels to the model, is still there for models without it.
        model._supports_mm_encoder_outputs = lambda: False
        try:
            if self.own_generate is not None:
                return self.own_generate(*args, **kwargs)
            return type(model).generate(model, *args, **kwargs)
        finally:
            self.decisions, self.copies, self.surplus = None, 1, 0
            del model._supports_mm_encoder_outputs

    # -- the images and the vision tower ----------------------------------------------------

    def _enter(self, module: FamilyModule, args: tuple, kwargs: dict) -> None:
        """The whole model starts: find the images of the prompt."""
        self.call = _Call()
        if args:
            kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        pixels, clips = kwargs.get("pixel_values"), kwargs.get("pixel_values_videos")
        features = kwargs.get("mm_encoder_outputs") or {}
        if all(x is None for x in (pixels, clips, features.get("image"), features.get("video"))):
            return
        self.call.clips = pixels is None and clips is not None
        if self.encoder is not None and pixels is None and not self._reduces_frames:
            raise UnsupportedError(
                f"{self.encoder.key} works inside the vision tower: pass pixel_values, not "
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
            if kwargs.get(name) not in (None, getattr(self.host.model.config, name)):
                raise UnsupportedError(f"Set {name} in the model's config, not in the call.")
        placeholders, self.call.real = self._see_prompt(kwargs)
        self.call.images = self.host.images(placeholders, kwargs)
        rows = [image.row for image in self.call.images]
        if self.copies > 1 and len(set(rows)) < len(rows):
            raise UnsupportedError(
                "Several images in one prompt together with beams or several returned sequences "
                "are not supported; repeat the prompt in the batch instead."
            )

    @property
    def _reduces_frames(self) -> bool:
        """Whether this call's videos are reduced frame by frame, behind the pooling."""
        return self.call.clips and isinstance(self.encoder, FrameReducer)

    def _see_prompt(
        self, kwargs: dict
    ) -> tuple[Bool[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
        """Where images stand and where no padding is, on the CPU: the one look at values."""
        given = [e.placeholders for e in self.entries if e.placeholders is not None]
        if given:
            return given[-1], torch.ones_like(given[-1])
        ids = kwargs.get("input_ids")
        if ids is None or ids.is_meta:
            raise UnsupportedError(
                "Where the image stands is read from input_ids; for inputs without values pass "
                "placeholders= to on()."
            )
        placeholders = self.host.placeholders(ids)
        mask = kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2:
            mask = torch.ones_like(ids)
        real = mask.to(ids.device) != 0
        placeholders, real = torch.stack([placeholders, real]).cpu()
        return placeholders, real

    def _see_pixels(self, module: FamilyModule, args: tuple, kwargs: dict) -> tuple | None:
        """The tower starts: the picture, smaller where the method wants it so."""
        pixels = self.call.pixels = kwargs.get("pixel_values", args[0] if args else None)
        if not self.call.images or self.call.clips or pixels is None:
            return None
        assert self.encoder is not None
        seen = self.encoder.shrink(pixels, self.host.shape.grid)
        if seen is pixels:
            return None
        kwargs = {**kwargs, "interpolate_pos_encoding": True}
        if args:
            return (seen, *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": seen}

    def _see_tower_hidden(self, module: FamilyModule, args: tuple, kwargs: dict) -> None:
        self.call.tower_hidden = kwargs.get("hidden_states", args[0] if args else None)

    def _see_tower_keys(self, module: FamilyModule, args: tuple, output: Tensor) -> None:
        self.call.tower_keys = output

    def _see_tower_output(self, module: FamilyModule, args: tuple, output: Any) -> None:
        self.call.tower_output = output if isinstance(output, Tensor) else output[0]

    def _reduce(self, module: FamilyModule, args: tuple, kwargs: dict) -> tuple | None:
        """The projector starts: hand it the reduced tokens only."""
        call, host, (patches, *rest) = self.call, self.host, args
        if not call.images or call.clips:
            return None
        assert self.encoder is not None
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

        call.answer = self.encoder.reduce(
            view(host.feature_attention, call.tower_hidden, call.tower_keys, following=following)
        )
        call.tower_hidden = call.tower_keys = call.tower_output = call.pixels = None
        if call.answer.counts is None and call.answer.tokens.shape[1] >= patches.shape[1]:
            return None  # nothing to shorten: the model packs its features itself
        return (call.answer.tokens, *rest), kwargs

    def _hold_projected(self, module: FamilyModule, args: tuple, output: Tensor) -> Tensor | None:
        """The projector is done: keep its tokens, give the model blanks of the expected shape."""
        patches, answer = self.host.shape.patches, self.call.answer
        if answer is None or (answer.counts is None and output.shape[1] == patches):
            return None
        self.call.projected = output
        return output.new_zeros(()).expand(output.shape[0], patches, output.shape[-1])

    # -- the decoder ------------------------------------------------------------------------

    def _enter_decoder(self, module: FamilyModule, args: tuple, kwargs: dict) -> tuple | None:
        """The decoder starts: shorten the prompt, or the mask of a later step."""
        call, cache = self.call, kwargs.get("past_key_values")
        if not call.images:
            call.memory = getattr(cache, _MEMORY, None)
            if call.memory is not None:
                return args, self._continue(kwargs)
            if cache is None or cache.get_seq_length() == 0:
                for entry in self.entries:
                    entry.trace.note_prompt()
            return None
        if self.cut_at and module.training and getattr(module, "gradient_checkpointing", False):
            raise UnsupportedError(
                "Cuts inside the decoder do not go with gradient checkpointing; switch it off."
            )
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        call.prefill, call.memory = True, _Memory(length)
        slots = [image.slots for image in call.images]
        if call.projected is not None:
            kwargs, slots = self._shorten_prompt(embeds, kwargs, self._read_pictures())
        elif self._reduces_frames:
            kwargs, slots = self._shorten_prompt(embeds, kwargs, self._read_clips(embeds))
        call.counts, call.slots = tuple(map(len, slots)), slots
        call.embeds = kwargs["inputs_embeds"] if self.cut_at else None
        call.present = call.real if call.present is None else call.present
        end = call.memory.stream_length
        visual = nn.utils.rnn.pad_sequence(slots, batch_first=True, padding_value=end)
        call.visual = visual.to(embeds.device)
        call.last = _last_token(kwargs.get("attention_mask"), batch, end, embeds.device)
        crops = tuple(len(image.crops) for image in call.images)
        origins, merged = self._origins(), call.answer.merged_into if call.answer else None
        for entry in self.entries:
            entry.trace.note_prompt(call.counts, crops, origins, merged)
        return args, kwargs

    def _read_pictures(self) -> list[Tensor]:
        """The reduced tokens [kept, width] of every picture, in reading order."""
        call, features = self.call, []
        assert call.answer is not None
        assert call.projected is not None
        for image in call.images:
            tokens = call.projected[image.crops.start : image.crops.stop].flatten(0, 1)
            order = self._reading_order(image, call.answer)
            features.append(tokens if order is None else tokens[order])
        return features

    def _read_clips(self, embeds: Tensor) -> list[Tensor]:
        """The reduced tokens [kept, width] of every video, and the newline that ends it."""
        assert isinstance(self.encoder, FrameReducer)
        features = []
        for image in self.call.images:
            whole = embeds[image.row, image.slots.to(embeds.device)]
            frames, newline = whole[:-1].unflatten(0, (image.tiles[0], -1)), whole[-1:]
            reduced = self.encoder.reduce_frames(frames, self.host.shape.patches)
            features.append(torch.cat([reduced.flatten(0, 1), newline]))
        return features

    def _shorten_prompt(
        self, embeds: Tensor, kwargs: dict, features: list[Tensor]
    ) -> tuple[dict, list[Tensor]]:
        """The stream's embeddings, mask and positions, and each image's places in it (CPU)."""
        call, memory = self.call, self.call.memory
        assert memory is not None
        assert call.real is not None
        stays, kept_slots = call.real.clone(), []
        for image, tokens in zip(call.images, features, strict=True):
            gone = len(image.slots) - len(tokens)
            if gone < 0:
                raise UnsupportedError(
                    f"This image has {len(image.slots)} tokens once its padding is cut away, fewer "
                    f"than the {len(tokens)} to keep; lower the budget or use a square image."
                )
            stays[image.row, image.slots[:gone]] = False
            kept_slots.append(image.slots[gone:])
        stream = Subset.of(stays, tuple(stays.sum(1).tolist()))
        places = [
            stream.landing[image.row, slots]
            for image, slots in zip(call.images, kept_slots, strict=True)
        ]
        rows = torch.cat(
            [p.new_full(p.shape, i.row) for i, p in zip(call.images, places, strict=True)]
        )
        call.present = stream.columns >= 0
        memory.stream = stream = stream.to(embeds.device)
        memory.removed = (call.real.sum(1) - stays.sum(1))[:, None].to(embeds.device)
        at = rows.to(embeds.device), torch.cat(places).to(embeds.device)
        short = stream.take(embeds).index_put(at, torch.cat(features).to(embeds.dtype))
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None:
            mask = stream.mask(mask)
        elif stream.padded:
            mask = stream.own_mask
        if positions is not None:
            # Each token moves up by what was removed before it.
            removed = (call.real.cumsum(1) - stays.cumsum(1)).to(embeds.device)
            moved = (positions - removed).clamp(min=0)
            positions = moved.gather(1, stream.columns.clamp(min=0))
        return {
            **kwargs, "inputs_embeds": short, "attention_mask": mask, "position_ids": positions
        }, places  # fmt: skip

    def _reading_order(self, image: ImageLayout, answer: Reduced) -> Int[Tensor, " kept"] | None:
        """The host's order of an image's reduced tokens, without padding."""
        order = self.host.order(image, answer)
        if answer.counts is None:
            return order
        device, kept = answer.source.device, answer.source.shape[1]
        if order is None:
            order = torch.arange(len(image.crops) * kept, device=device)
        counts = torch.tensor(answer.counts[image.crops.start : image.crops.stop]).to(device)
        return order[order % kept < counts[order // kept]]

    def _origins(self) -> Callable[[], list[list[int]]]:
        """What each visual token of each image stands for, worked out when a trace is read."""
        host, images, answer = self.host, self.call.images, self.call.answer
        if answer is None or self.call.projected is None:
            return lambda: [host.origin(image) for image in images]

        def reduced(image: ImageLayout) -> list[int]:
            source = answer.source[image.crops.start : image.crops.stop]
            crop = torch.arange(len(source), device=source.device)[:, None]
            origin = torch.where(source < 0, -1, source + crop * host.shape.patches).flatten()
            order = self._reading_order(image, answer)
            return (origin if order is None else origin[order]).tolist()

        return lambda: [reduced(image) for image in images]

    def _continue(self, kwargs: dict) -> dict:
        """A later step with a cache: the caller's mask and positions count the whole prompt."""
        memory, cache, kwargs = self.call.memory, kwargs["past_key_values"], dict(kwargs)
        assert memory is not None
        past, batch = cache.get_seq_length(), len(kwargs["inputs_embeds"])
        masking = {layer for layer, method in self.cut_at.items() if method.masks_only}
        cutting = self.cut_at.keys() - masking
        if not (memory.cuts.keys() <= cutting and memory.hidden.keys() <= masking):
            raise UnsupportedError(
                "This cache was filled under another method; continue it inside that block."
            )
        dropped = {k: memory.stream_length - cut.columns.shape[1] for k, cut in memory.cuts.items()}
        if past < memory.stream_length or any(
            past - cache.get_seq_length(layer) != count for layer, count in dropped.items()
        ):
            raise UnsupportedError(
                "This cache was cropped since its prompt was read; that does not go with cuts."
            )
        subsets = [s for s in (memory.stream, *memory.cuts.values()) if s is not None]
        if any(len(s.columns) != batch for s in subsets):
            raise UnsupportedError("The batch size changed since this cache's prompt was read.")
        stream = memory.stream
        if stream is None:
            return kwargs
        for name in ("inputs_embeds", "position_ids") if self.surplus else ():
            kwargs[name] = kwargs[name][:, self.surplus :] if kwargs.get(name) is not None else None
        self.surplus = 0
        new = past - memory.stream_length + kwargs["inputs_embeds"].shape[1]
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] - memory.removed
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if mask.shape[-1] != memory.prompt_length + new:
                raise UnsupportedError(
                    f"The attention mask must count the prompt as it was given: "
                    f"{memory.prompt_length + new} tokens up to here, not {mask.shape[-1]}."
                )
            kwargs["attention_mask"] = stream.keys(mask, new)
        elif stream.padded:
            ones = stream.columns.new_ones(batch, new)
            kwargs["attention_mask"] = torch.cat([stream.own_mask, ones], 1)
        return kwargs

    def _see_attention_inputs(self, module: FamilyModule, args: tuple, kwargs: dict) -> None:
        if self.call.prefill:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            self.call.attention_inputs = {**kwargs, "hidden_states": hidden}

    def _see_raw_keys(self, module: FamilyModule, args: tuple, output: Tensor) -> None:
        if self.call.prefill:
            self.call.raw_keys = output

    def _enter_layer(self, layer: int) -> Callable:
        """A hook for a layer behind (or at) a cut: hidden states and arguments of the subset."""

        def hook(module: FamilyModule, args: tuple, kwargs: dict) -> tuple | None:
            call, memory = self.call, self.call.memory
            if memory is None:
                return None
            kwargs = dict(kwargs)
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            if call.prefill and layer in self.cut_at:
                hidden = self._cut(layer, hidden)
            first = max((k for k in (*memory.cuts, *memory.hidden) if k <= layer), default=None)
            if first is None:
                return None
            if first not in call.layer_kwargs:
                call.layer_kwargs[first] = self._arguments(module, first, hidden, kwargs)
            return (hidden, *args[1:]), {**kwargs, **call.layer_kwargs[first]}

        return hook

    def _arguments(
        self, module: FamilyModule, first: int, hidden: Tensor, kwargs: dict
    ) -> dict[str, Any]:
        """What layers get instead of the stream's arguments, from a cut to the next."""
        call, memory = self.call, self.call.memory
        assert memory is not None
        flash = "flash" in (module.self_attn.config._attn_implementation or "")
        if first in memory.hidden:
            if flash:
                raise UnsupportedError(
                    f"{self.cut_at[first].key} hides tokens by masks that flash attention does not "
                    "take; load the model with attn_implementation='sdpa'."
                )
            return {"attention_mask": hidden_keys(memory.hidden[first], hidden, kwargs)}
        make = prefill_arguments if call.prefill else decode_arguments
        rotary = self.host.language_model.rotary_emb
        return make(memory.cuts[first], hidden, kwargs, flash, rotary)

    def _text(self) -> Text:
        """The text behind the images, with its places in the sequence; looked for once."""
        call, memory = self.call, self.call.memory
        assert memory is not None
        call.text = call.text or self._text_of_stream()
        if not memory.cuts:
            return call.text
        landing = memory.cuts[max(memory.cuts)].landing
        return replace(call.text, index=landing.gather(1, call.text.index))

    def _text_of_stream(self) -> Text:
        """The same with its places in the stream; looked for on the CPU."""
        call = self.call
        assert call.embeds is not None
        assert call.present is not None
        rows, ends = [image.row for image in call.images], [int(s[-1]) for s in call.slots]
        words, at = call.present.clone(), torch.arange(call.present.shape[1])
        for row, slots in zip(rows, call.slots, strict=True):
            words[row, slots] = False
        behind = words[rows] & (at > torch.tensor(ends)[:, None])
        last = (call.present.long() * at).argmax(-1)[rows]
        behind |= (at == last[:, None]) & ~behind.any(-1, keepdim=True)
        pool = torch.zeros_like(words)
        for row, own in zip(rows, behind, strict=True):
            pool[row] |= own
        index = (~pool).long().argsort(dim=-1, stable=True)[:, : int(pool.sum(-1).max())]
        behind = behind.gather(1, index[rows])
        device = call.embeds.device
        visual = nn.utils.rnn.pad_sequence(call.slots, batch_first=True).to(device)
        index, every = index.to(device), torch.arange(len(index), device=device)[:, None]
        return Text(
            index,
            behind.to(device),
            call.embeds[every, index],
            call.embeds[torch.tensor(rows, device=device)[:, None], visual],
        )

    def _cut(self, layer: int, hidden: Tensor) -> Tensor:
        """Drop or hide visual tokens before a layer."""
        call, memory = self.call, self.call.memory
        assert memory is not None
        assert call.visual is not None
        assert call.last is not None
        assert call.raw_keys is not None
        assert call.real is not None
        device, (batch, length) = hidden.device, hidden.shape[:2]
        method, rows = self.cut_at[layer], torch.tensor([i.row for i in call.images]).to(device)
        before = memory.cuts[max(memory.cuts)] if memory.cuts else memory.stream
        real = call.real.to(device) if before is None else before.columns >= 0
        kept = self.decisions.get(layer) if self.decisions is not None else None
        if kept is None:
            seen, raw_keys = call.attention_inputs, call.raw_keys
            attention = self.host.language_model.layers[layer - 1].self_attn
            view = LayerView(
                layer, hidden, call.visual, call.counts,
                tuple(len(image.crops) for image in call.images), self.host.shape.patches, rows,
                call.last,
                lambda queries, temperature=1.0: self.host.attention_rows(
                    attention, seen["hidden_states"], raw_keys, seen["position_embeddings"],
                    seen.get("attention_mask"), queries, temperature,
                ),
                self.host.shape.decoder_layers, tuple(map(len, call.slots)), real, self._text,
            )  # fmt: skip
            kept = method.keep(view)
            if self.decisions is not None:
                self.decisions[layer] = kept
        call.attention_inputs, call.raw_keys = {}, None

        for entry in self.entries:
            entry.trace.note_cut(layer, kept, method.masks_only)
        if kept.counts == call.counts and kept.values is None:
            return hidden
        lengths = list(call.real.sum(1).tolist() if before is None else before.lengths)
        for image, old, new in zip(call.images, call.counts, kept.counts, strict=True):
            lengths[image.row] -= old - new
        chosen = call.visual.gather(1, kept.index)
        if len(set(kept.counts)) > 1:
            rank = torch.arange(chosen.shape[1], device=device)
            limit = torch.tensor(kept.counts).to(device)[:, None]
            chosen = chosen.masked_fill(rank >= limit, length)
        # One spare column swallows the padding entries of `visual` and `chosen`.
        stays = torch.ones(batch, length + 1, dtype=torch.bool, device=device)
        stays[:, :length] = real
        stays[rows[:, None], call.visual] = False
        stays[rows[:, None], chosen] = True
        if method.masks_only:
            gone = real & ~stays[:, :length]
            known = memory.hidden[max(memory.hidden)] if memory.hidden else gone
            memory.hidden[layer], call.visual, call.counts = known | gone, chosen, kept.counts
            return hidden
        now = Subset.of(stays[:, :length], tuple(lengths))
        if method.renumbers:
            now = now.renumbered(real, stays[:, :length])
        end = torch.full((batch, 1), now.columns.shape[1], device=device)
        landing = torch.cat([now.landing, end], 1)
        call.visual = landing[rows[:, None], chosen]
        call.last = landing.gather(1, call.last[:, None])[:, 0]
        call.counts = kept.counts
        memory.cuts[layer] = compose(before, now) if memory.cuts else now
        hidden = now.take(hidden)
        if kept.values is None:
            return hidden
        full = torch.arange(kept.index.shape[1]) < torch.tensor(kept.counts)[:, None]
        which, slot = (part.to(device) for part in full.nonzero(as_tuple=True))
        values = kept.values[which, slot].to(hidden.dtype)
        return hidden.index_put((rows[which], call.visual[which, slot]), values)

    def _leave_decoder(self, module: FamilyModule, args: tuple, output: Any) -> Any:
        """The decoder is done: remember the cuts on the cache, restore the prompt's shape."""
        call, memory = self.call, self.call.memory
        self.call = _Call()
        if memory is None or not call.prefill:
            return output
        touched = memory.cuts or memory.hidden or memory.stream is not None
        if output.past_key_values is not None and touched:
            setattr(output.past_key_values, _MEMORY, memory)
        hidden = output.last_hidden_state
        if memory.cuts:
            hidden = memory.cuts[max(memory.cuts)].spread(hidden)
        if memory.stream is not None:
            hidden = memory.stream.spread(hidden)
        output.last_hidden_state = hidden
        return output


def _last_token(
    mask: Tensor | None, batch: int, length: int, device: torch.device
) -> Int[Tensor, " batch"]:
    """Position of the last real token of every row, whichever side is padded."""
    if mask is None or mask.ndim != 2:
        return torch.full((batch,), length - 1, device=device)
    return (mask[:, :length] != 0).long().mul(torch.arange(length, device=device)).argmax(-1)
