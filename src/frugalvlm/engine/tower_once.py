"""The same pictures under many methods: the vision tower's lower layers need to run only once.

Methods act from the layer on whose output the model reads as features. What goes into that layer
is remembered for every batch of pictures; the layers behind it, whose output nobody reads, are left
out. Answers are the same, bit for bit; a comparison of many methods takes about half the time.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from frugalvlm.engine.threads import Crew
from frugalvlm.hosts import host_for
from frugalvlm.hosts.base import encoder_layers

__all__ = ["tower_once"]


_OPEN: WeakKeyDictionary[nn.Module, Crew] = WeakKeyDictionary()  # whose towers run once
_LOCK = threading.Lock()


@contextmanager
def tower_once(model: PreTrainedModel, known: dict[bytes, Tensor] | None = None) -> Iterator[None]:
    """Inside, a batch of pictures that was seen before costs one tower layer only.

    Not for anything that looks at other tower layers, for gradients, or for measuring costs. Other
    threads have the whole tower; one that opens a block of its own meanwhile goes on with that.

    Args:
        model: whose tower.
        known: what was remembered before, of this very model; it is added to.
    """
    host, crew = host_for(model), Crew()
    with _LOCK:
        outer = _OPEN.setdefault(host.tower, crew)
    if outer is not crew and not outer.leads():
        yield
        return
    layers = list(encoder_layers(host.tower))
    feature = layers.index(host.feature_module)
    whole = [layer.forward for layer in layers]
    before = [layer.__dict__.get("forward") for layer in layers]  # of a block around this one
    known = {} if known is None else known

    def first(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # By content: a method may shrink the pictures, and memory is used again.
        raw = hidden.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
        key = hashlib.blake2b(raw, digest_size=16, person=str(hidden.shape[1]).encode()).digest()
        if key not in known:
            for forward in whole[:feature]:
                hidden = forward(hidden, *args, **kwargs)
            known[key] = hidden
        return known[key]

    def passed(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    def here(own: Callable, others: Callable) -> Callable:
        return lambda *args, **kwargs: (own if crew.here() else others)(*args, **kwargs)

    crew.open()
    for i, layer in enumerate(layers):
        if layer is not host.feature_module:
            layer.forward = here(passed if i else first, whole[i])
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
        crew.close()
        with _LOCK:
            if outer is crew:
                del _OPEN[host.tower]
