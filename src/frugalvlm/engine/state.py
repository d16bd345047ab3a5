"""What the engine knows of one forward pass and of one session; see memory.py for caches.

Coordinates: *prompt* positions are those of the caller's input. An encoder reducer turns the prompt
into a shorter *stream* (what the decoder's first layer reads). Before layer k a layer reducer
picks a subset of the stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from frugalvlm.engine.memory import Memory
from frugalvlm.hosts import Host
from frugalvlm.hosts.base import ImageLayout, TowerPass
from frugalvlm.methods.base import EncoderReducer, LayerReducer, Method
from frugalvlm.trace import Trace
from frugalvlm.views import Kept, Reduced, Text


@dataclass(eq=False)
class Entry:
    """One method that is on."""

    method: Method
    trace: Trace
    placeholders: Tensor | None
    _newest: object = None  # the call whose prompt the trace tells of; threads may take turns
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note_prompt(
        self,
        call: Call,
        counts: tuple[int, ...] = (),
        origins: Callable[[], list[list[int]]] = list,
        merged_into: Tensor | None = None,
    ) -> None:
        """A new prompt: tokens of each image; none without images."""
        with self._lock:
            self._newest = call.mark
            self.trace.note_prompt(counts, call.crops, origins, merged_into, call.grids)

    def note_cut(self, call: Call, layer: int, kept: Kept, hidden: bool) -> None:
        """A cut of that prompt, unless another thread has brought a newer one."""
        with self._lock:
            if self._newest is call.mark:
                self.trace.note_cut(layer, kept, hidden)


@dataclass(frozen=True, eq=False)
class Placed:
    """What an encoder reducer left of one image, where tokens keep their places.

    Attributes:
        places: prompt positions, ascending; on the CPU.
        tokens: what stands there.
        planes: likewise of each plane, see `Host.planes`.
        origin: what each token stands for: crop x patches + patch, or -1.
        merged_into: [crops, patches] see `Reduced`.
    """

    places: Tensor
    tokens: Tensor
    planes: tuple[Tensor, ...]
    origin: list[int]
    merged_into: Tensor | None


@dataclass
class Call:
    """State of one forward pass of the whole model.

    The sequence is what the next decoder layer reads: the stream at first, shorter after each cut.
    """

    images: list[ImageLayout] = field(default_factory=list)
    grids: tuple[tuple[int, int], ...] = ()  # of each image, where they differ
    positions: bool = False  # whether the caller gave position ids
    real: Tensor | None = None  # [batch, prompt] not padding; on the CPU
    clips: bool = False  # videos, whose frames are pooled behind the projector
    pixels: Tensor | None = None
    tower_hidden: Tensor | None = None  # what went into the feature layer's attention
    tower_keys: Tensor | None = None  # its key projection
    tower_output: Tensor | None = None  # what left the feature layer
    answer: Reduced | None = None  # what the encoder reducer said
    projected: Tensor | None = None  # its tokens behind the projector, where they are fewer
    placed: list[Placed] = field(
        default_factory=list
    )  # of each image, where they keep their places
    planes: list[Tensor] = field(default_factory=list)  # [batch, stream, width] to be added
    memory: Memory | None = None
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
    mark: object = field(default_factory=object)  # tells calls apart, and keeps none of them alive

    @property
    def crops(self) -> tuple[int, ...]:
        """Crops of each image."""
        return tuple(len(image.crops) for image in self.images)


class Now(threading.local):
    """What is under way in the running thread.

    Attributes:
        call: the forward pass.
        decisions: inside `generate`, what was kept, by layer: taken once; None outside it.
        copies: sequences per prompt inside `generate`.
        surplus: tokens that `generate` hands over although the cache holds them.
        described: what describes the pictures, where `generate` of the untouched model, which
            runs the tower by itself, does not pass it on.
        tower: the runs of the vision tower that belong to the call, for hosts that reduce behind
            the projector; inside `generate` they may come before it.
        generating: whether `generate` is under way.
    """

    def __init__(self) -> None:
        self.call = Call()
        self.decisions: dict[int, Kept] | None = None
        self.copies = 1
        self.surplus = 0
        self.described: dict[str, Any] | None = None
        self.tower: list[TowerPass] = []
        self.generating = False


class State:
    """What the rooms of one session share.

    Attributes:
        host: of the model.
        entries: the methods that are on, outermost first.
        encoder: the one among them that acts behind the vision tower.
        cut_at: those that act inside the decoder, by the layer they cut before.
        now: what is under way.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.entries: list[Entry] = []
        self.encoder: EncoderReducer | None = None
        self.cut_at: dict[int, LayerReducer] = {}
        self.now = Now()

    @property
    def call(self) -> Call:
        """The forward pass that is under way."""
        return self.now.call
