"""Putting methods on an unmodified model, with module hooks only.

Coordinates: *prompt* positions are those of the caller's input. An encoder reducer turns the prompt
into a shorter *stream* (what the decoder's first layer reads; encoder.py). Before layer k a layer
reducer picks a subset of the stream (decoder.py). On the way out hidden states return to their
prompt positions, so callers see the shapes they know; a token that is gone shows the state of the
last surviving token before it, which is what predicts the next token.

During decoding the caller's mask still has prompt length; hooks select the surviving columns. What
was cut is remembered on the cache object (memory.py), so several generations can be under way, and
a copy of a cache knows as much as the original.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from frugalvlm.engine.blocks import block
from frugalvlm.engine.calls import check_release
from frugalvlm.engine.decoder import DecoderHooks
from frugalvlm.engine.encoder import EncoderHooks
from frugalvlm.engine.generation import Entrance, as_it_is, generate, watched
from frugalvlm.engine.memory import serve
from frugalvlm.engine.prompt import enter, watch
from frugalvlm.engine.state import Call, Entry, State
from frugalvlm.engine.threads import Crew
from frugalvlm.engine.units import TowerHooks
from frugalvlm.hosts import Host, UnitHost, host_for
from frugalvlm.methods.base import EncoderReducer, LayerReducer, Method
from frugalvlm.operators import operates
from frugalvlm.trace import Trace
from frugalvlm.views import UnsupportedError

_SESSIONS: WeakKeyDictionary[PreTrainedModel, list[Session]] = WeakKeyDictionary()
_LOCK = threading.RLock()


@operates(Method)
@block
def operate(
    method: Method, model: PreTrainedModel, placeholders: Tensor | None = None
) -> Iterator[Trace]:
    """Run a model with a method; see `Method.on`.

    Raises:
        UnsupportedError: for a model, or a place in the program, that cannot be served.
    """
    check_release()
    host = host_for(model)
    if method.picture_share is not None and not host.shape.varies:
        method = method.fitted(host.shape.patches)
    method.check(host.shape)
    entry = Entry(method, Trace(host.shape.grid, host.shape.decoder_layers), placeholders)
    session = _session_here(host)
    try:
        session.put_on(entry)
        yield entry.trace
    finally:
        session.take_off(entry)


def _session_here(host: Host) -> Session:
    """The running thread's session of a model: blocks inside each other share one."""
    with _LOCK:
        open_ones = _SESSIONS.setdefault(host.model, [])
        for session in open_ones:
            if session.crew.here():
                if session.crew.leads():
                    return session
                raise UnsupportedError(
                    "This thread, or task of asyncio, was started inside a block on this model and "
                    "belongs to it: open further blocks in the thread that opened that one."
                )
        session = Session(host)
        open_ones.append(session)
        return session


class Session:
    """The methods that one thread has put on one model, and the hooks that serve them.

    Hooks see the passes of the session's own threads only; the model's other users are untouched.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.state = State(host)
        self.crew = Crew()
        self.handles: list[Any] = []
        self.crew.open()
        Entrance.open(host.model, self.crew, as_it_is)

    def put_on(self, entry: Entry) -> None:
        """One more method, once no other thread of the outer block generates.

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
            if not self.host.behind_projector:
                self.host.feature_attention  # noqa: B018 - raises where there is no such layer
        if isinstance(method, LayerReducer):
            self.host.check_decoder()
            _check_cuts(method, self.state.cut_at, total)
        self.crew.wait()
        self.state.entries.append(entry)
        self._rehook()

    def take_off(self, entry: Entry) -> None:
        """One method less, once no other thread of the block generates any more."""
        try:
            self.crew.wait()
        finally:
            state = self.state
            state.entries = [e for e in state.entries if e is not entry]
            state.now.call = Call()
            serve(None)
            self._rehook()
            if not state.entries:
                self._close()

    def _close(self) -> None:
        Entrance.close(self.host.model, self.crew)
        self.crew.close()
        with _LOCK:
            others = [s for s in _SESSIONS[self.host.model] if s is not self]
            _SESSIONS[self.host.model] = others
            if not others:
                del _SESSIONS[self.host.model]

    def _rehook(self) -> None:
        state, total = self.state, self.host.shape.decoder_layers
        methods = [entry.method for entry in state.entries]
        for handle in self.handles:
            handle.remove()
        self.handles = []
        state.encoder = next((m for m in methods if isinstance(m, EncoderReducer)), None)
        state.cut_at = {
            i: m for m in methods if isinstance(m, LayerReducer) for i in m.layers(total)
        }
        acts = state.encoder is not None or state.cut_at
        if acts:
            self._hook_model()
        elif methods:
            self._before(self.host.inner, partial(watch, state))
        runner = partial(generate if acts else watched, state)
        Entrance.open(self.host.model, self.crew, runner)

    def _hook_model(self) -> None:
        host, state = self.host, self.state
        encoder, decoder = EncoderHooks(state), DecoderHooks(state)
        layers, total = host.language_model.layers, host.shape.decoder_layers
        self._before(host.inner, partial(enter, state))
        self._before(host.language_model, decoder.enter)
        if isinstance(host, UnitHost):
            tower = TowerHooks(state)
            self._before(host.tower, tower.start)
            for name, module in host.read.items() if state.encoder is not None else ():
                self._behind(module, tower.see(name))
            for i in range(host.plane_layers):
                follows = layers[i + 1] if i + 1 < total else host.language_model.norm
                self._before(follows, decoder.add_plane(i))
        elif state.encoder is not None:
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
        hook = self._of_the_crew(hook)
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, hook: Callable) -> None:
        self.handles.append(module.register_forward_hook(self._of_the_crew(hook)))

    def _behind(self, module: nn.Module, hook: Callable) -> None:
        hook = self._of_the_crew(hook)
        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _of_the_crew(self, hook: Callable) -> Callable:
        here = self.crew.here
        return lambda *args: hook(*args) if here() else None


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
