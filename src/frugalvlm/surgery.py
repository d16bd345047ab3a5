"""Putting methods on an unmodified model, with module hooks only.

Coordinates: *prompt* positions are those of the caller's input. An encoder reducer turns the prompt
into a shorter *stream* (what the decoder's first layer reads). Before layer k a layer reducer
picks a subset of the stream; each later layer gets hidden states, mask, positions and rotary
embeddings of that subset, and fills a KV cache that is really shorter. On the way out hidden states
return to their prompt positions (zeros where tokens are gone), so callers see the shapes they know.

During decoding the caller's mask still has prompt length; hooks select the surviving columns. What
was cut is remembered per cache object, so several generations can be under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from frugalvlm.hosts import Host, host_for
from frugalvlm.hosts.base import ImageLayout
from frugalvlm.methods.base import EncoderReducer, LayerReducer, Method
from frugalvlm.trace import Trace
from frugalvlm.views import EncoderView, Kept, LayerView, Reduced, UnsupportedError

_SESSIONS: WeakKeyDictionary[PreTrainedModel, _Session] = WeakKeyDictionary()


@contextmanager
def operate(
    method: Method, model: PreTrainedModel, placeholders: Tensor | None = None
) -> Iterator[Trace]:
    """Run a model with a method; see `Method.on`."""
    host = host_for(model)
    method.check(host.shape)
    trace = Trace(host.shape.grid, host.shape.decoder_layers)
    session = _SESSIONS.get(model) or _SESSIONS.setdefault(model, _Session(host))
    session.push(method, trace, placeholders)
    try:
        yield trace
    finally:
        session.pop()
        if not session.stack:
            del _SESSIONS[model]


@dataclass
class _Cut:
    """The subset of the stream that a range of layers works on.

    Attributes:
        columns: [batch, length] stream positions, ascending; -1 is padding on the left.
        padded: whether any entry is -1.
    """

    columns: Int[Tensor, "batch length"]
    padded: bool
    kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of these layers, this call


@dataclass
class _Memory:
    """What was cut out of one prompt; lives as long as its cache."""

    prompt_length: int
    stream: Int[Tensor, "batch length"] | None = None  # prompt positions; -1 pads; None: all
    removed: Int[Tensor, " batch"] | None = None  # prompt tokens missing from the stream
    stream_length: int = 0
    cuts: dict[int, _Cut] = field(default_factory=dict)  # by first layer


@dataclass
class _Call:
    """State of one forward pass of the whole model."""

    images: list[ImageLayout] = field(default_factory=list)
    pixels: Tensor | None = None
    tower_hidden: Tensor | None = None  # what went into the feature layer's attention
    tower_keys: Tensor | None = None  # its key projection
    tower_output: Tensor | None = None  # what left the feature layer
    answer: Reduced | None = None  # what the encoder reducer said, for the trace
    reduced: Reduced | None = None  # the same, where it shortens the prompt
    projected: Tensor | None = None
    memory: _Memory | None = None
    prefill: bool = False
    visual: Tensor | None = None  # [images, visual] in the current sequence
    counts: tuple[int, ...] = ()
    lengths: list[int] = field(default_factory=list)  # real length of each row of the sequence
    last: Tensor | None = None  # [batch] last prompt token, in the current sequence
    attention_inputs: dict[int, dict[str, Any]] = field(default_factory=dict)
    raw_keys: dict[int, Tensor] = field(default_factory=dict)


class _Session:
    """All methods that are on one model, and the hooks that serve them."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.stack: list[tuple[Method, Trace, Tensor | None]] = []
        self.handles: list[Any] = []
        self.memories: WeakKeyDictionary[Any, _Memory] = WeakKeyDictionary()
        self.call = _Call()
        self.decisions: dict[int, Kept] | None = None  # inside generate(): taken once
        self.copies = 1  # sequences per prompt inside generate()

    # -- which methods are on ---------------------------------------------------------------

    def push(self, method: Method, trace: Trace, placeholders: Tensor | None) -> None:
        if isinstance(method, EncoderReducer) and self.encoder is not None:
            raise UnsupportedError(
                f"{method.key} cannot be put on top of {self.encoder.key}: both reduce tokens "
                "right behind the vision tower. Leave the outer block first."
            )
        if isinstance(method, EncoderReducer):
            self.host.feature_attention  # noqa: B018 - raises where there is no such layer
        self.stack.append((method, trace, placeholders))
        self._rehook()

    def pop(self) -> None:
        self.stack.pop()
        self.call = _Call()
        self._rehook()

    @property
    def encoder(self) -> EncoderReducer | None:
        return next((m for m, _, _ in self.stack if isinstance(m, EncoderReducer)), None)

    def reducers_before(self, layer: int) -> list[LayerReducer]:
        total = self.host.shape.decoder_layers
        return [
            m for m, _, _ in self.stack if isinstance(m, LayerReducer) and layer in m.layers(total)
        ]

    @property
    def traces(self) -> list[Trace]:
        return [trace for _, trace, _ in self.stack]

    # -- hooks ------------------------------------------------------------------------------

    def _rehook(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.host.model.__dict__.pop("generate", None)
        if all(not isinstance(m, EncoderReducer | LayerReducer) for m, _, _ in self.stack):
            return
        host = self.host
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
        total = host.shape.decoder_layers
        cut_layers = [i for i in range(total) if self.reducers_before(i)]
        layers = host.language_model.layers
        for i in cut_layers:
            self._before(layers[i - 1].self_attn, self._see_attention_inputs(i))
            self._after(layers[i - 1].self_attn.k_proj, self._see_raw_keys(i))
        for i in range(min(cut_layers, default=total), total):
            self._before(layers[i], self._enter_layer(i, i in cut_layers))
        self._after(host.language_model, self._leave_decoder, with_kwargs=True)
        host.model.generate = self._generate

    def _before(self, module: nn.Module, hook: Callable) -> None:
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable, with_kwargs: bool = False) -> None:
        self.handles.append(module.register_forward_hook(hook, with_kwargs=with_kwargs))

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate`, with decisions taken once, at the prompt, with and without a cache."""
        model = self.host.model
        config = kwargs.get("generation_config") or model.generation_config
        self.decisions = {}
        self.copies = max(
            kwargs.get(name) or getattr(config, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        )
        # Since 5.19 generate() runs the tower before the model and drops what describes the images;
        # the older path, which hands pixels to the model, is still there for models without it.
        model._supports_mm_encoder_outputs = lambda: False
        try:
            return type(model).generate(model, *args, **kwargs)
        finally:
            self.decisions, self.copies = None, 1
            model.__dict__.pop("_supports_mm_encoder_outputs", None)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The whole model starts: find the images of the prompt."""
        self.call = _Call()
        given = kwargs.get("mm_encoder_outputs") or {}
        if kwargs.get("pixel_values") is None and given.get("image") is None:
            return
        if self.encoder is not None and kwargs.get("pixel_values") is None:
            raise UnsupportedError(
                f"{self.encoder.key} works inside the vision tower: pass pixel_values, not "
                "features computed before."
            )
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise UnsupportedError(
                "An image behind an existing cache is not supported: pass the whole conversation."
            )
        self.call.images = self.host.images(self._placeholders(args, kwargs), kwargs)
        rows = [image.row for image in self.call.images]
        if self.copies > 1 and len(set(rows)) < len(rows):
            raise UnsupportedError(
                "Several images in one prompt together with beams or several returned sequences "
                "are not supported; repeat the prompt in the batch instead."
            )

    def _placeholders(self, args: tuple, kwargs: dict) -> Tensor:
        given = next((p for _, _, p in reversed(self.stack) if p is not None), None)
        if given is not None:
            return given
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.is_meta:
            raise UnsupportedError(
                "Where the image stands is read from input_ids; for inputs without values pass "
                "placeholders= to on()."
            )
        return (ids == self.host.model.config.image_token_id).cpu()

    def _see_pixels(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.call.pixels = kwargs.get("pixel_values", args[0] if args else None)

    def _see_tower_hidden(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.call.tower_hidden = kwargs.get("hidden_states", args[0] if args else None)

    def _see_tower_keys(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.call.tower_keys = output

    def _see_tower_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.call.tower_output = output if isinstance(output, Tensor) else output[0]

    def _reduce(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        """The projector starts: hand it the reduced tokens only."""
        call, host, encoder = self.call, self.host, self.encoder
        patches = args[0]
        if not call.images or encoder is None:
            return None
        if call.tower_hidden is None or call.tower_keys is None or call.tower_output is None:
            raise UnsupportedError("The vision tower did not run its feature layer.")
        attention = host.feature_attention
        view = EncoderView(
            patches=patches,
            cls=call.tower_output[:, :1] if host.shape.has_cls else None,
            grid=host.shape.grid,
            hidden=call.tower_hidden,
            queries_of=lambda rows: host.tower_heads(attention.q_proj(rows)),
            raw_keys=host.tower_heads(call.tower_keys),
            scale=host.tower_scale,
            pixels=call.pixels,
        )
        reduced = encoder.reduce(view)
        call.tower_hidden = call.tower_keys = call.tower_output = call.pixels = None
        call.answer = reduced
        if reduced.tokens.shape[1] >= patches.shape[1]:
            return None  # nothing to shorten: the model packs its features itself
        call.reduced = reduced
        return (reduced.tokens, *args[1:]), kwargs

    def _hold_projected(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """The projector is done: keep its tokens, give the model blanks of the expected shape."""
        if self.call.reduced is None:
            return None
        self.call.projected = output
        return output.new_zeros(output.shape[0], self.host.shape.patches, output.shape[-1])

    # -- the decoder ------------------------------------------------------------------------

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        call, cache = self.call, kwargs.get("past_key_values")
        if not call.images:
            call.memory = self.memories.get(cache) if cache is not None else None
            return self._continue(args, kwargs) if call.memory is not None else None
        if cache is not None and cache.is_compileable:
            raise UnsupportedError(
                "A static cache keeps room for every token, so nothing would be saved; use the "
                "default dynamic cache."
            )
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        call.prefill = True
        call.memory = _Memory(length, stream_length=length)
        call.lengths = [length] * batch
        slots = [image.slots for image in call.images]
        if call.reduced is not None:
            slots = self._shorten_prompt(embeds, kwargs)
        call.counts = tuple(len(s) for s in slots)
        width, end = max(call.counts), call.memory.stream_length
        call.visual = torch.tensor([[*s, *[end] * (width - len(s))] for s in slots]).to(
            embeds.device
        )
        call.last = _last_token(kwargs.get("attention_mask"), batch, end, embeds.device)
        for trace in self.traces:
            trace._start(call.counts)
            if call.answer is not None:
                trace._reduced(call.answer.source, call.answer.merged_into)
        return args, kwargs

    def _shorten_prompt(self, embeds: Tensor, kwargs: dict) -> list[tuple[int, ...]]:
        """Replace the prompt's embeddings, mask and positions by those of the stream.

        Returns:
            The stream positions of each image's visual tokens.
        """
        call, memory = self.call, self.call.memory
        assert memory is not None
        assert call.reduced is not None
        assert call.projected is not None
        batch, length = embeds.shape[:2]
        gone: list[set[int]] = [set() for _ in range(batch)]
        features, kept_slots = [], []
        for image in call.images:
            kept = len(image.crops) * call.reduced.tokens.shape[1]
            if kept > len(image.slots):
                raise UnsupportedError(
                    f"This image has {len(image.slots)} tokens once its padding is cut away, fewer "
                    f"than the {kept} to keep; lower the budget or use a square image."
                )
            kept_slots.append(image.slots[:kept])
            gone[image.row].update(image.slots[kept:])
            tokens = call.projected[list(image.crops)].flatten(0, 1)
            order = self.host.order(image, call.reduced)
            features.append(tokens if order is None else tokens[order])
        rows = [[i for i in range(length) if i not in gone[b]] for b in range(batch)]
        end = max(map(len, rows))
        place = [{i: end - len(r) + j for j, i in enumerate(r)} for r in rows]
        padded = [[-1] * (end - len(r)) + r for r in rows]
        stream = torch.tensor(padded).to(embeds.device)
        memory.stream, memory.stream_length = stream, end
        memory.removed = torch.tensor([length - len(r) for r in rows]).to(embeds.device)
        call.lengths = [len(r) for r in rows]
        slots = [
            tuple(place[image.row][i] for i in kept)
            for image, kept in zip(call.images, kept_slots, strict=True)
        ]
        is_visual = torch.zeros(batch, end, 1, dtype=torch.bool)
        for image, positions in zip(call.images, slots, strict=True):
            is_visual[image.row, list(positions)] = True
        # Images come in reading order, so their features fill the marked places in row order.
        short = _take(embeds, stream)
        kwargs["inputs_embeds"] = short.masked_scatter(
            is_visual.to(embeds.device), torch.cat(features).to(embeds.dtype)
        )
        has_padding = any(n != end for n in call.lengths)
        mask = kwargs.get("attention_mask")
        if mask is not None or has_padding:
            if mask is None:
                mask = torch.ones(batch, length, dtype=torch.long, device=embeds.device)
            kwargs["attention_mask"] = _select_mask(mask, stream)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = _renumber(kwargs["position_ids"], stream, call.lengths)
        return slots

    def _continue(self, args: tuple, kwargs: dict) -> tuple:
        """A later step with a cache: the caller's mask and positions count the whole prompt."""
        memory = self.call.memory
        assert memory is not None
        if memory.stream is None or memory.removed is None:
            return args, kwargs
        kwargs = dict(kwargs)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] - memory.removed[:, None]
        mask = kwargs.get("attention_mask")
        if mask is not None:
            tail = torch.arange(memory.prompt_length, mask.shape[-1], device=mask.device)
            columns = torch.cat([memory.stream, tail.expand(len(memory.stream), -1)], 1)
            kwargs["attention_mask"] = _select_columns(mask, columns)
        elif (memory.stream < 0).any():
            new = kwargs["inputs_embeds"].shape[1] + kwargs["past_key_values"].get_seq_length()
            ones = memory.stream.new_ones(len(memory.stream), new - memory.stream_length)
            kwargs["attention_mask"] = torch.cat([(memory.stream >= 0).long(), ones], 1)
        return args, kwargs

    def _see_attention_inputs(self, layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.call.prefill:
                hidden = kwargs.get("hidden_states", args[0] if args else None)
                self.call.attention_inputs[layer] = {**kwargs, "hidden_states": hidden}

        return hook

    def _see_raw_keys(self, layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if self.call.prefill:
                self.call.raw_keys[layer] = output

        return hook

    def _enter_layer(self, layer: int, cuts_here: bool) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
            call, memory = self.call, self.call.memory
            if memory is None:
                return None
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            if call.prefill and cuts_here:
                for reducer in self.reducers_before(layer):
                    hidden = self._cut(layer, reducer, hidden)
            first = max((k for k in memory.cuts if k <= layer), default=None)
            if first is None:
                return (hidden, *args[1:]), kwargs
            cut = memory.cuts[first]
            if not cut.kwargs:
                cut.kwargs = (
                    _prefill_arguments(cut, kwargs)
                    if call.prefill
                    else _decode_arguments(cut, memory, hidden, kwargs)
                )
            return (hidden, *args[1:]), {**kwargs, **cut.kwargs}

        return hook

    def _cut(self, layer: int, reducer: LayerReducer, hidden: Tensor) -> Tensor:
        """Drop visual tokens before a layer."""
        call, memory = self.call, self.call.memory
        assert memory is not None
        assert call.visual is not None
        assert call.last is not None
        device, (batch, length) = hidden.device, hidden.shape[:2]
        rows = torch.tensor([image.row for image in call.images]).to(device)
        kept = self.decisions.get(layer) if self.decisions is not None else None
        if kept is None:
            seen, raw_keys = call.attention_inputs.pop(layer), call.raw_keys.pop(layer)
            attention = self.host.language_model.layers[layer - 1].self_attn
            view = LayerView(
                layer, hidden, call.visual, call.counts,
                tuple(len(image.crops) for image in call.images), rows, call.last,
                lambda queries: self.host.attention_rows(
                    attention, seen["hidden_states"], raw_keys, seen["position_embeddings"],
                    seen.get("attention_mask"), queries,
                ),
            )  # fmt: skip
            kept = reducer.keep(view)
            if self.decisions is not None:
                self.decisions[layer] = kept
        dropped = [0] * batch
        for image, before, after in zip(call.images, call.counts, kept.counts, strict=True):
            dropped[image.row] += before - after
        call.lengths = [n - d for n, d in zip(call.lengths, dropped, strict=True)]

        chosen = call.visual.gather(1, kept.index)
        if len(set(kept.counts)) > 1:
            rank = torch.arange(chosen.shape[1], device=device)
            limit = torch.tensor(kept.counts, device=device)[:, None]
            chosen = chosen.masked_fill(rank >= limit, length)
        cuts = memory.cuts
        columns = (
            cuts[max(cuts)].columns
            if cuts
            else torch.arange(length, device=device).expand(batch, -1)
            if memory.stream is None
            else torch.arange(length, device=device).where(memory.stream >= 0, -1)
        )
        # One spare column swallows padding entries.
        stays = torch.ones(batch, length + 1, dtype=torch.bool, device=device)
        stays = stays.index_put((rows[:, None], call.visual), torch.tensor(False, device=device))
        stays = stays.index_put((rows[:, None], chosen), torch.tensor(True, device=device))
        stays = stays[:, :length] & (columns >= 0)
        end = max(call.lengths)
        order = torch.arange(length, device=device).where(stays, -1).sort(-1).values
        index = order[:, length - end :]
        short = torch.tensor([end - n for n in call.lengths]).to(device)[:, None]
        rank = stays.cumsum(-1) - 1 + short
        rank = torch.cat([rank, torch.full_like(rank[:, :1], end)], 1)
        call.visual = rank[rows].gather(1, chosen).where(chosen < length, end)
        call.last = rank.gather(1, call.last[:, None])[:, 0]
        call.counts = kept.counts
        picked = columns.gather(1, index.clamp(min=0)).where(index >= 0, -1)
        memory.cuts[layer] = _Cut(picked, padded=len(set(call.lengths)) > 1)
        for trace in self.traces:
            trace._set_from(layer, kept.counts)
            trace._cut(kept.index, kept.counts)
        return _take(hidden, index)

    def _leave_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call, memory = self.call, self.call.memory
        self.call = _Call()
        if memory is None:
            return output
        for cut in memory.cuts.values():
            cut.kwargs = {}
        if not call.prefill:
            return output
        cache = output.past_key_values
        if cache is not None:
            self.memories[cache] = memory
        if memory.cuts:
            columns = memory.cuts[max(memory.cuts)].columns
            if memory.stream is not None:
                columns = memory.stream.gather(1, columns.clamp(min=0)).where(columns >= 0, -1)
        elif memory.stream is not None:
            columns = memory.stream
        else:
            return output
        hidden = output.last_hidden_state
        back = columns.where(columns >= 0, memory.prompt_length)[..., None]
        full = hidden.new_zeros(len(hidden), memory.prompt_length + 1, hidden.shape[-1])
        full = full.scatter(1, back.expand(-1, -1, hidden.shape[-1]), hidden)
        output.last_hidden_state = full[:, : memory.prompt_length]
        return output


def _take(values: Tensor, index: Int[Tensor, "batch kept"]) -> Tensor:
    """Rows of [batch, length, width] by position; padding (-1) takes row 0, masks hide it."""
    safe = index.clamp(min=0)
    return values.gather(1, safe[..., None].expand(-1, -1, values.shape[-1]))


def _last_token(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """Position of the last real token of every row, whichever side is padded."""
    if mask is None or mask.ndim != 2:
        return torch.full((batch,), length - 1, device=device)
    return (mask[:, :length] != 0).long().mul(torch.arange(length, device=device)).argmax(-1)


def _renumber(positions: Tensor, stream: Tensor, lengths: list[int]) -> Tensor:
    """Position ids of the stream: each token moves up by what was removed before it."""
    short = torch.tensor([stream.shape[1] - n for n in lengths]).to(stream.device)[:, None]
    order = torch.arange(stream.shape[1], device=stream.device) - short
    safe = stream.clamp(min=0)
    picked = positions.expand(len(stream), -1).gather(1, safe)
    return (picked - (safe - order)).clamp(min=0)


def _forbid(mask: Tensor) -> Any:
    """The value that hides a key in a mask of this type."""
    if mask.dtype == torch.bool:
        return False
    return torch.finfo(mask.dtype).min if mask.is_floating_point() else 0


def _select_columns(mask: Tensor, columns: Int[Tensor, "batch kept"]) -> Tensor:
    """Keys of a 2-D padding mask or a 4-D mask; padding columns (-1) are hidden."""
    safe, hide = columns.clamp(min=0), columns < 0
    if mask.ndim == 2:
        return mask.gather(1, safe).masked_fill(hide, 0)
    wide = mask.expand(len(columns), -1, -1, -1)
    index = safe[:, None, None].expand(-1, *wide.shape[1:3], -1)
    return wide.gather(3, index).masked_fill(hide[:, None, None], _forbid(mask))


def _select_mask(mask: Tensor, columns: Int[Tensor, "batch kept"]) -> Tensor:
    """Keys, and for a 4-D mask queries as well, of the kept positions.

    A padding query may see itself: a row without any key would become NaN and spread.
    """
    if mask.ndim == 2:
        return _select_columns(mask, columns)
    rows = columns.clamp(min=0)[:, None, :, None]
    wide = mask.expand(len(columns), -1, -1, -1)
    wide = wide.gather(2, rows.expand(-1, wide.shape[1], -1, wide.shape[3]))
    picked = _select_columns(wide, columns)
    itself = torch.eye(columns.shape[1], dtype=torch.bool, device=columns.device)
    lonely = (columns < 0)[:, None, :, None] & itself
    return picked.masked_fill(lonely, True if mask.dtype == torch.bool else 0)


def _prefill_arguments(cut: _Cut, kwargs: dict) -> dict[str, Any]:
    """Mask, positions and rotary embeddings of a cut sequence, while the prompt is read."""
    columns = cut.columns
    mask = kwargs.get("attention_mask")
    if mask is None and cut.padded:
        mask = columns[:, None, :, None] >= columns[:, None, None, :]
        mask = mask & (columns >= 0)[:, None, None, :]
        itself = torch.eye(columns.shape[1], dtype=torch.bool, device=columns.device)
        mask = mask | ((columns < 0)[:, None, :, None] & itself)
    elif mask is not None:
        mask = _select_mask(mask, columns)
    cos, sin = kwargs["position_embeddings"]
    batch = len(columns)
    return {
        "attention_mask": mask,
        # Rotary embeddings carry the true positions; consecutive ids keep flash attention from
        # reading the gaps as packed sequences.
        "position_ids": torch.arange(columns.shape[1], device=columns.device)[None],
        "position_embeddings": (
            _take(cos.expand(batch, -1, -1), columns),
            _take(sin.expand(batch, -1, -1), columns),
        ),
    }


def _decode_arguments(cut: _Cut, memory: _Memory, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
    """The mask of a cut layer for tokens behind the prompt: surviving columns, then new ones."""
    columns, mask = cut.columns, kwargs.get("attention_mask")
    total = kwargs["past_key_values"].get_seq_length()
    new = torch.arange(memory.stream_length, total, device=columns.device)
    if mask is not None:
        if mask.ndim == 4 and mask.shape[-1] != total:
            raise UnsupportedError("Static caches are not supported; use the default cache.")
        return {"attention_mask": _select_columns(mask, torch.cat(
            [columns, new.expand(len(columns), -1)], 1))}  # fmt: skip
    if not cut.padded:
        return {"attention_mask": None}
    queries = total - hidden.shape[1] + torch.arange(hidden.shape[1], device=columns.device)
    seen = queries[:, None] >= new[None, :]
    before = (columns >= 0)[:, None, None, :].expand(-1, 1, len(queries), -1)
    after = seen[None, None].expand(len(columns), -1, -1, -1)
    return {"attention_mask": torch.cat([before, after], -1)}
