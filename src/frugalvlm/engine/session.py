"""Putting methods on an unmodified model, with module hooks only.

Coordinates: *prompt* positions are those of the caller's input. An encoder reducer turns the prompt
into a shorter *stream* (what the decoder's first layer reads; encoder.py). Before layer k a layer
reducer picks a subset of the stream (decoder.py). On the way out hidden states return to their
prompt positions, so callers see the shapes they know; a token that is gone shows the state of the
last surviving token before it, which is what predicts the next token.

During decoding the caller's mask still has prompt length; hooks select the surviving columns. What
was cut is remembered on the cache object (state.py), so several generations can be under way, and a
copy of a cache knows as much as the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from frugalvlm.engine.decoder import DecoderHooks
from frugalvlm.engine.encoder import EncoderHooks
from frugalvlm.engine.generation import generate
from frugalvlm.engine.prompt import enter
from frugalvlm.engine.state import Call, Entry, State
from frugalvlm.hosts import Host, host_for
from frugalvlm.methods.base import EncoderReducer, LayerReducer, Method
from frugalvlm.operators import operates
from frugalvlm.trace import Trace
from frugalvlm.views import UnsupportedError

_SESSIONS: WeakKeyDictionary[PreTrainedModel, Session] = WeakKeyDictionary()


@operates(Method)
@contextmanager
def operate(
    method: Method, model: PreTrainedModel, placeholders: Tensor | None = None
) -> Iterator[Trace]:
    """Run a model with a method; see `Method.on`."""
    host = host_for(model)
    method.check(host.shape)
    entry = Entry(method, Trace(host.shape.grid, host.shape.decoder_layers), placeholders)
    session = _SESSIONS.setdefault(model, Session(host))
    try:
        session.put_on(entry)
        yield entry.trace
    finally:
        session.take_off(entry)
        if not session.state.entries:
            _SESSIONS.pop(model, None)


class Session:
    """All methods that are on one model, and the hooks that serve them."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.state = State(host)
        self.handles: list[Any] = []
        self.own_generate: Callable | None = None  # one that was set on this very model before

    def put_on(self, entry: Entry) -> None:
        """One more method.

        Raises:
            UnsupportedError: when it does not go with the model or with those that are on.
        """
        method, total = entry.method, self.host.shape.decoder_layers
        if isinstance(method, EncoderReducer):
            if self.state.encoder is not None:
                raise UnsupportedError(
                    f"{method.key} cannot be put on top of {self.state.encoder.key}: both reduce "
                    "tokens right behind the vision tower. Leave the outer block first."
                )
            self.host.feature_attention  # noqa: B018 - raises where there is no such layer
        if isinstance(method, LayerReducer):
            _check_cuts(method, self.state.cut_at, total)
        self.state.entries.append(entry)
        self._rehook()

    def take_off(self, entry: Entry) -> None:
        """One method less."""
        self.state.entries = [e for e in self.state.entries if e is not entry]
        self.state.now.call = Call()
        self._rehook()

    def _rehook(self) -> None:
        host, state = self.host, self.state
        methods = [entry.method for entry in state.entries]
        total = host.shape.decoder_layers
        if self.handles:
            host.model.__dict__.pop("generate", None)
            if self.own_generate is not None:
                host.model.generate = self.own_generate
        for handle in self.handles:
            handle.remove()
        self.handles = []
        state.encoder = next((m for m in methods if isinstance(m, EncoderReducer)), None)
        state.cut_at = {
            i: m for m in methods if isinstance(m, LayerReducer) for i in m.layers(total)
        }
        if state.encoder is None and not state.cut_at:
            return
        self._hook_model()
        self.own_generate = host.model.__dict__.get("generate")
        host.model.generate = self._generate

    def _hook_model(self) -> None:
        host, state = self.host, self.state
        encoder, decoder = EncoderHooks(state), DecoderHooks(state)
        layers, total = host.language_model.layers, host.shape.decoder_layers
        self._before(host.inner, partial(enter, state))
        self._before(host.language_model, decoder.enter)
        if state.encoder is not None:
            attention = host.feature_attention
            self._before(host.tower, encoder.see_pixels)
            self._before(attention, encoder.see_hidden)
            self._after(attention.k_proj, encoder.see_keys)
            self._after(host.feature_module, encoder.see_output)
            self._before(host.projector, encoder.reduce)
            self._after(host.projector, encoder.hold_projected)
        for i in state.cut_at:
            self._before(layers[i - 1].self_attn, decoder.see_attention_inputs)
            self._after(layers[i - 1].self_attn.k_proj, decoder.see_raw_keys)
        for i in range(min(state.cut_at, default=total), total):
            self._before(layers[i], decoder.enter_layer(i))
        self._after(host.language_model, decoder.leave)

    def _before(self, module: nn.Module, hook: Callable) -> None:
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable) -> None:
        self.handles.append(module.register_forward_hook(hook))

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return generate(self.state, self.own_generate, args, kwargs)


def _check_cuts(method: LayerReducer, cut_at: dict[int, LayerReducer], total: int) -> None:
    """The layers a method cuts before must be there, and free."""
    for layer in method.layers(total):
        if not 1 <= layer < total:
            raise UnsupportedError(
                f"{method.key} cuts before layer {layer}; possible are 1 to {total - 1}."
            )
        if layer in cut_at:
            raise UnsupportedError(
                f"{method.key} and {cut_at[layer].key} both cut before layer {layer}."
            )
    for other in cut_at.values():
        if method.masks_only or other.masks_only:
            raise UnsupportedError(
                f"{method.key} and {other.key} do not go together: one only hides tokens, "
                "which the other would have to find again. Leave the outer block first."
            )
