"""SparseVLM: the question's words rate visual tokens layer by layer; dropped ones are recycled.

Only words that resemble the image are asked. Where the decoder prunes, the best rated visual tokens
stay, and the better ones of the rest are clustered into a few new tokens instead of being lost.

Paper: Zhang et al., arXiv:2410.04417 (ICML 2025), sections 3.2 and 3.3. Code read:
Gumpest/SparseVLMs at 734d900 (version 1.5: `score.py`, `modelling_sparse_llama.py`, `utils.py`) and
91fb6d9 (version 1, the rank).

1. Raters: for the words t behind the image and the visual tokens v as they enter the decoder,
   r_t = mean over v of softmax over t of v.t; raters are the words with r_t above the mean of r.
2. Before layers 3, 7 and 16 (of 32): P = attention of the raters to the visual tokens in the layer
   before, mean over heads; score = mean of P over raters.
3. The K best stay, in order: 300, 200, 110 for a nominal average of 192 tokens, and so on.
4. Of the others the best 30 % (+ 1) are clustered into a tenth (+ 1) of their number by density
   peaks: density = exp(-mean squared distance to the C nearest), centres are the C largest products
   of density and distance to the next denser token; each token joins its nearest centre.
5. The means of the clusters follow the kept tokens; position ids are renumbered without gaps.

`sparsevlm_rank` takes K from the rank of P: int(rank * scale + bias), before layers 3, 7, 16, 20.

Complexity: one query row per word; distances among 30 % of the dropped tokens.
Deviations: of equally dense tokens the better rated one counts as denser (the code adds random
noise of 1e-6); a crop that has no more than K tokens keeps them all (the code would move its worst
one to the end). Several images: each is rated by the words behind it. Other depths: layers in
proportion. Budgets are the paper's nominal averages over layers; other image sizes keep its shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from frugalvlm.methods.base import LayerReducer, check_budget
from frugalvlm.methods.fields import Limits, Tokens, refuse
from frugalvlm.views import MERGED_SOURCE, Kept, LayerView, Shape, UnsupportedError, softmax

# Version 1.5: tokens kept at the three layers, by the nominal average of 576.
PAPER_KEPT = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
PAPER_RANK = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}  # version 1: (scale, bias)
CUTS = (3, 7, 16, 20)  # of 32 layers; version 1.5 takes the first three


@dataclass(frozen=True)
class SparseVLM(LayerReducer):
    """Keep `kept[i]` visual tokens of each crop, and recycled ones, from the i-th cut on."""

    key: ClassVar[str] = "sparsevlm"
    renumbers: ClassVar[bool] = True
    cuts_of_32: ClassVar[tuple[int, ...]] = CUTS[:3]
    kept: Annotated[
        tuple[Tokens, ...], "K, per crop, behind each cut; (300, 200, 110) for 192 of 576"
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        cuts = len(self.cuts_of_32)
        if len(self.kept) != cuts:
            raise refuse(self, "kept", f"a tuple of {cuts} numbers, one for each cut")
        if any(later > kept for kept, later in pairwise(self.kept)):
            raise refuse(self, "kept", "never larger at a later cut: what is gone stays gone")

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The released schedule of a nominal average; between its budgets, that of the next one."""
        check_budget(kept_tokens, total_tokens)
        if kept_tokens == total_tokens:
            return cls((total_tokens,) * 3)
        nominal = _nominal(kept_tokens, total_tokens)
        shares = (kept * kept_tokens / nominal for kept in PAPER_KEPT[nominal])
        return cls(tuple(max(1, min(round(share), total_tokens)) for share in shares))

    def check(self, shape: Shape) -> None:
        """No number above the patches, and layers to cut at."""
        check_budget(self.kept[0], shape.most, self)
        _needs_layers(self.key, shape)

    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """The paper's layers in proportion to the depth, each a layer of its own."""
        cuts: list[int] = []
        for cut in self.cuts_of_32:
            cuts.append(max([1, round(cut * decoder_layers / 32), *(c + 1 for c in cuts[-1:])]))
        return tuple(cut for cut in cuts if cut < decoder_layers)

    def keep(self, view: LayerView) -> Kept:
        """The best rated tokens in order, then the recycled ones."""
        attention = view.attention_from(view.text.index).mean(1)
        raters = _raters(view)
        score = (attention * raters[..., None]).sum(1) / raters.sum(-1, keepdim=True)
        return _kept_and_recycled(view, score, self._counts(view, attention, raters))

    def _counts(
        self,
        view: LayerView,
        attention: Float[Tensor, "images text visual"],
        raters: Bool[Tensor, "images text"],
    ) -> tuple[int, ...]:
        """K of each image."""
        return view.per_crop(self.kept[self.layers(view.decoder_layers).index(view.layer)])


@dataclass(frozen=True)
class SparseVLMRank(SparseVLM):
    """The adaptive version: tokens kept follow from the rank of the raters' attention."""

    key: ClassVar[str] = "sparsevlm_rank"
    adaptive: ClassVar[bool] = True
    cuts_of_32: ClassVar[tuple[int, ...]] = CUTS
    kept: Annotated[tuple[Tokens, ...], "none: they follow from the rank"] = ()
    scale: Annotated[
        float, Limits(0, 1e6), "tokens per rank, of 576; 13.5, 9 and 0.8 at 192, 128 and 64 tokens"
    ] = 13.5
    bias: Annotated[float, Limits(0, 1e6), "tokens beside them; 0, 6 and 0"] = 0.0

    def __post_init__(self) -> None:
        super(SparseVLM, self).__post_init__()  # its schedule is none of this version's
        if self.kept:
            raise refuse(self, "kept", "empty: scale and bias say what is kept")
        if not self.scale and not self.bias:
            raise refuse(self, "scale", "above 0 where bias is 0, for this keeps nothing")

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The released numbers for a share of the tokens; the outcome depends on the question."""
        check_budget(kept_tokens, total_tokens)
        if kept_tokens == total_tokens:
            return cls(scale=0.0, bias=float(total_tokens))
        nominal = _nominal(kept_tokens, total_tokens)
        scale, bias = (x * kept_tokens / nominal for x in PAPER_RANK[nominal])
        return cls(scale=scale, bias=bias)

    def check(self, shape: Shape) -> None:
        """There must be layers to cut at."""
        _needs_layers(self.key, shape)

    def _counts(
        self,
        view: LayerView,
        attention: Float[Tensor, "images text visual"],
        raters: Bool[Tensor, "images text"],
    ) -> tuple[int, ...]:
        if attention.is_meta:
            raise UnsupportedError(
                "sparsevlm_rank keeps what an attention map's rank says, and a model without "
                "weights has none; use sparsevlm."
            )
        counts = []
        for rows, asked, n, crops in zip(attention, raters, view.counts, view.crops, strict=True):
            rank = int(torch.linalg.matrix_rank(rows[asked][:, :n].float())) if n else 0
            keep = int(rank * self.scale + self.bias)  # per crop, as budgets are
            everything = rank == n or keep >= view.patches
            counts.append(n if everything else min(keep * crops, n))
        return tuple(counts)


def _nominal(kept_tokens: int, total_tokens: int) -> int:
    """The largest released budget that is not above this one's share, or the smallest."""
    share = kept_tokens / total_tokens * 576
    return max((n for n in PAPER_KEPT if n <= round(share)), default=min(PAPER_KEPT))


def _needs_layers(key: str, shape: Shape) -> None:
    if shape.decoder_layers < 2:
        raise UnsupportedError(
            f"{key} drops tokens between decoder layers, and this decoder has "
            f"{shape.decoder_layers}; use a method that acts before it, such as visionzip."
        )


def _raters(view: LayerView) -> Bool[Tensor, "images text"]:
    """The words that resemble the image more than the average word does."""
    text, entered = view.text, torch.tensor(view.entered)
    visual = torch.arange(text.visual.shape[1]) < entered[:, None]
    visual = visual.to(text.visual.device)
    products = text.visual @ text.embeddings[view.rows].transpose(1, 2)
    nowhere = torch.finfo(products.dtype).min
    share = softmax(products.masked_fill(~text.behind[:, None], nowhere)) * visual[..., None]
    relevance = share.sum(1) / visual.sum(-1, keepdim=True)
    mean = relevance.sum(-1, keepdim=True) / text.behind.sum(-1, keepdim=True)
    raters = text.behind & (relevance > mean)
    return raters | (text.behind & ~raters.any(-1, keepdim=True))  # all alike, or only one word


def _kept_and_recycled(
    view: LayerView, score: Float[Tensor, "images visual"], counts: tuple[int, ...]
) -> Kept:
    """The best tokens of each image, and clusters of the better ones among the others."""
    if counts == view.counts:
        every = torch.arange(view.visual.shape[1], device=score.device)
        return Kept(every.expand_as(view.visual), counts)
    dropped = [n - k for n, k in zip(view.counts, counts, strict=True)]
    chosen = [int(0.3 * d) + 1 if d else 0 for d in dropped]
    clusters = [c // 10 + 1 if c else 0 for c in chosen]
    total = tuple(k + c for k, c in zip(counts, clusters, strict=True))
    tokens, (images, most) = view.tokens, (len(counts), max(total))
    index = torch.zeros(images, most, dtype=torch.long, device=tokens.device)
    holds, values = torch.full_like(index, MERGED_SOURCE), tokens.new_zeros(images, most, 1)
    values = values.expand(-1, -1, tokens.shape[-1]).clone()
    order = score.argsort(dim=-1, descending=True, stable=True)
    sizes = list(zip(view.counts, counts, chosen, clusters, strict=True))
    for n, k, c, new in dict.fromkeys(sizes):  # images of a kind together
        rows = torch.tensor([i for i, s in enumerate(sizes) if s == (n, k, c, new)])
        rows = rows.to(tokens.device)
        kept, pool = order[rows, :k].sort(-1).values, order[rows, k : k + c]
        every = torch.arange(n - k - new, n, device=tokens.device)
        index[rows, : k + new] = every  # which places stay does not matter: ids close the gaps
        holds[rows, :k] = kept
        merged = _clustered(tokens[rows[:, None], pool], new)
        values[rows, : k + new] = torch.cat([tokens[rows[:, None], kept], merged], 1)
    return Kept(index, total, values, holds)


def _clustered(
    tokens: Float[Tensor, "images tokens width"], clusters: int
) -> Float[Tensor, "images clusters width"]:
    """Means of density-peak clusters, the clearest centre first."""
    if not clusters:
        return tokens[:, :0]
    with torch.no_grad():
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        distance = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
        distance = torch.maximum(distance, distance.mT) / tokens.shape[-1] ** 0.5
        near = distance.topk(clusters, dim=-1, largest=False).values
        density = (-near.square().mean(-1)).exp()
        # Each other's nearest tokens are equally dense: only one of them may become a centre.
        equal = (density[:, None] == density[:, :, None]).tril(-1)
        denser = (density[:, None] > density[:, :, None]) | equal
        furthest = distance.flatten(1).amax(1)[:, None, None]
        gap = distance.where(denser, furthest).amin(-1)
        centre = (gap * density).argsort(dim=-1, descending=True, stable=True)[:, :clusters]
        to_centre = distance.gather(1, centre[..., None].expand(-1, -1, distance.shape[-1]))
        number = torch.arange(clusters, device=tokens.device)
        joins = to_centre.argmin(1).scatter(1, centre, number.expand_as(centre))
        weight = (joins[:, None] == number[:, None]).to(tokens.dtype)
    return weight / weight.sum(-1, keepdim=True) @ tokens
