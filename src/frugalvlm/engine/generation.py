"""`generate` inside a block: decisions are taken once, at the prompt, with and without a cache."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from frugalvlm.engine.calls import cache_of
from frugalvlm.engine.memory import memory_of
from frugalvlm.engine.state import State
from frugalvlm.engine.threads import Crew
from frugalvlm.views import UnsupportedError

# Settings under which `generate` cuts a cache, or a prompt, at prompt positions.
_BY_POSITION = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")
_ENTRANCES: WeakKeyDictionary[nn.Module, Entrance] = WeakKeyDictionary()
_LOCK = threading.RLock()
_GIVEN = threading.local()  # `prompts`: by model, what the running thread gave to `generate`
_GENERATING: WeakKeyDictionary[nn.Module, Counter[int]] = WeakKeyDictionary()  # by thread

Runner = Callable[..., Any]  # what `generate` does: (plain generate, args, kwargs)


class Entrance:
    """A model's `generate` while blocks are open on it, one for all of them.

    Attributes:
        model: whose.
        own: a `generate` that was set on this very model before; None: its class's.
        guests: the threads of every open block, and what `generate` is for them.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.own: Callable | None = model.__dict__.get("generate")
        self.guests: dict[Crew, Runner] = {}
        self._late: WeakSet[threading.Thread] = WeakSet()  # started in blocks that were left
        self._function = lambda *args, **kwargs: self.generate(*args, **kwargs)

    @staticmethod
    def open(model: Any, crew: Crew, runner: Runner) -> None:
        """Let a block's threads in."""
        with _LOCK:
            entrance = _ENTRANCES.get(model)
            if entrance is None:
                entrance = _ENTRANCES[model] = Entrance(model)
                model.generate = entrance._function
            entrance.guests[crew] = runner

    @staticmethod
    def close(model: Any, crew: Crew) -> None:
        """No more; the last block leaves the model's `generate` as it was."""
        with _LOCK:
            entrance = _ENTRANCES[model]
            entrance.guests.pop(crew)
            for thread in crew.started():
                entrance._late.add(thread)
            if entrance.guests:
                return
            del _ENTRANCES[model]
            if model.__dict__.get("generate") is entrance._function:
                del model.generate
                if entrance.own is not None:
                    model.generate = entrance.own

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """For the threads of a block what its methods make of it; for others the model's own."""
        here = {crew: runner for crew, runner in list(self.guests.items()) if crew.here()}
        if not here and threading.current_thread() in self._late:
            raise UnsupportedError(
                "The block in which this thread was started was left before it called generate: "
                "join the thread inside the block."
            )
        with ExitStack() as stack:
            run = self.plain
            for crew, runner in here.items():
                stack.enter_context(crew.busy())
                run = _around(run, runner)
            return run(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.model).generate(self.model, *args, **kwargs)


def _around(inner: Callable, runner: Runner) -> Callable:
    return lambda *args, **kwargs: runner(inner, args, kwargs)


def as_it_is(plain: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """For blocks that leave `generate` alone."""
    return plain(*args, **kwargs)


def watched(state: State, plain: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The untouched model's `generate`, for blocks that only look on."""
    now = state.now
    now.copies = _copies(_setting(state.host.model, args, kwargs))
    now.described = kwargs
    try:
        return plain(*args, **kwargs)
    finally:
        now.copies, now.described = 1, None


def generate(state: State, plain: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The model's `generate` under the methods of a session.

    Args:
        state: of the session.
        plain: the model's own `generate`.
        args: what the caller passed.
        kwargs: likewise.

    Raises:
        UnsupportedError: for a way to generate that does not go with a shortened prompt.
    """
    model, now = state.host.model, state.now
    setting = _setting(model, args, kwargs)
    for name in _BY_POSITION:
        if setting(name):
            raise UnsupportedError(
                f"generate({name}=...) takes the cache apart by prompt positions, which are "
                "not those of a shortened prompt; leave it out."
            )
    now.decisions = {}
    now.copies = _copies(setting)
    memory = memory_of(cache_of(kwargs))
    ids: Any = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    mask = kwargs.get("attention_mask")
    if memory is not None and (mask is None or mask.shape[1] == ids.shape[1]):
        # A whole conversation: generate() skips as many tokens as the shorter cache holds.
        now.surplus = memory.prompt_length - memory.stream_length
    now.tower, now.generating = [], True
    prompts = _GIVEN.__dict__.setdefault("prompts", {})
    prompts[id(model)] = {**kwargs, "input_ids": ids}
    # Where pixels are not one row per picture, beams would take them apart: features go instead.
    behind = state.host.behind_projector
    try:
        with nullcontext() if behind else _pixels_to_the_model(model):
            return plain(*args, **kwargs)
    finally:
        now.decisions, now.copies, now.surplus = None, 1, 0
        now.tower, now.generating = [], False
        prompts.pop(id(model), None)


def given_prompt(model: Any) -> dict[str, Any] | None:
    """What the running thread gave to a model's `generate`, while that is under way."""
    return _GIVEN.__dict__.get("prompts", {}).get(id(model))


def _setting(model: Any, args: tuple, kwargs: dict[str, Any]) -> Callable[[str], Any]:
    """The settings of a call of `generate`, by name."""
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    config = given or model.generation_config
    return lambda name: kwargs.get(name) or getattr(config, name, None)


def _copies(setting: Callable[[str], Any]) -> int:
    """Sequences per prompt."""
    return max(setting("num_beams") or 1, setting("num_return_sequences") or 1)


@contextmanager
def _pixels_to_the_model(model: Any) -> Iterator[None]:
    """The running thread's `generate` hands pixels to the model.

    Since 5.19 generate() runs the tower before the model and drops what describes the images; the
    older path is still there for models without it. Other threads go on as they are.
    """
    thread = threading.get_ident()

    def supports() -> bool:
        if _GENERATING[model][threading.get_ident()]:
            return False
        return type(model)._supports_mm_encoder_outputs(model)

    with _LOCK:
        if model not in _GENERATING:
            _GENERATING[model] = Counter()
            model._supports_mm_encoder_outputs = supports
        _GENERATING[model][thread] += 1
    try:
        yield
    finally:
        with _LOCK:
            _GENERATING[model] -= Counter([thread])  # entries of 0 go
            if not _GENERATING[model]:
                del _GENERATING[model], model._supports_mm_encoder_outputs
