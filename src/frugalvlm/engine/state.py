"""What the engine remembers: of a prompt (on its cache), of one forward pass, of one session.

Coordinates: *prompt* positions are those of the caller's input. An encoder reducer turns the prompt
into a shorter *stream* (what the decoder's first layer reads). Before layer k a layer reducer
picks a subset of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from frugalvlm.engine.subset import Subset
from frugalvlm.hosts import Host
from frugalvlm.hosts.base import ImageLayout
from frugalvlm.methods.base import EncoderReducer, LayerReducer, Method
from frugalvlm.trace import Trace
from frugalvlm.views import Kept, Reduced, Text

_MEMORY = "_frugalvlm_memory"  # where a cache keeps what was cut from its prompt


@dataclass(frozen=True, eq=False)
class Entry:
    """One method that is on."""

    method: Method
    trace: Trace
    placeholders: Tensor | None


@dataclass
class Memory:
    """What was cut out of one prompt; lives as long as its cache.

    Attributes:
        prompt_length: of the caller's input.
        stream: what of the prompt the decoder's first layer read; None: all of it.
        removed: [batch, 1] visual tokens missing in the stream.
        cuts: subsets of the stream, by the first layer that reads them.
        hidden: [batch, stream] tokens that masks hide, by the first layer that does not see them.
    """

    prompt_length: int
    stream: Subset | None = None
    removed: Tensor | None = None
    cuts: dict[int, Subset] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)

    @property
    def stream_length(self) -> int:
        """Tokens that the decoder's first layer read."""
        return self.prompt_length if self.stream is None else self.stream.columns.shape[1]


@dataclass
class Call:
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

    @property
    def crops(self) -> tuple[int, ...]:
        """Crops of each image."""
        return tuple(len(image.crops) for image in self.images)


class Now:
    """What is under way.

    Attributes:
        call: the forward pass.
        decisions: inside `generate`, what was kept, by layer: taken once; None outside it.
        copies: sequences per prompt inside `generate`.
        surplus: tokens that `generate` hands over although the cache holds them.
    """

    def __init__(self) -> None:
        self.call = Call()
        self.decisions: dict[int, Kept] | None = None
        self.copies = 1
        self.surplus = 0


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


def memory_of(cache: Any) -> Memory | None:
    """What was cut from the prompt that filled a cache."""
    return getattr(cache, _MEMORY, None)


def remember(cache: Any, memory: Memory) -> None:
    """Keep it on the cache: a copy of the cache then knows as much as the original."""
    setattr(cache, _MEMORY, memory)
