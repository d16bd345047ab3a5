"""AIM: merge similar visual tokens before the language model, prune them inside its middle layers.

Two training-free knobs set the cost. Rounds of bipartite matching fold similar tokens into one;
then a PageRank over each middle layer's own attention decides which visual tokens leave next, until
the last layers see none. Text tokens always stay.

Paper: Zhong et al., arXiv:2412.03248 (ICCV 2025). Code read: LaVi-Lab/AIM at edc24e9, the image
model (`clip_encoder.py` and `modeling_llama.py` in `other_packages/LLaVA-PruMerge`), the video
model (`llava_arch.py`) and `llava/model/token_merge.py`.

Merging, per crop (image, tile, or frame), in rounds of at most half until `kept_tokens` are left:
1. Metric: keys of the tower layer behind the features, heads side by side; the features themselves
   where there is no such layer, and in videos, whose frames are merged behind projector and
   pooling. It is merged along with the features.
2. Tokens at even places are sources, at odd places destinations (of the flattened grid).
3. Each source looks for its most similar destination (cosine); the r best pairs are merged.
4. A destination becomes the plain mean of itself and its sources, however much these stand for.
5. Order: unmerged sources by falling similarity, then destinations.

Pruning, before each decoder layer l in l1 + 1 .. l2 (0-based):
6. M = attention of layer l - 1 at temperature tau; s = uniform over the sequence, then 5 times
   s <- s M. Importance = root mean square of s over heads.
7. Of n visual tokens that entered the decoder the n (l2 - l) / (l2 - l1) most important stay, in
   order and with their position ids. At l2 none is left.

Complexity: merging (tokens / 2)^2 products a round; PageRank one attention map per pruned layer,
in chunks of rows, so O(length) memory; from two chunks on it is computed anew in each step.
Deviations: pruned tokens really leave the sequence (the released code hides them with masks:
`aim_mask`), so they neither hold nor send mass in later layers. The budget of a pooled frame is the
share that `kept_tokens` is of an unpooled crop, rounded down, as the printed costs count (24 of
196); the released code, which only halves and subtracts, leaves one token more at 12.5 % and less
(25). For depths other than 32, l1 and l2 are the image model's 13 and 21 in proportion (the video
model's: `AIMVideo`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from frugalvlm.methods.base import FrameReducer, LayerReducer, check_budget
from frugalvlm.methods.fields import Limits, Tokens
from frugalvlm.views import (
    MERGED_SOURCE,
    EncoderView,
    Kept,
    LayerView,
    Reduced,
    Shape,
    UnsupportedError,
    keep_top,
)

ITERATIONS = 5  # the code's; the damping d of its PageRank is 0
CHUNK = 256  # query rows whose attention is held at once


@dataclass(frozen=True)
class AIM(FrameReducer, LayerReducer):
    """Merge each crop to `kept_tokens`, then prune to none between layers `l1` and `l2`."""

    key: ClassVar[str] = "aim"
    usual: ClassVar[tuple[float, float]] = (13 / 32, 21 / 32)  # l1 and l2 over the depth, images
    kept_tokens: Annotated[
        Tokens, "handed to the language model, per crop; 252 (43.75 %) and 72 (12.5 %) of 576"
    ]
    l1: Annotated[
        int | None, Limits(0), "the schedule's first layer, 13 of 32; None: as usual for this depth"
    ] = None
    l2: Annotated[int | None, Limits(1), "its last, 21 of 32; None: as usual"] = None
    prune: Annotated[bool, "False: merging only"] = True
    tau: Annotated[float, Limits(1e-6), "temperature of the attention of PageRank"] = 0.1

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The budget is what enters the language model; all tokens: neither merging nor pruning."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens, prune=cls.prune and kept_tokens < total_tokens)

    def check(self, shape: Shape) -> None:
        """Budget in 1..patches; the schedule needs 0 <= l1 < l2 and a layer to cut at."""
        check_budget(self.kept_tokens, shape.most, self)
        if not self.prune:
            return
        l1, l2 = self._schedule(shape.decoder_layers)
        if not 0 <= l1 < l2 or not self.layers(shape.decoder_layers):
            raise UnsupportedError(
                f"aim's schedule l1={l1}, l2={l2} prunes no layer of a decoder with "
                f"{shape.decoder_layers}; choose 0 <= l1 < l2 and l1 below "
                f"{shape.decoder_layers - 1}, or prune=False."
            )

    def reduce(self, view: EncoderView) -> Reduced:
        """Merged tokens, in the order that the rounds leave."""
        metric = view.features if self.kept_tokens == view.patch_count else _metric(view)
        tokens, place = _merge(view.patches, metric, self.kept_tokens)
        members = one_hot(place, tokens.shape[1]).transpose(1, 2)
        alone = members.sum(-1) == 1
        source = members.argmax(-1).masked_fill(~alone, MERGED_SOURCE)
        return Reduced(tokens, source, place.masked_fill(alone.gather(1, place), -1))

    def reduce_frames(
        self, frames: Float[Tensor, "frames tokens width"], patches: int
    ) -> Float[Tensor, "frames kept width"]:
        """Merged tokens of each frame, never across frames; their own metric."""
        kept = max(1, self.kept_tokens * frames.shape[1] // patches)
        return _merge(frames, frames, kept)[0]

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """Before every layer behind l1, up to l2."""
        l1, l2 = self._schedule(decoder_layers)
        return tuple(range(l1 + 1, min(l2 + 1, decoder_layers))) if self.prune else ()

    def keep(self, view: LayerView) -> Kept:
        """The most important tokens, in order."""
        l1, l2 = self._schedule(view.decoder_layers)
        counts = tuple(
            min(n * (l2 - view.layer) // (l2 - l1), now)
            for n, now in zip(view.entered, view.counts, strict=True)
        )
        if not any(counts):
            return Kept(view.visual[:, :0], counts)
        return keep_top(view.on_visual(_page_rank(view, self.tau)), counts)

    def _schedule(self, decoder_layers: int) -> tuple[int, int]:
        l1, l2 = (round(share * decoder_layers) for share in self.usual)
        return l1 if self.l1 is None else self.l1, l2 if self.l2 is None else self.l2


@dataclass(frozen=True)
class AIMMask(AIM):
    """The released code's pruning: dropped tokens are hidden by masks, nothing gets shorter."""

    key: ClassVar[str] = "aim_mask"
    masks_only: ClassVar[bool] = True


@dataclass(frozen=True)
class AIMMerge(AIM):
    """Merging alone, for the paper's ablation; not one of the kit's `METHODS`."""

    key: ClassVar[str] = "aim_merge"
    prune: Annotated[bool, "never: merging only"] = False


@dataclass(frozen=True)
class AIMEarly(AIM):
    """The ablation's early schedule, (7, 15) of 28 layers; not one of the kit's `METHODS`."""

    key: ClassVar[str] = "aim_early"
    usual: ClassVar[tuple[float, float]] = (7 / 28, 15 / 28)


@dataclass(frozen=True)
class AIMVideo(AIM):
    """With the video model's schedule, (14, 22) of 28 layers; not one of the kit's `METHODS`."""

    key: ClassVar[str] = "aim_video"
    usual: ClassVar[tuple[float, float]] = (14 / 28, 22 / 28)


def _merge(
    tokens: Float[Tensor, "crops tokens width"],
    metric: Float[Tensor, "crops tokens metric_width"],
    kept: int,
) -> tuple[Float[Tensor, "crops kept width"], Int[Tensor, "crops tokens"]]:
    """Rounds of matching until `kept` are left: these, and the one that each has become part of."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    while (count := tokens.shape[1]) > kept:
        r = min(count - kept, count // 2)
        goes = _matching(metric, r)
        tokens, metric = (_means(values, goes, count - r) for values in (tokens, metric))
        place = goes.gather(1, place)
    return tokens, place


def _metric(view: EncoderView) -> Float[Tensor, "crops patches width"]:
    try:
        return view.following.keys.transpose(1, 2).flatten(2)
    except UnsupportedError:
        return view.features


def _matching(metric: Float[Tensor, "crops tokens width"], r: int) -> Int[Tensor, "crops tokens"]:
    """One round: into which of the `tokens - r` that are left each token goes."""
    count = metric.shape[1]
    unit = normalize(metric, dim=-1)
    best, target = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, unmerged = order[:, :r], order[:, r:]
    slot = torch.empty_like(order).scatter(
        1, unmerged, torch.arange(unmerged.shape[1], device=order.device).expand_as(unmerged)
    )
    slot = slot.scatter(1, merged, target.gather(1, merged) + unmerged.shape[1])
    goes = torch.arange(count, device=order.device).expand(len(order), -1) // 2 + unmerged.shape[1]
    sources = torch.arange(0, count, 2, device=order.device)
    return goes.scatter(1, sources.expand_as(order), slot)


def _means(
    values: Float[Tensor, "crops tokens width"], goes: Int[Tensor, "crops tokens"], left: int
) -> Float[Tensor, "crops left width"]:
    """Plain means of what goes together."""
    together = one_hot(goes, left).transpose(1, 2).to(values.dtype)
    return together @ values / together.sum(-1, keepdim=True)


@torch.no_grad()
def _page_rank(view: LayerView, tau: float) -> Float[Tensor, "batch length"]:
    """The mass that five steps along the sharpened attention bring to every position."""
    batch, length = view.real.shape
    at = torch.arange(length, device=view.real.device).expand(batch, -1)
    chunks = [slice(first, first + CHUNK) for first in range(0, length, CHUNK)]
    held = view.attention_rows(at, tau) if len(chunks) == 1 else None
    wide = torch.promote_types(view.tokens.dtype, torch.float32)
    mass = view.real.to(wide)[:, None] / view.real.sum(-1)[:, None, None]
    for _ in range(ITERATIONS):
        moved = torch.zeros((), dtype=wide, device=mass.device)
        for rows in chunks:
            attention = view.attention_rows(at[:, rows], tau) if held is None else held
            moved = moved + (mass[:, :, None, rows] @ attention)[:, :, 0]
        mass = moved
    return mass.square().mean(1).sqrt()
