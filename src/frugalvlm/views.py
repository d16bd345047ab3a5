"""What hosts show to methods, and what methods answer.

A *view* is one image batch at one place of the model. Its scores are computed when asked for, from
the query rows that are needed, so the model itself keeps running SDPA or flash attention and never
materialises an attention map. Views and answers are the only things that methods and hosts share.

Axes: `crops` are pictures as the vision tower sees them (one per image in LLaVA-1.5, one base and
several tiles in LLaVA-NeXT), `images` are pictures as the prompt sees them, `patches` the tower's
patch tokens, `visual` the visual tokens still present at a decoder layer.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from frugalvlm.errors import FrugalError

CLS_SOURCE = -1  # in `Reduced.source`: the tower's [CLS] token
MERGED_SOURCE = -2  # in `Reduced.source`: a token made by merging, at no single place


class UnsupportedError(FrugalError, ValueError):
    """A method asks for something that this model, input or setting cannot give."""


class BudgetError(FrugalError, ValueError):
    """A number of visual tokens that cannot be kept."""


def softmax(logits: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows keys"]:
    """Softmax over the last axis in float32 or better, as the models compute it."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class Shape:
    """What a method may know of a model before any computing: sizes and abilities.

    Attributes:
        patches: patch tokens per crop; where every picture has its own number, that of a usual one.
        grid: rows and columns of patches, likewise.
        decoder_layers: of the language model.
        has_cls: whether the vision tower has a [CLS] token whose attention can rank patches.
        varies: whether pictures have numbers of tokens of their own, known when they are seen.
        follows: whether a tower layer reads the features.
        resizes: whether the tower takes smaller pictures of the same model input.
    """

    patches: int
    grid: tuple[int, int]
    decoder_layers: int
    has_cls: bool
    varies: bool = False
    follows: bool = True
    resizes: bool = True

    @property
    def most(self) -> int:
        """The largest budget per crop: above what a picture has, where they vary, it keeps all."""
        return sys.maxsize if self.varies else self.patches


class EncoderView:
    """One batch of crops between the vision tower and the language model.

    Built by a host; methods read it. Attention is that of the tower layer whose output the model
    uses as features (LLaVA-1.5: layer 23 of 24). Where the projector mixes patches, a *patch* here
    is what it makes of several: one token that the language model reads.

    Args:
        patches: what tokens are made of, by picking and mixing; before the projector or behind it.
            It may be wider than the features: whatever goes with a token mixes alike.
        cls: features of a [CLS] token that can be handed over.
        grid: rows and columns of patches.
        hidden: what went into the attention.
        queries_of: queries of such rows.
        raw_keys: keys of all positions.
        scale: factor on their products.
        pixels: of the crops.
        project: the projector, where it acts per token and is still to come.
        following: the same crops in the next tower layer.
        features: the part of `patches` that can be compared; None: all of it.
        pool: makes values per tower position (last axis) values per patch, where these differ.
        leading: tower positions in front of the patches; None: the [CLS] token's.
    """

    def __init__(
        self,
        patches: Float[Tensor, "crops patches width"],
        cls: Float[Tensor, "crops 1 width"] | None,
        grid: tuple[int, int],
        hidden: Float[Tensor, "crops positions hidden_width"],
        queries_of: Callable[[Tensor], Float[Tensor, "crops heads rows head_dim"]],
        raw_keys: Float[Tensor, "crops heads positions head_dim"],
        scale: float,
        pixels: Tensor | None,
        project: Callable[[Tensor], Tensor] | None = None,
        following: Callable[[], EncoderView] | None = None,
        features: Float[Tensor, "crops patches feature_width"] | None = None,
        pool: Callable[[Tensor], Tensor] | None = None,
        leading: int | None = None,
    ) -> None:
        self.patches = patches
        self.features = patches if features is None else features
        self.grid = grid
        self._pool = pool
        self._leading = int(cls is not None) if leading is None else leading
        self._cls = cls
        self._hidden = hidden
        self._queries_of = queries_of
        self._raw_keys = raw_keys
        self._scale = scale
        self._pixels = pixels
        self._project = project
        self._following = following

    @property
    def crops(self) -> int:
        """Number of crops."""
        return self.patches.shape[0]

    @property
    def patch_count(self) -> int:
        """Patch tokens per crop."""
        return self.patches.shape[1]

    @property
    def cls(self) -> Float[Tensor, "crops 1 width"]:
        """The [CLS] token's features.

        Raises:
            UnsupportedError: when the tower has none.
        """
        if self._cls is None:
            raise UnsupportedError("This vision tower has no [CLS] token (for example SigLIP).")
        return self._cls

    @property
    def has_cls(self) -> bool:
        """Whether there is a [CLS] token to hand over."""
        return self._cls is not None

    @property
    def ranks_by_cls(self) -> bool:
        """Whether there is one whose attention ranks patches, handed over or not."""
        return self._leading == 1

    @cached_property
    def keys(self) -> Float[Tensor, "crops heads patches head_dim"]:
        """Keys of the patches as the tower's attention projects them, not scaled.

        CLIP and SigLIP: bias included. Towers with rotary positions: behind the rotation. Where a
        patch is made of several tower positions: their mean.
        """
        keys = self._raw_keys[:, :, self._leading :]
        return keys if self._pool is None else self._pool(keys.mT).mT

    @cached_property
    def cls_attention(self) -> Float[Tensor, "crops heads patches"]:
        """Attention from [CLS] to every patch, after the softmax over all positions.

        One query row: q of [CLS] times all keys. Exact, O(patches) memory.
        """
        self._need_cls()
        rows = self._attention(self._hidden[:, :1])
        return self._pooled(rows[:, :, 0, 1:])

    @cached_property
    def cls_logits(self) -> Float[Tensor, "crops heads positions"]:
        """Products of the [CLS] query with every key, [CLS] first; not scaled, no softmax."""
        self._need_cls()
        return (self._queries_of(self._hidden[:, :1]) @ self._raw_keys.transpose(-1, -2))[:, :, 0]

    @cached_property
    def projected(self) -> Float[Tensor, "crops patches text_width"]:
        """All patches behind the projector: what the language model would read."""
        if self._project is None:
            raise UnsupportedError("Projected features are asked for, but there is no projector.")
        return self._project(self.features)

    @cached_property
    def following(self) -> EncoderView:
        """The same crops, with queries and keys of the next tower layer, which reads the features.

        Raises:
            UnsupportedError: when the features leave the tower's last layer.
        """
        if self._following is None:
            raise UnsupportedError("A next tower layer is asked for, but there is none.")
        return self._following()

    @cached_property
    def received_attention(self) -> Float[Tensor, "crops patches"]:
        """Attention that each patch receives, averaged over heads and all queries.

        Query rows go in chunks, so memory stays linear in the number of positions.
        """
        positions = self._hidden.shape[1]
        chunks = (
            self._attention(rows).mean(dim=1).sum(dim=1) for rows in self._hidden.split(64, dim=1)
        )
        received = sum(chunks, start=torch.zeros(()))[:, self._leading :] / positions
        return self._pooled(received)

    @cached_property
    def fingerprint(self) -> Int[Tensor, " crops"]:
        """A whole number that depends on the crop's pixels only.

        Random methods seed from it: the same picture gives the same choice in any batch.
        """
        if self._pixels is None:
            raise UnsupportedError("Random selection needs pixel_values; features were given.")
        flat = (self._pixels.flatten(1) * 512).round().to(torch.int64)
        weights = torch.arange(flat.shape[1], device=flat.device) % 65_521 + 1
        return (flat * weights).sum(1)

    def _need_cls(self) -> None:
        if not self.ranks_by_cls:
            raise UnsupportedError("This vision tower has no [CLS] token (for example SigLIP).")

    def _pooled(self, values: Float[Tensor, "*rows positions"]) -> Float[Tensor, "*rows patches"]:
        return values if self._pool is None else self._pool(values)

    def _attention(
        self, rows: Float[Tensor, "crops rows width"]
    ) -> Float[Tensor, "crops heads rows positions"]:
        logits = self._queries_of(rows) @ self._raw_keys.transpose(-1, -2) * self._scale
        return softmax(logits)


@dataclass(frozen=True)
class Reduced:
    """An encoder reducer's answer: the tokens to hand to the projector.

    Attributes:
        tokens: [crops, kept, width] features, in the order in which the language model reads them.
        source: [crops, kept] patch each token stands for, or `CLS_SOURCE` / `MERGED_SOURCE`.
        merged_into: [crops, patches] slot in `tokens` that a patch was folded into, -1 for none.
        counts: tokens of each crop, where they differ; slots behind them are padding.
        stands_at: [crops, kept] the patch at whose place a token stands where tokens keep their
            places; None: its source, and of merged ones the first patch that was folded in.
    """

    tokens: Float[Tensor, "crops kept width"]
    source: Int[Tensor, "crops kept"]
    merged_into: Int[Tensor, "crops patches"] | None = None
    counts: tuple[int, ...] | None = None
    stands_at: Int[Tensor, "crops kept"] | None = None

    @property
    def places(self) -> Int[Tensor, "crops kept"]:
        """The patch at whose place each token stands; meaningless behind a crop's count."""
        if self.stands_at is not None:
            return self.stands_at
        if self.merged_into is None:
            return self.source.clamp(min=0)
        slots = torch.arange(self.source.shape[1], device=self.source.device)
        first = (self.merged_into[:, None] == slots[:, None]).long().argmax(-1)
        return self.source.where(self.source >= 0, first)


@dataclass(frozen=True)
class Text:
    """The text that stands behind the images of a prompt, as it entered the decoder.

    Attributes:
        index: [batch, text] its positions in the current sequence; padding lies anywhere.
        behind: [images, text] which of them really are text behind this image. Where an image is
            followed by none, the prompt's last token stands for it.
        embeddings: [batch, text, width] its word embeddings.
        visual: [images, entered, width] what stood for the images then.
    """

    index: Int[Tensor, "batch text"]
    behind: Bool[Tensor, "images text"]
    embeddings: Float[Tensor, "batch text width"]
    visual: Float[Tensor, "images entered width"]

    def of(self, images: Sequence[int], entered: int) -> Text:
        """The text as some of the images have it, of which none has more tokens than `entered`."""
        own = list(images)
        return replace(self, behind=self.behind[own], visual=self.visual[own, :entered])


class LayerView:
    """The visual tokens of every image just before a decoder layer.

    Attributes:
        layer: the decoder layer that comes next (0-based).
        visual: [images, visual] positions of the visual tokens in the current sequence.
        counts: how many of these each image really has; slots behind them are padding.
        crops: crops of each image (LLaVA-1.5: 1), so that a budget per crop can be applied.
        patches: patch tokens of an untouched crop.
        rows: [images] batch row of each image.
        decoder_layers: layers of the decoder.
        entered: visual tokens of each image that the decoder was given.
        hidden: [batch, length, width] what the layer is about to read.
        chosen: where this shows some of a batch's images only, their numbers; None: all of them.
    """

    def __init__(
        self,
        layer: int,
        hidden: Float[Tensor, "batch length width"],
        visual: Int[Tensor, "images visual"],
        counts: tuple[int, ...],
        crops: tuple[int, ...],
        patches: int,
        rows: Int[Tensor, " images"],
        last: Int[Tensor, " batch"],
        attention_of: Callable[..., Float[Tensor, "batch heads queries length"]],
        decoder_layers: int = 0,
        entered: tuple[int, ...] = (),
        real: Bool[Tensor, "batch length"] | None = None,
        text_of: Callable[[], Text] | None = None,
    ) -> None:
        self.layer = layer
        self.visual = visual
        self.counts = counts
        self.crops = crops
        self.patches = patches
        self.rows = rows
        self.decoder_layers = decoder_layers
        self.entered = entered or counts
        self.hidden = hidden
        self.chosen: tuple[int, ...] | None = None
        self._last = last
        self._attention_of = attention_of
        self._real = real
        self._text_of = text_of

    @property
    def tokens(self) -> Float[Tensor, "images visual width"]:
        """Hidden states of the visual tokens; padding slots hold some other token's."""
        return self.hidden[self.rows[:, None], self._visual_or_any]

    @cached_property
    def last_token_attention(self) -> Float[Tensor, "images heads visual"]:
        """Attention from the last prompt token to the visual tokens, in the layer before.

        One query row per prompt, softmax over all keys that it may see; padding slots hold -1.
        """
        return self.attention_from(self._last[:, None])[:, :, 0]

    @cached_property
    def text(self) -> Text:
        """The text behind the images.

        Raises:
            UnsupportedError: for a view that was made without a prompt.
        """
        if self._text_of is None:
            raise UnsupportedError("The text behind the images is asked for, but there is none.")
        return self._text_of()

    @property
    def real(self) -> Bool[Tensor, "batch length"]:
        """Which positions of the sequence are not padding."""
        if self._real is None:
            return torch.ones(self.hidden.shape[:2], dtype=torch.bool, device=self.hidden.device)
        return self._real

    def of(self, images: Sequence[int], patches: int) -> LayerView:
        """Some of the images only, by number, whose crops have so many patches."""
        other, own = copy.copy(self), list(images)
        for name in ("last_token_attention", "text"):
            other.__dict__.pop(name, None)  # remembered, of all images
        other.chosen, other.patches = tuple(own), patches
        other.counts = tuple(self.counts[i] for i in own)
        other.crops = tuple(self.crops[i] for i in own)
        other.entered = tuple(self.entered[i] for i in own)
        other.visual = self.visual[own, : max(other.counts)]
        other.rows = self.rows[own]
        if self._text_of is not None:
            other._text_of = lambda: self.text.of(own, max(other.entered))
        return other

    def with_attention(self, attention_of: Callable[..., Tensor]) -> LayerView:
        """The same view with another attention: of chosen positions, at a temperature."""
        other = copy.copy(self)
        other.__dict__.pop("last_token_attention", None)  # remembered, of this one
        other._attention_of = attention_of
        return other

    def attention_rows(
        self, queries: Int[Tensor, "batch queries"], temperature: float = 1.0
    ) -> Float[Tensor, "batch heads queries length"]:
        """Attention from chosen positions to the whole sequence, in the layer before.

        Args:
            queries: the positions.
            temperature: divides the logits; below 1 the attention gets sharper than the model's.
        """
        return self._attention_of(queries, temperature)

    def on_visual(self, values: Float[Tensor, "batch length"]) -> Float[Tensor, "images visual"]:
        """A value per position, of every visual token; padding slots hold -1."""
        picked = values[self.rows[:, None], self._visual_or_any]
        return picked if self._slots is None else picked.masked_fill(~self._slots, -1.0)

    def attention_from(
        self, queries: Int[Tensor, "batch queries"]
    ) -> Float[Tensor, "images heads queries visual"]:
        """Attention from chosen positions of each prompt to the visual tokens, layer before."""
        per_prompt = self._attention_of(queries)[self.rows]
        index = self._visual_or_any[:, None, None].expand(-1, *per_prompt.shape[1:3], -1)
        picked = per_prompt.gather(-1, index)
        slots = self._slots
        return picked if slots is None else picked.masked_fill(~slots[:, None, None], -1.0)

    @property
    def _slots(self) -> Bool[Tensor, "images visual"] | None:
        """Which slots of `visual` hold a token; None: all of them."""
        if len(set(self.counts)) == 1:
            return None
        slot = torch.arange(self.visual.shape[1], device=self.visual.device)
        return slot < torch.tensor(self.counts, device=slot.device)[:, None]

    @property
    def _visual_or_any(self) -> Int[Tensor, "images visual"]:
        """`visual` with padding slots, which lie behind the sequence, moved onto its end."""
        return self.visual.clamp(max=self.hidden.shape[1] - 1)

    def per_crop(self, kept_tokens: int) -> tuple[int, ...]:
        """A budget per crop as a budget per image, never above what the image still has.

        A budget of every patch keeps every token, the newline tokens of LLaVA-NeXT included.
        """
        if kept_tokens >= self.patches:
            return self.counts
        return tuple(
            min(kept_tokens * crops, count)
            for crops, count in zip(self.crops, self.counts, strict=True)
        )


@dataclass(frozen=True)
class Kept:
    """A layer reducer's answer: which of the current visual tokens stay.

    Attributes:
        index: [images, kept] into the view's `visual` axis; the first `counts[i]` of row i are
            ascending and stay, the others are padding.
        counts: how many tokens each image keeps.
        values: [images, kept, width] hidden states that these places hold from now on, where a
            method makes new tokens of dropped ones; None: those that they have.
        holds: [images, kept] whose states these are: an index into `visual`, or `MERGED_SOURCE`.
    """

    index: Int[Tensor, "images kept"]
    counts: tuple[int, ...]
    values: Float[Tensor, "images kept width"] | None = None
    holds: Int[Tensor, "images kept"] | None = None


@dataclass(frozen=True, eq=False)
class SmallModel:
    """A small vision-language model that guides a large one of its family.

    Attributes:
        model: the small model, unmodified.
        name: what records call it; name its weights, for example `pocket-llava-small@1f0c`.
            Default: its folder or Hub id.
        max_new_tokens: length of its answer (SGL's released code: 10 or 100, by benchmark).
    """

    model: Any
    name: str = ""
    max_new_tokens: int = 10

    def __post_init__(self) -> None:
        if not self.name:
            known = getattr(self.model.config, "name_or_path", "") or type(self.model).__name__
            object.__setattr__(self, "name", known)


def keep_top(score: Float[Tensor, "images visual"], counts: tuple[int, ...]) -> Kept:
    """Keep the `counts[i]` visual tokens of image i with the largest score, in order."""
    index = score.topk(max(counts), dim=-1).indices
    if len(set(counts)) > 1:
        rank = torch.arange(index.shape[1], device=index.device)
        limit = torch.tensor(counts, device=index.device)[:, None]
        index = index.masked_fill(rank >= limit, score.shape[1])
        index = index.sort(-1).values.clamp(max=score.shape[1] - 1)
        return Kept(index, counts)
    return Kept(index.sort(-1).values, counts)
