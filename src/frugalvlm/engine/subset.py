"""Shorter sequences: which positions of a longer one stay, and what that makes of masks and hidden
states; and sequences of full length in which some keys are hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from frugalvlm.engine.calls import cache_of

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # hidden states, positions: cos and sin


@dataclass(frozen=True, eq=False)
class Subset:
    """A shorter sequence: which positions of the longer one stay, row by row.

    Rows that keep less than others are padded on the left.

    Attributes:
        columns: [batch, kept] positions in the longer sequence, ascending; -1 is padding.
        landing: [batch, length] where a position lands in the shorter sequence, if it stays.
        lengths: how many positions each row keeps.
        moved: [batch, kept + 1] by how much a kept token's position id falls, and that of whatever
            comes behind; None where tokens keep their ids.
    """

    columns: Int[Tensor, "batch kept"]
    landing: Int[Tensor, "batch length"]
    lengths: tuple[int, ...]
    moved: Int[Tensor, "batch kept_and_behind"] | None = None

    @staticmethod
    def of(stays: Bool[Tensor, "batch length"], lengths: tuple[int, ...]) -> Subset:
        """The subset of marked positions; `lengths` are their counts, known without a sync."""
        length, end = stays.shape[1], max(lengths)
        columns = torch.arange(length, device=stays.device).where(stays, -1)
        short = torch.tensor([end - n for n in lengths]).to(stays.device)[:, None]
        return Subset(
            columns.sort(-1).values[:, length - end :], stays.cumsum(-1) - 1 + short, lengths
        )

    def to(self, device: torch.device) -> Subset:
        """The same on another device."""
        moved = None if self.moved is None else self.moved.to(device)
        return Subset(self.columns.to(device), self.landing.to(device), self.lengths, moved)

    def rows(self, index: Int[Tensor, " rows"]) -> Subset:
        """Other rows of the batch, by number."""
        index = index.to(self.columns.device)
        lengths = self.lengths[:1] * len(index)
        if self.padded:
            lengths = tuple(self.lengths[i] for i in index.tolist())
        columns, landing = self.columns[index], self.landing[index]
        moved = None if self.moved is None else self.moved[index]
        return Subset(columns, landing, lengths, moved)

    def renumbered(
        self, real: Bool[Tensor, "batch length"], stays: Bool[Tensor, "batch length"]
    ) -> Subset:
        """The same, with position ids that close the gaps."""
        gone = real.cumsum(-1) - stays.cumsum(-1)
        moved = torch.cat([gone.gather(1, self.columns.clamp(min=0)), gone[:, -1:]], 1)
        return replace(self, moved=moved)

    @property
    def padded(self) -> bool:
        """Whether some row is shorter than others."""
        return len(set(self.lengths)) > 1

    @property
    def own_mask(self) -> Int[Tensor, "batch kept"]:
        """A padding mask."""
        return (self.columns >= 0).long()

    def take(self, values: Float[Tensor, "rows length width"]) -> Float[Tensor, "batch kept width"]:
        """The rows that stay; padding takes row 0, which masks hide."""
        index = self.columns.clamp(min=0)
        return _rows(values.expand(len(index), -1, -1), index)

    def positions(self, ids: Int[Tensor, "*axes batch length"] | None) -> Tensor:
        """Position ids that tokens keep; of several axes each. None: they count from 0.

        The first of four axes counts text, and only says what one sequence is: it has no gaps.
        """
        columns = self.columns.clamp(min=0)
        if ids is None:
            return columns
        ids = ids.expand(*ids.shape[:-2], *self.landing.shape)
        kept = ids.gather(-1, columns.expand(*ids.shape[:-2], *columns.shape))
        if ids.ndim == 3 and len(ids) == 4:
            kept[0] = (self.own_mask.cumsum(-1) - 1).clamp(min=0)
        return kept

    def mask(self, mask: Tensor) -> Tensor:
        """A 2-D padding mask or a 4-D mask (bool or additive) of the shorter sequence.

        A padding query may see itself: a row without any key would become NaN and spread.
        """
        if mask.ndim == 2:
            return self.keys(mask)
        rows = self.columns.clamp(min=0)[:, None, :, None]
        wide = mask.expand(len(rows), -1, -1, -1)
        wide = wide.gather(2, rows.expand(-1, wide.shape[1], -1, wide.shape[3]))
        itself = torch.eye(rows.shape[2], dtype=torch.bool, device=mask.device)
        lonely = (self.columns < 0)[:, None, :, None] & itself
        return self.keys(wide).masked_fill(lonely, True if mask.dtype == torch.bool else 0)

    def keys(self, mask: Tensor, new: int = 0) -> Tensor:
        """The mask's columns that stay, and `new` columns behind the longer sequence."""
        batch, length = self.landing.shape
        columns = self.columns
        if new:
            tail = torch.arange(length, length + new, device=columns.device)
            columns = torch.cat([columns, tail.expand(batch, -1)], 1)
        safe, hide = columns.clamp(min=0), columns < 0
        if mask.ndim == 2:
            return mask.gather(1, safe).masked_fill(hide, 0)
        mask = mask.expand(batch, -1, -1, -1)
        index = safe[:, None, None].expand(-1, *mask.shape[1:3], -1)
        forbidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask.gather(3, index).masked_fill(hide[:, None, None], forbidden)

    def visible(self, queries: int, new: int, flash: bool) -> Tensor:
        """A mask for `queries` last tokens, where the model itself made none (no padding then).

        As in `mask`, a padding query may see itself. Flash attention takes the keys' mask only.
        """
        keys = torch.cat([self.own_mask, self.columns.new_ones(len(self.columns), new)], 1)
        if flash:
            return keys
        at = torch.arange(keys.shape[1], device=keys.device)
        causal = at[-queries:, None] >= at
        return causal & (keys[:, None, None] > 0) | (at[-queries:, None] == at)

    def spread(
        self, values: Float[Tensor, "batch kept width"]
    ) -> Float[Tensor, "batch length width"]:
        """Back to the longer sequence: what is gone shows the last survivor before it."""
        return _rows(values, self.landing.clamp(min=0))

    def spread_maps(
        self, maps: Float[Tensor, "batch heads queries keys"], prompt: bool
    ) -> Float[Tensor, "batch heads all_queries all_keys"]:
        """Attention maps of the longer sequence: no query attends to a key that is gone.

        Args:
            maps: keys are what stays, and whatever came behind it.
            prompt: whether the queries are what stays, too; one that is gone shows the map of the
                last survivor before it.
        """
        (batch, length), columns = self.landing.shape, self.columns.to(maps.device)
        new = maps.shape[3] - columns.shape[1]
        tail = torch.arange(length, length + new, device=maps.device).expand(batch, -1)
        # One spare column swallows what stands at padding.
        columns = torch.cat([columns.where(columns >= 0, length + new), tail], 1)[:, None, None]
        wide = maps.new_zeros(*maps.shape[:3], length + new + 1)
        wide = wide.scatter(3, columns.expand(maps.shape), maps)[..., :-1]
        if not prompt:
            return wide
        rows = self.landing.to(maps.device).clamp(min=0)[:, None, :, None]
        return wide.gather(2, rows.expand(-1, wide.shape[1], -1, wide.shape[3]))


def _rows(
    values: Float[Tensor, "batch length width"], index: Int[Tensor, "batch kept"]
) -> Float[Tensor, "batch kept width"]:
    """Whole rows, which `index_select` copies about ten times as fast as `gather` its elements."""
    batch, length, width = values.shape
    starts = torch.arange(batch, device=index.device)[:, None] * length
    flat = values.flatten(0, 1).index_select(0, (index + starts).flatten())
    return flat.view(batch, index.shape[1], width)


def compose(outer: Subset | None, inner: Subset) -> Subset:
    """A subset of a subset as a subset of the whole."""
    if outer is None:
        return inner
    columns = outer.columns.gather(1, inner.columns.clamp(min=0))
    landing = inner.landing.gather(1, outer.landing.clamp(min=0))
    moved = inner.moved
    if outer.moved is not None:
        behind = torch.full_like(outer.moved[:, -1:], outer.moved.shape[1] - 1)
        before = outer.moved.gather(1, torch.cat([inner.columns.clamp(min=0), behind], 1))
        moved = before if moved is None else before + moved
    return Subset(columns.where(inner.columns >= 0, -1), landing, inner.lengths, moved)


def prefill_arguments(
    cut: Subset, hidden: Tensor, kwargs: dict, flash: bool, rotary: Rotary
) -> dict[str, Any]:
    """Mask, positions and rotary embeddings of a cut sequence, while the prompt is read."""
    mask = kwargs.get("attention_mask")
    if mask is not None:
        mask = cut.mask(mask)
    elif cut.padded:
        mask = cut.visible(hidden.shape[1], 0, flash)
    if cut.moved is None:
        cos, sin = (cut.take(values) for values in kwargs["position_embeddings"])
    else:
        columns = cut.columns.clamp(min=0)
        positions = kwargs["position_ids"].expand(len(columns), -1).gather(1, columns)
        cos, sin = rotary(hidden, (positions - cut.moved[:, :-1]).clamp(min=0))
    return {
        "attention_mask": mask,
        # Rotary embeddings carry the true positions; consecutive ids keep flash attention from
        # reading the gaps as packed sequences.
        "position_ids": torch.arange(hidden.shape[1], device=hidden.device)[None],
        "position_embeddings": (cos, sin),
    }


def decode_arguments(
    cut: Subset, hidden: Tensor, kwargs: dict, flash: bool, rotary: Rotary
) -> dict[str, Any]:
    """What a cut layer needs for tokens behind the prompt: a mask of what survived and of them."""
    mask, stream_length = kwargs.get("attention_mask"), cut.landing.shape[1]
    new = cache_of(kwargs).get_seq_length() - stream_length  # layer 0 has them already
    if mask is not None:
        mask = cut.keys(mask, new)
    elif cut.padded:
        mask = cut.visible(hidden.shape[1], new, flash)
    if cut.moved is None:
        return {"attention_mask": mask}
    positions = (kwargs["position_ids"] - cut.moved[:, -1:]).clamp(min=0)
    return {"attention_mask": mask, "position_embeddings": rotary(hidden, positions)}


def hidden_keys(gone: Bool[Tensor, "batch prompt"], hidden: Tensor, kwargs: dict) -> Tensor:
    """The mask of a layer from which prompt tokens are hidden, though they are still there.

    A query that would see nothing at all may see itself: it would become NaN and spread.

    Args:
        gone: the hidden ones.
        hidden: what goes into the layer.
        kwargs: what the layer was to get.
    """
    mask, queries, cache = kwargs.get("attention_mask"), hidden.shape[1], cache_of(kwargs)
    at = torch.arange(queries if cache is None else cache.get_seq_length(), device=hidden.device)
    gone = nn.functional.pad(gone, (0, len(at) - gone.shape[1]))[:, None, None]
    if mask is None:
        mask = (at[-queries:, None] >= at)[None, None]
    mask = mask.expand(len(gone), -1, -1, -1)
    is_bool = mask.dtype == torch.bool
    given = mask if is_bool else mask > torch.finfo(mask.dtype).min / 2
    allowed = given & ~gone
    lonely = (at[-queries:, None] == at) & ~allowed.any(-1, keepdim=True)
    if is_bool:
        return allowed | lonely
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min).masked_fill(lonely, 0)
