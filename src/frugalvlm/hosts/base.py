"""What the engine must know of a model family.

A host answers where things are (tower, projector, decoder layers, image tokens) and how this family
computes queries and keys. It knows no method, and changes nothing: the engine puts hooks on the
modules that it names.

To add a family, write one file and one line in `HOSTS` (`hosts/__init__.py`), under the
`model_type` of its configuration. Questions to answer, in this order:

1. *Does the projector act on one patch at a time, and has every picture the same grid?* Then tokens
   can be reduced in front of it: derive from `LlavaHost` (llava.py). Else from `UnitHost`
   (units.py), which reduces behind it, token by token in its place; or from `TileHost`, where
   pictures are cut into square tiles of one size.
2. *Where are the parts?* `tower`, `projector`, `language_model`, and `inner`, the model without its
   head. `placeholders` says which ids stand for pictures.
3. *How many tokens has a picture?* `sizes` (or `images`) deals placeholders out to pictures, from
   what the processor returns; where the tower ran before the call, from what it was given.
4. *What does the tower know of a token?* `read` names the modules whose inputs and outputs `view`
   makes queries and keys of: behind their norms and rotation, as the attention has them, in the
   order in which the language model reads the tokens, pooled where a token is of several patches.
   No [CLS]? Say in the docstring what stands in for it.
5. *What does the decoder add to pictures behind its entrance?* `planes` (Qwen3-VL). *What are its
   positions?* `keeps_positions` where a gap has no rule to close (3-D positions).
6. *Can its attention be read and its sequence be cut?* `check_decoder` knows the decoders in
   `DECODERS`; another one belongs there once its rows equal its eager maps.

`shape` tells methods what they may ask for; what it lacks they refuse, each with its own reason.
Then add the family to the contract tests (CONTRIBUTING.md): they run every method on it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from frugalvlm.views import Reduced, Shape, UnsupportedError, softmax

FamilyModule: TypeAlias = Any  # an nn.Module with attributes that only its family knows

# Decoders with pre-norm blocks, separate query, key and value projections, rotary positions in
# every layer, and a plain output layer: what scores, cuts and early exits are written for.
DECODERS = (
    "llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text",
)  # fmt: skip
TOWERS = ("clip_vision_model", "siglip_vision_model")  # with one crop per row and `encoder.layers`


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """One image of a prompt.

    Attributes:
        row: batch row.
        slots: positions of its placeholders in the prompt, ascending; on the CPU.
        crops: its crops in the tower's batch; of a video, whose frames are pooled, as many as its
            tokens would fill, so that a budget per crop keeps the same share of it.
        size: height and width in pixels (LLaVA-NeXT), (0, 0) for a single crop.
        tiles: rows and columns of tiles (LLaVA-NeXT), (0, 0) for a single crop, (frames, 0) for a
            video.
        grid: rows and columns of its tokens, per crop, where images have grids of their own; (0, 0)
            where they have the model's.
    """

    row: int
    slots: Int[Tensor, " slots"]
    crops: range
    size: tuple[int, int] = (0, 0)
    tiles: tuple[int, int] = (0, 0)
    grid: tuple[int, int] = (0, 0)


@dataclass
class TowerPass:
    """What is known of one run of a vision tower.

    Attributes:
        given: its arguments, by name.
        read: of every module in `Host.read` its arguments, by name, and its output.
    """

    given: dict[str, Any]
    read: dict[str, tuple[dict[str, Any], Any]] = field(default_factory=dict)


class Host(ABC):
    """A Transformers vision-language model, seen as tower, projector and decoder.

    Attributes:
        behind_projector: whether tokens are reduced behind the projector, in their places; else
            they are reduced in front of it and packed together.
        keeps_positions: whether tokens that are left keep their position ids; else the ids of what
            is behind a reduced image close the gap.
    """

    behind_projector: ClassVar[bool] = False
    keeps_positions: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: FamilyModule = model

    @property
    @abstractmethod
    def inner(self) -> FamilyModule:
        """The multimodal model without the language-modelling head."""

    @property
    @abstractmethod
    def tower(self) -> FamilyModule:
        """The vision tower."""

    @property
    @abstractmethod
    def projector(self) -> FamilyModule:
        """The module between tower features and word embeddings."""

    @property
    @abstractmethod
    def language_model(self) -> FamilyModule:
        """The decoder, with `layers`."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Sizes and abilities, for checks before any computing."""

    @property
    @abstractmethod
    def feature_module(self) -> FamilyModule:
        """The tower layer whose output are the features."""

    @property
    def feature_attention(self) -> FamilyModule:
        """Self-attention of the feature layer."""
        return self.feature_module.self_attn

    @property
    def following_module(self) -> FamilyModule:
        """The tower layer that reads the features.

        Raises:
            UnsupportedError: when the features leave the last layer.
        """
        layers = list(encoder_layers(self.tower))
        place = layers.index(self.feature_module) + 1
        if place == len(layers):
            raise UnsupportedError(
                "The features leave the tower's last layer, and this method reads the layer behind "
                "it; use a model with an earlier vision_feature_layer (LLaVA: -2)."
            )
        return layers[place]

    def check_decoder(self) -> None:
        """Refuse a decoder whose attention cannot be read, or whose sequence cannot be cut.

        Raises:
            UnsupportedError: another family, sliding windows, or an attention kernel of blocks.
        """
        config = self.language_model.config
        if config.model_type not in DECODERS:
            raise UnsupportedError(
                f"Methods that act inside the decoder read {', '.join(DECODERS)}; this model's is "
                f"'{config.model_type}': use one that acts before it, such as visionzip."
            )
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
            raise UnsupportedError(
                "This decoder attends in sliding windows, which count tokens that a cut takes "
                "away: use a method that acts before it, such as visionzip, or a model whose "
                "config has sliding_window=None."
            )
        if config._attn_implementation == "flex_attention":
            raise UnsupportedError(
                "Methods that act inside the decoder cut its masks, and flex_attention has none to "
                "cut: load the model with attn_implementation='sdpa'."
            )

    def placeholders(self, ids: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
        """Which tokens of a prompt stand for parts of pictures."""
        return ids == self.model.config.image_token_id

    @abstractmethod
    def images(
        self, placeholders: Tensor, inputs: dict, seen: TowerPass | None = None
    ) -> list[ImageLayout]:
        """The images of a prompt, in the order of their crops.

        Args:
            placeholders: bool [batch, length] on the CPU.
            inputs: the keyword arguments of the call.
            seen: the tower's run, where it was before the call (`generate`); hosts that reduce
                behind the projector only.
        """

    def planes(
        self, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Float[Tensor, "batch length width"]]]:
        """What the decoder adds to hidden states behind its first layers, one plane a layer.

        Args:
            kwargs: the decoder's arguments.

        Returns:
            The arguments without it, and the planes, 0 where nothing is added.
        """
        return kwargs, []

    def with_planes(self, planes: list[Float[Tensor, "batch length width"]]) -> dict[str, Any]:
        """The decoder's arguments that make it add such planes; what `planes` takes apart."""
        return {}

    def grid(self, image: ImageLayout) -> tuple[int, int]:
        """Rows and columns of patches of each of an image's crops."""
        return self.shape.grid if image.grid == (0, 0) else image.grid

    def patches(self, image: ImageLayout) -> int:
        """Patch tokens of each of an image's crops."""
        rows, cols = self.grid(image)
        return rows * cols

    def order(self, image: ImageLayout, reduced: Reduced) -> Int[Tensor, " kept"] | None:
        """The order in which the language model reads an image's reduced tokens.

        Indices into the image's crops x kept tokens, flattened; None for that very order.
        """
        return None

    def origin(self, image: ImageLayout) -> list[int]:
        """What each token of an untouched image stands for: crop x patches + patch, or -1."""
        return list(range(len(image.slots)))

    def tower_heads(
        self, projected: Float[Tensor, "crops positions width"]
    ) -> Float[Tensor, "crops heads positions head_dim"]:
        """Split a tower projection into heads."""
        attention = self.feature_attention
        return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    @property
    def tower_scale(self) -> float:
        """The factor on q.k in the tower's attention."""
        return float(self.feature_attention.scale)

    def attention_rows(
        self,
        attention: FamilyModule,
        hidden: Float[Tensor, "batch length width"],
        raw_keys: Float[Tensor, "batch length key_width"],
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        queries: Int[Tensor, "batch queries"],
        temperature: float = 1.0,
    ) -> Float[Tensor, "batch heads queries length"]:
        """Attention of chosen rows of a decoder layer, exactly as the layer computes it.

        Args:
            attention: the layer's self-attention module.
            hidden: what went into it.
            raw_keys: its key projection (before the rotary embedding).
            position_embeddings: cosines and sines of the whole sequence.
            mask: what the layer got: None (causal), 2-D padding, or 4-D bool or additive.
            queries: positions whose rows are wanted.
            temperature: divides the logits. Any but 1 is no longer the layer's attention; products
                are then taken in float32 or better, for it would enlarge their rounding.
        """
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        head_dim = attention.head_dim
        batch, length = hidden.shape[:2]
        index = queries[..., None].expand(-1, -1, hidden.shape[-1])
        q = attention.q_proj(hidden.gather(1, index)).unflatten(-1, (-1, head_dim))
        k = raw_keys.unflatten(-1, (-1, head_dim))
        # Families that normalise queries and keys (Qwen3) do so per head, before rotating.
        q = getattr(attention, "q_norm", nn.Identity())(q).transpose(1, 2)
        k = getattr(attention, "k_norm", nn.Identity())(k).transpose(1, 2)
        cos, sin = (t.expand(batch, -1, -1) for t in position_embeddings)
        at = queries[..., None].expand(-1, -1, cos.shape[-1])
        q, _ = rotate(q, q, cos.gather(1, at), sin.gather(1, at))
        k, _ = rotate(k, k, cos, sin)
        # Grouped-query attention: neighbouring query heads share a key head.
        q = q.unflatten(1, (k.shape[1], -1))
        if temperature != 1:
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k = q.to(wide) / temperature, k.to(wide)
        logits = (q @ k[:, :, None].transpose(-1, -2) * attention.scaling).flatten(1, 2)
        if mask is not None and mask.ndim == 4:  # it alone says who sees whom, later keys included
            rows = queries[:, None, :, None].expand(-1, -1, -1, length)
            picked = mask[..., :length].expand(batch, -1, -1, -1).gather(2, rows)
            if picked.dtype == torch.bool:
                hidden_keys = ~picked
            else:
                hidden_keys = picked <= torch.finfo(picked.dtype).min / 2
                logits = logits + picked.masked_fill(hidden_keys, 0)
        else:
            hidden_keys = torch.arange(length, device=q.device) > queries[:, None, :, None]
            if mask is not None:
                hidden_keys = hidden_keys | (mask[:, None, None, :length] == 0)
        return softmax(logits.masked_fill(hidden_keys, torch.finfo(logits.dtype).min))


def deal(
    placeholders: Bool[Tensor, "batch length"], sizes: Iterable[tuple[int, int, dict[str, Any]]]
) -> list[ImageLayout]:
    """Deal the placeholders of a batch out to its images, in reading order.

    Args:
        placeholders: where tokens of images stand, on the CPU.
        sizes: of every image its tokens, its crops, and what else its layout says.

    Raises:
        UnsupportedError: when they do not fit.
    """
    where = placeholders.nonzero()
    images: list[ImageLayout] = []
    start = crop = 0
    for length, crops, more in sizes:
        rows, slots = where[start : start + length].T
        if len(slots) < length or rows[0] != rows[-1]:
            raise UnsupportedError(
                f"Image {len(images)} needs {length} placeholders in one row of the batch; "
                "prepare the prompt with the model's own processor."
            )
        images.append(ImageLayout(int(rows[0]), slots, range(crop, crop + crops), **more))
        start, crop = start + length, crop + crops
    if start != len(where):
        raise UnsupportedError(
            f"The prompt holds {len(where)} image placeholders, but its images have {start} "
            "tokens; prepare it with the model's own processor."
        )
    return images


def encoder_layers(tower: nn.Module) -> nn.ModuleList:
    """The transformer layers of a vision tower, wherever its class keeps them.

    Raises:
        UnsupportedError: when there is no `encoder.layers`.
    """
    for module in tower.modules():
        layers = getattr(getattr(module, "encoder", None), "layers", None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise UnsupportedError(
        f"{type(tower).__name__} has no encoder.layers; known towers are CLIP and SigLIP."
    )
