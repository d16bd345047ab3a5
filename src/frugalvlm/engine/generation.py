"""`generate` inside a block: decisions are taken once, at the prompt, with and without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frugalvlm.engine.state import State, memory_of
from frugalvlm.views import UnsupportedError

# Settings under which `generate` cuts a cache, or a prompt, at prompt positions.
_BY_POSITION = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")


def generate(state: State, own: Callable | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The model's `generate` under the methods of a session.

    Args:
        state: of the session.
        own: a `generate` that was set on this very model before; None: its class's.
        args: what the caller passed.
        kwargs: likewise.

    Raises:
        UnsupportedError: for a way to generate that does not go with a shortened prompt.
    """
    model, now = state.host.model, state.now
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    config = given or model.generation_config

    def setting(name: str) -> Any:
        return kwargs.get(name) or getattr(config, name, None)

    for name in _BY_POSITION:
        if setting(name):
            raise UnsupportedError(
                f"generate({name}=...) takes the cache apart by prompt positions, which are "
                "not those of a shortened prompt; leave it out."
            )
    now.decisions = {}
    now.copies = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
    memory = memory_of(kwargs.get("past_key_values"))
    ids: Any = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    mask = kwargs.get("attention_mask")
    if memory is not None and (mask is None or mask.shape[1] == ids.shape[1]):
        # A whole conversation: generate() skips as many tokens as the shorter cache holds.
        now.surplus = memory.prompt_length - memory.stream_length
    # Since 5.19 generate() runs the tower before the model and drops what describes the images;
    # the older path, which hands pixels to the model, is still there for models without it.
    model._supports_mm_encoder_outputs = lambda: False
    try:
        if own is not None:
            return own(*args, **kwargs)
        return type(model).generate(model, *args, **kwargs)
    finally:
        now.decisions, now.copies, now.surplus = None, 1, 0
        del model._supports_mm_encoder_outputs
