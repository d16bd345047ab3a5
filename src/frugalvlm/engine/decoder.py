"""Inside the decoder: the stream, the cuts before layers, and the way back to prompt positions.

Each layer behind a cut gets hidden states, mask, positions and rotary embeddings of the subset that
is left, and fills a KV cache that is really shorter (or, where the method only masks, gets the same
sequence with some keys hidden). On the way out hidden states return to their prompt positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from frugalvlm.engine.calls import cache_left_by, cache_of
from frugalvlm.engine.encoder import merged_into, origins, shortened
from frugalvlm.engine.memory import Memory, memory_of, remember, serve
from frugalvlm.engine.state import Call, State
from frugalvlm.engine.subset import (
    Subset,
    compose,
    decode_arguments,
    hidden_keys,
    prefill_arguments,
)
from frugalvlm.hosts.base import FamilyModule
from frugalvlm.methods.base import LayerReducer
from frugalvlm.views import Kept, LayerView, Text, UnsupportedError


class DecoderHooks:
    """Hooks on the decoder and its layers."""

    def __init__(self, state: State) -> None:
        self.state = state

    def enter(self, module: FamilyModule, args: tuple, kwargs: dict) -> tuple | None:
        """The decoder starts: shorten the prompt, or the mask of a later step."""
        state, call, cache = self.state, self.state.call, cache_of(kwargs)
        serve(cache)
        if not call.images:
            call.memory = memory_of(cache)
            if call.memory is not None:
                return args, later_step(state, call.memory, kwargs)
            if cache is None or cache.get_seq_length() == 0:
                for entry in state.entries:
                    entry.note_prompt(call)
            return None
        if state.cut_at and module.training and getattr(module, "gradient_checkpointing", False):
            raise UnsupportedError(
                "Cuts inside the decoder do not go with gradient checkpointing; switch it off."
            )
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        kwargs, call.planes = state.host.planes(kwargs)
        call.prefill, call.memory = True, Memory(length)
        kwargs, slots = shortened(state, embeds, kwargs) or (
            kwargs,
            [image.slots for image in call.images],
        )
        call.counts, call.slots = tuple(map(len, slots)), slots
        call.embeds = kwargs["inputs_embeds"] if state.cut_at else None
        call.present = call.real if call.present is None else call.present
        end = call.memory.stream_length
        visual = nn.utils.rnn.pad_sequence(slots, batch_first=True, padding_value=end)
        call.visual = visual.to(embeds.device)
        call.last = _last_token(kwargs.get("attention_mask"), batch, end, embeds.device)
        stands_for = origins(state.host, call)
        for entry in state.entries:
            entry.note_prompt(call, call.counts, stands_for, merged_into(call))
        return args, kwargs

    def see_attention_inputs(self, module: FamilyModule, args: tuple, kwargs: dict) -> None:
        """What goes into the attention of the layer before a cut."""
        if self.state.call.prefill:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            self.state.call.attention_inputs = {**kwargs, "hidden_states": hidden}

    def see_raw_keys(self, module: FamilyModule, args: tuple, output: Tensor) -> None:
        """Its key projection."""
        if self.state.call.prefill:
            self.state.call.raw_keys = output

    def enter_layer(self, layer: int) -> Callable:
        """A hook for a layer behind (or at) a cut: hidden states and arguments of the subset."""

        def hook(module: FamilyModule, args: tuple, kwargs: dict) -> tuple | None:
            call, memory = self.state.call, self.state.call.memory
            if memory is None:
                return None
            kwargs = dict(kwargs)
            hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            if call.prefill and layer in self.state.cut_at:
                hidden = cut(self.state, layer, hidden)
            first = max((k for k in (*memory.cuts, *memory.hidden) if k <= layer), default=None)
            if first is None:
                return None
            if first not in call.layer_kwargs:
                call.layer_kwargs[first] = layer_arguments(
                    self.state, module, first, hidden, kwargs
                )
            return (hidden, *args[1:]), {**kwargs, **call.layer_kwargs[first]}

        return hook

    def add_plane(self, layer: int) -> Callable:
        """A hook for what follows a layer to whose output the model adds something.

        In front of the next module, so that recorded hidden states are the untouched model's.
        """

        def hook(module: FamilyModule, args: tuple, kwargs: dict) -> tuple | None:
            call = self.state.call
            if not call.prefill or layer >= len(call.planes):
                return None
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            assert call.memory is not None
            plane = call.planes[layer]
            cuts = [first for first in call.memory.cuts if first <= layer]
            if cuts:
                plane = call.memory.cuts[max(cuts)].take(plane)
            more = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            return (hidden + plane.to(hidden.device, hidden.dtype), *args[1:]), more

        return hook

    def leave(self, module: FamilyModule, args: tuple, output: Any) -> Any:
        """The decoder is done: remember the cuts on the cache, restore the prompt's shape."""
        call, memory = self.state.call, self.state.call.memory
        self.state.now.call = Call()
        if not self.state.now.generating:
            self.state.now.tower = []
        serve(None)
        if memory is None:
            return output
        if output.get("attentions") is not None:
            output.attentions = tuple(
                None if maps is None else _spread_maps(memory, maps, layer, call.prefill)
                for layer, maps in enumerate(output.attentions)
            )
        if not call.prefill:
            return output
        touched = memory.cuts or memory.hidden or memory.stream is not None
        cache = cache_left_by(output)
        if cache is not None and touched:
            remember(cache, memory)
        output.last_hidden_state = _spread(memory, output.last_hidden_state, math.inf)
        if output.get("hidden_states") is not None:  # of the embeddings, then of every layer
            output.hidden_states = tuple(
                None if hidden is None else _spread(memory, hidden, place - 1)
                for place, hidden in enumerate(output.hidden_states)
            )
        return output


def _spread(memory: Memory, hidden: Tensor, layer: float) -> Tensor:
    """What left a layer, back at the positions of the prompt."""
    cuts = [first for first in memory.cuts if first <= layer]
    if cuts:
        hidden = memory.cuts[max(cuts)].spread(hidden)
    return hidden if memory.stream is None else memory.stream.spread(hidden)


def _spread_maps(memory: Memory, maps: Tensor, layer: int, prefill: bool) -> Tensor:
    """A layer's attention maps, with a column for every position of the prompt."""
    cuts = [first for first in memory.cuts if first <= layer]
    for subset in (memory.cuts[max(cuts)] if cuts else None, memory.stream):
        if subset is not None:
            maps = subset.spread_maps(maps, prefill)
    return maps


def later_step(state: State, memory: Memory, kwargs: dict) -> dict:
    """The decoder's arguments in a step with a cache: the caller's count the whole prompt.

    Raises:
        UnsupportedError: for a cache, or a mask, that is not what the prompt left.
    """
    cache, kwargs = cache_of(kwargs), dict(kwargs)
    past, batch = cache.get_seq_length(), len(kwargs["inputs_embeds"])
    _check_cache(state.cut_at, memory, cache, past, batch)
    stream = memory.stream
    if stream is None:
        return kwargs
    if state.now.surplus:
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"][:, state.now.surplus :]
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][..., state.now.surplus :]
    state.now.surplus = 0
    fed = kwargs["inputs_embeds"].shape[1]
    new = past - memory.stream_length + fed
    kwargs["position_ids"] = _later_positions(state, memory, kwargs.get("position_ids"), past, fed)
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


def _later_positions(
    state: State, memory: Memory, positions: Tensor | None, past: int, fed: int
) -> Tensor | None:
    """Position ids of tokens behind a shortened prompt."""
    assert memory.removed is not None
    if not state.host.keeps_positions:
        return None if positions is None else positions - memory.removed
    if positions is None:  # the decoder would count from what the cache holds
        return torch.arange(past, past + fed, device=memory.removed.device) + memory.removed
    if state.call.positions:
        return positions
    return positions + memory.removed  # the model counted from there


def _check_cache(
    cut_at: dict[int, LayerReducer], memory: Memory, cache: Any, past: int, batch: int
) -> None:
    """A cache must be what the prompt left, and the methods those that read it."""
    masking = {layer for layer, method in cut_at.items() if method.masks_only}
    cutting = cut_at.keys() - masking
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


def layer_arguments(
    state: State, module: FamilyModule, first: int, hidden: Tensor, kwargs: dict
) -> dict[str, Any]:
    """What layers get instead of the stream's arguments, from a cut to the next.

    Raises:
        UnsupportedError: where tokens are hidden by masks that the kernel does not take.
    """
    call, memory = state.call, state.call.memory
    assert memory is not None
    flash = "flash" in (module.self_attn.config._attn_implementation or "")
    if first in memory.hidden:
        if flash:
            raise UnsupportedError(
                f"{state.cut_at[first].key} hides tokens by masks that flash attention does not "
                "take; load the model with attn_implementation='sdpa'."
            )
        return {"attention_mask": hidden_keys(memory.hidden[first], hidden, kwargs)}
    make = prefill_arguments if call.prefill else decode_arguments
    rotary = state.host.language_model.rotary_emb
    return make(memory.cuts[first], hidden, kwargs, flash, rotary)


def cut(state: State, layer: int, hidden: Tensor) -> Tensor:
    """Drop or hide visual tokens before a layer."""
    call, memory, method = state.call, state.call.memory, state.cut_at[layer]
    assert memory is not None
    assert call.real is not None
    before = memory.cuts[max(memory.cuts)] if memory.cuts else memory.stream
    real = call.real.to(hidden.device) if before is None else before.columns >= 0
    rows = torch.tensor([image.row for image in call.images]).to(hidden.device)
    decisions = state.now.decisions
    kept = decisions.get(layer) if decisions is not None else None
    if kept is None:
        kept = _keep(state, method, _layer_view(state, layer, hidden, rows, real))
        if decisions is not None:
            decisions[layer] = kept
    call.attention_inputs, call.raw_keys = {}, None
    for entry in state.entries:
        entry.note_cut(call, layer, kept, method.masks_only)
    if kept.counts == call.counts and kept.values is None:
        return hidden
    return _apply(state, memory, layer, kept, hidden, rows, before, real)


def _keep(state: State, method: LayerReducer, view: LayerView) -> Kept:
    """What a method keeps of every image; images of one size are asked for together."""
    if not state.host.shape.varies:
        return method.keep(view)
    sizes = [state.host.patches(image) for image in state.call.images]
    groups = {size: [i for i, own in enumerate(sizes) if own == size] for size in sizes}
    answers = {size: method.fitted(size).keep(view.of(own, size)) for size, own in groups.items()}
    if len(answers) == 1:
        return next(iter(answers.values()))
    return _joined(view, groups, answers)


def _joined(view: LayerView, groups: dict[int, list[int]], answers: dict[int, Kept]) -> Kept:
    """Answers for some images each as one for all."""
    if any(answer.values is not None for answer in answers.values()):
        answers = {
            size: _with_values(view.of(groups[size], size), answer)
            for size, answer in answers.items()
        }
    places = {
        image: (answer, row)
        for size, answer in answers.items()
        for row, image in enumerate(groups[size])
    }
    whose = [places[image] for image in sorted(places)]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    counts = tuple(answer.counts[row] for answer, row in whose)

    def rows(name: str) -> list[Tensor]:
        return [
            getattr(answer, name)[row, :count]
            for (answer, row), count in zip(whose, counts, strict=True)
        ]

    index = pad(rows("index"))
    if whose[0][0].values is None:
        return Kept(index, counts)
    return Kept(index, counts, pad(rows("values")), pad(rows("holds")))


def _with_values(view: LayerView, kept: Kept) -> Kept:
    """The same answer, with the states that places hold, their own where it makes none."""
    if kept.values is not None:
        return kept
    index = kept.index[..., None].expand(-1, -1, view.hidden.shape[-1])
    return replace(kept, values=view.tokens.gather(1, index), holds=kept.index)


def _layer_view(state: State, layer: int, hidden: Tensor, rows: Tensor, real: Tensor) -> LayerView:
    """What a method may look at before it cuts."""
    call, host = state.call, state.host
    assert call.visual is not None
    assert call.last is not None
    assert call.raw_keys is not None
    seen, raw_keys = call.attention_inputs, call.raw_keys
    attention = host.language_model.layers[layer - 1].self_attn
    return LayerView(
        layer, hidden, call.visual, call.counts, call.crops, host.shape.patches, rows, call.last,
        lambda queries, temperature=1.0: host.attention_rows(
            attention, seen["hidden_states"], raw_keys, seen["position_embeddings"],
            seen.get("attention_mask"), queries, temperature,
        ),
        host.shape.decoder_layers, tuple(map(len, call.slots)), real, lambda: _text(call),
    )  # fmt: skip


def _apply(
    state: State, memory: Memory, layer: int, kept: Kept, hidden: Tensor, rows: Tensor,
    before: Subset | None, real: Tensor,
) -> Tensor:  # fmt: skip
    """The hidden states that are left, and what is remembered of the others."""
    call, method = state.call, state.cut_at[layer]
    assert call.visual is not None
    assert call.last is not None
    assert call.real is not None
    device, (batch, length) = hidden.device, hidden.shape[:2]
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
    if method.renumbers and not state.host.keeps_positions:
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


def _text(call: Call) -> Text:
    """The text behind the images, with its places in the sequence; looked for once."""
    memory = call.memory
    assert memory is not None
    call.text = call.text or _text_of_stream(call)
    if not memory.cuts:
        return call.text
    landing = memory.cuts[max(memory.cuts)].landing
    # What fills up the rows of fewer words may be gone, and would land in front of the sequence.
    return replace(call.text, index=landing.gather(1, call.text.index).clamp(min=0))


def _text_of_stream(call: Call) -> Text:
    """The same with its places in the stream; looked for on the CPU."""
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


def _last_token(
    mask: Tensor | None, batch: int, length: int, device: torch.device
) -> Int[Tensor, " batch"]:
    """Position of the last real token of every row, whichever side is padded."""
    if mask is None or mask.ndim != 2:
        return torch.full((batch,), length - 1, device=device)
    return (mask[:, :length] != 0).long().mul(torch.arange(length, device=device)).argmax(-1)
