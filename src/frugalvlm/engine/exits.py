"""Early exits on an unmodified model: blocks of the decoder that a decoded token does not run.

Blocks are counted from 1. A pass *decodes* when every row brings one token to a filled cache. Any
other pass (a prompt, several tokens at once, no cache) runs all blocks, so the prompt never exits.

Each row of a batch leaves by itself, at the block where it would leave alone: its state stays what
it was there while others go on. Time is saved from the block on that nobody needs any more. Rows
that have ended and are padded by `generate` count as rows.

No hook of PyTorch can keep a module from computing. Inside the block every decoder layer therefore
has a `forward` of its own in its `__dict__`, before which all hooks run as usual, those of other
methods included; leaving the block takes it away again. Caches have full length and go on
outside the block; nothing about them is kept here, so several generations may be under way.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from frugalvlm.engine.blocks import block
from frugalvlm.engine.calls import arguments_of, cache_of, check_release
from frugalvlm.engine.generation import Entrance, as_it_is
from frugalvlm.engine.memory import kind_of
from frugalvlm.engine.threads import Crew
from frugalvlm.hosts import HOSTS, host_for, whole
from frugalvlm.hosts.base import DECODERS
from frugalvlm.methods.base import DepthPolicy
from frugalvlm.operators import operates
from frugalvlm.trace import ExitTrace
from frugalvlm.views import Shape, UnsupportedError

_BUSY: WeakSet[nn.Module] = WeakSet()  # decoders with early exits on


class Reader:
    """A decoder's blocks and the model's own output layer, which reads any of their states.

    Raises:
        UnsupportedError: for a decoder of another family.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
        family = getattr(getattr(decoder, "config", None), "model_type", type(model).__name__)
        if family not in DECODERS or model.get_output_embeddings() is None:
            raise UnsupportedError(
                f"Early exits need a language model whose decoder is one of {', '.join(DECODERS)}; "
                f"this one is '{family}'."
            )
        self.decoder = decoder
        self.layers: list[Any] = list(decoder.layers[: decoder.config.num_hidden_layers])
        self.head: Any = model.get_output_embeddings()

    def logits(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocabulary"]:
        """Final norm and output layer, for states that left any block (not normed ones)."""
        return self.head(self.decoder.norm(hidden))


@operates(DepthPolicy)
@block
def leave_early(
    method: DepthPolicy, model: PreTrainedModel, placeholders: Tensor | None = None
) -> Iterator[ExitTrace]:
    """Run a model with early exits; see `Method.on`.

    Works for vision-language and for plain language models; `placeholders` is not needed.

    Raises:
        UnsupportedError: unknown family, impossible fields, or early exits are on already.
    """
    check_release()
    model = whole(model)
    reader = Reader(model)
    known = getattr(model.config, "model_type", "") in HOSTS
    count = len(reader.layers)
    shape = host_for(model).shape if known else Shape(0, (0, 0), count, False)
    method.check(shape)
    if reader.decoder in _BUSY:
        raise UnsupportedError(
            "Early exits are on for this decoder, here or in another thread. Leave the outer block "
            "first."
        )
    session = _Session(method, reader, ExitTrace(shape.grid, count))
    _BUSY.add(reader.decoder)
    session.crew.open()
    Entrance.open(model, session.crew, as_it_is)
    try:
        session.put_on()
        yield session.trace
    finally:
        try:
            session.crew.wait()
        finally:
            session.take_off()
            Entrance.close(model, session.crew)
            session.crew.close()
            _BUSY.discard(reader.decoder)


@dataclass
class _Step:
    """One decoding pass.

    Attributes:
        left: [batch] which rows have left; `some` and `all` of them, known without a sync.
        exits: [batch] after which block.
        word: [batch] what the last block read says; `repeats`: for how many in a row before it.
        state: [batch, 1, width] what each row leaves, or goes on, with.
        memory: keys and values of the block each row left at, for copying.
    """

    left: Bool[Tensor, " batch"]
    exits: Int[Tensor, " batch"]
    word: Int[Tensor, " batch"]
    repeats: Int[Tensor, " batch"]
    state: Tensor | None = None
    memory: tuple[Tensor, Tensor] | None = None
    some: bool = False
    all: bool = False


class _Now(threading.local):
    """The decoding pass that is under way in the running thread."""

    step: _Step | None = None


class _Session:
    """Early exits that are on one decoder."""

    def __init__(self, method: DepthPolicy, reader: Reader, trace: ExitTrace) -> None:
        self.method, self.reader, self.trace = method, reader, trace
        self.crew = Crew()
        self.now = _Now()
        self.handles: list[Any] = []
        self.before: list[tuple[Any, Callable | None]] = []  # a `forward` that was there already

    def put_on(self) -> None:
        decoder = self.reader.decoder
        self.handles = [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder.register_forward_hook(self._leave),
        ]
        for number, layer in enumerate(self.reader.layers, 1):
            self.before.append((layer, layer.__dict__.get("forward")))
            layer.forward = self._block(number, layer, layer.forward)

    def take_off(self) -> None:
        for handle in self.handles:
            handle.remove()
        for layer, forward in self.before:
            del layer.forward
            if forward is not None:
                layer.forward = forward

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The decoder starts: is this a decoding pass?"""
        self.now.step = None  # a pass before may have broken off
        if not self.crew.here():
            return
        kwargs = arguments_of(module, args, kwargs)
        cache, tokens = cache_of(kwargs), kwargs.get("inputs_embeds")
        tokens = kwargs.get("input_ids") if tokens is None else tokens
        if cache is None or tokens is None:
            return
        if kind_of(cache) is not DynamicCache:
            raise UnsupportedError(
                f"Early exits cannot write into a {kind_of(cache).__name__}; "
                "use the default dynamic cache."
            )
        if cache.get_seq_length() == 0 or tokens.shape[1] != 1:
            return
        zeros = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        exits = torch.full_like(zeros, len(self.reader.layers))
        self.now.step = _Step(zeros.bool(), exits, zeros - 1, zeros)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The decoder is done."""
        if self.now.step is not None:
            self.trace.exits.append(self.now.step.exits.tolist())
        self.now.step = None

    def _block(self, number: int, layer: Any, run: Callable) -> Callable:
        """The `forward` of a block: the true one, or its part in the cache alone."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            step = self.now.step
            if step is None:
                return run(hidden_states, *args, **kwargs)
            if step.all and self.method.kv_copy != "recompute":
                keys_values = step.memory or _project(layer, hidden_states, kwargs)
                cache_of(kwargs).update(*keys_values, layer.self_attn.layer_idx)
                return hidden_states
            output = run(hidden_states, *args, **kwargs)
            return self._after(step, number, layer, output, cache_of(kwargs))

        return forward

    def _after(
        self, step: _Step, number: int, layer: Any, output: Tensor, cache: DynamicCache
    ) -> Tensor:
        """A block has run: rows that left before it stay what they were; others may leave."""
        left = step.left[:, None, None]
        state = step.state if step.state is not None and step.some else output
        step.state = torch.where(left, state, output) if step.some else output
        if self.method.kv_copy == "keys_values":
            filled = cache.layers[layer.self_attn.layer_idx]
            now = filled.keys[:, :, -1:], filled.values[:, :, -1:]
            if step.memory is not None and step.some:
                for new, old in zip(now, step.memory, strict=True):
                    new.copy_(torch.where(left[..., None], old, new))
            step.memory = now
        last = number == len(self.reader.layers)
        if self.method.first_layer <= number and not last and not step.all:
            self._ask(step, number)
        # Recomputing rows go on with their true state, and show at the end what they left with.
        return output if self.method.kv_copy == "recompute" and not last else step.state

    def _ask(self, step: _Step, number: int) -> None:
        """Read the block's states and let rows go."""
        assert step.state is not None
        logits = self.reader.logits(step.state[:, -1])
        word = logits.argmax(-1)
        step.repeats = (step.repeats + 1).where(word == step.word, 0)
        step.word = word
        leaving = self.method.fires(self.method.score(logits, step.repeats)) & ~step.left
        step.exits = step.exits.where(~leaving, number)
        step.left = step.left | leaving
        flags = step.left.tolist()
        step.some, step.all = any(flags), all(flags)


def _project(layer: Any, hidden: Tensor, kwargs: dict) -> tuple[Tensor, Tensor]:
    """The keys and values that a block would write for this state, at the token's position."""
    attention = layer.self_attn
    states = layer.input_layernorm(hidden)
    keys = attention.k_proj(states).unflatten(-1, (-1, attention.head_dim))
    values = attention.v_proj(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    keys = getattr(attention, "k_norm", nn.Identity())(keys).transpose(1, 2)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(keys, keys, *kwargs["position_embeddings"])[1], values
