"""The kinds of methods, and the one call that puts a method on a model.

A method is a frozen dataclass of the paper's hyper-parameters. It keeps no state between calls:
`on` returns a context manager that owns all state, and a trace of what was kept.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from jaxtyping import Bool, Float, Int
from torch import Tensor

from frugalvlm.methods.fields import (
    RUNTIME,
    FullDoc,
    PlainSignature,
    Tokens,
    refuse,
    short,
    shown,
    validate,
    whole,
)  # fmt: skip
from frugalvlm.operators import operator_of
from frugalvlm.trace import ExitTrace, Trace
from frugalvlm.views import (
    BudgetError,
    EncoderView,
    Kept,
    LayerView,
    Reduced,
    Shape,
    SmallModel,
    UnsupportedError,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Method(ABC):
    """A way to make a vision-language model cheaper.

    What a field may hold is said by its annotation (`frugalvlm.methods.fields`) and checked when
    an object is made. A class that needs more than its fields one by one checks that in its own
    `__post_init__`, behind `super().__post_init__()`.

    Attributes:
        key: the method's one name everywhere (file, records, tables).
        picture_share: what `for_share` was asked for, instead of numbers of tokens.
    """

    picture_share: float | None = field(default=None, repr=False, kw_only=True, metadata=RUNTIME)
    key: ClassVar[str]
    needs_cls: ClassVar[bool] = False  # works only with a vision tower that has a [CLS] token
    adaptive: ClassVar[bool] = False  # keeps what an image needs; a budget is only aimed at
    __signature__: ClassVar[Any] = PlainSignature()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Words for people: docstrings that hold arguments and paper, short reprs."""
        super().__init_subclass__(**kwargs)
        module = getattr(sys.modules.get(cls.__module__), "__doc__", None) or ""
        if not any(line.startswith(("Paper:", "Source:")) for line in module.splitlines()):
            module = ""  # a room of kinds, or a notebook
        own = cls.__dict__.get("__doc__") or ""
        if not isinstance(own, FullDoc) and "key" in cls.__dict__:
            setattr(cls, "__doc__", FullDoc(own, module))  # noqa: B010 - no plain text
        if "__repr__" not in cls.__dict__:  # a dataclass would write its own
            setattr(cls, "__repr__", cls.__repr__)  # noqa: B010

    def __post_init__(self) -> None:
        validate(self)

    def __repr__(self) -> str:
        if self.picture_share is not None:
            return f"{type(self).__name__}.for_share({self.picture_share:g})"
        return short(self)

    @classmethod
    @abstractmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The method's own hyper-parameters for a number of visual tokens per crop.

        Args:
            kept_tokens: visual tokens to keep, per crop.
            total_tokens: visual tokens of an untouched crop.

        Raises:
            BudgetError: when `kept_tokens` is not in 1..`total_tokens`.
        """

    @classmethod
    def for_share(cls, share: float) -> Self:
        """The method at a share of each picture's visual tokens, rounded down, at least one.

        What that means in tokens is known when a picture is seen: `fitted`. Until then its fields
        are those for a picture of 576; what `dataclasses.replace` sets otherwise stays.

        Args:
            share: above 0, at most 1.

        Raises:
            BudgetError: for another share.
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise BudgetError(
                f"A share of visual tokens is a number above 0 and at most 1, got {shown(share)}."
            )
        return replace(cls.for_budget(tokens_of(share, 576), 576), picture_share=float(share))

    def fitted(self, patches: int) -> Self:
        """This method for pictures of so many visual tokens per crop.

        A share becomes a number of them; a number above them becomes all of them.
        """
        if self.picture_share is not None:
            usual, made = (
                type(self).for_budget(tokens_of(self.picture_share, n), n) for n in (576, patches)
            )
            told = {f.name: getattr(self, f.name) for f in fields(self)}
            own = {name: value for name, value in told.items() if value != getattr(usual, name)}
            return replace(made, **{**own, "picture_share": None})
        if (getattr(self, "kept_tokens", None) or 0) <= patches:
            return self
        return replace(self, **{"kept_tokens": patches})

    def check(self, shape: Shape) -> None:  # noqa: B027 - a method may have nothing to refuse
        """Refuse, before any computing, a model or a budget that cannot work.

        Raises:
            UnsupportedError: the model lacks what the method needs.
            BudgetError: the budget does not fit the model.
        """

    def on(
        self, model: PreTrainedModel, placeholders: Tensor | None = None
    ) -> AbstractContextManager[Trace]:
        """Run the model with this method inside a `with` block.

        Args:
            model: an unmodified Transformers vision-language model.
            placeholders: bool [batch, length] on the CPU, where the prompt holds visual tokens;
                needed only for inputs without values (meta tensors).

        Returns:
            A context manager that gives the trace. After it the model is as before. A cache that
            was filled inside the block goes on only inside a block of the same method.

        Raises:
            UnsupportedError: for a model family that no host knows, or a missing ability.
            BudgetError: for a budget that does not fit the model.
        """
        return operator_of(type(self))(self, model, placeholders)

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that it is made of: itself alone, unless it is composed."""
        return (self,)

    def __or__(self, other: Method) -> Composed:
        """Both on one model, this one first: what two nested blocks do, as one method.

        Example: `VisionZip(dominant=28, contextual=4) | FastV(16)`.
        """
        if not isinstance(other, Method):
            return NotImplemented
        return Composed((*self.parts, *other.parts))

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, as records keep them."""
        told = [f.name for f in fields(self) if not f.metadata.get("runtime")]
        values = {name: getattr(self, name) for name in told}
        shared = {} if self.picture_share is None else {"picture_share": self.picture_share}
        return {
            "method": self.key,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
            **shared,
        }


class EncoderReducer(Method):
    """Acts between vision tower and language model: selects and merges patch tokens."""

    def shrink(
        self, pixels: Float[Tensor, "crops 3 height width"], grid: tuple[int, int]
    ) -> Float[Tensor, "crops 3 new_height new_width"]:
        """The picture that the vision tower gets to see: as it is, unless a method says otherwise.

        Args:
            pixels: what the processor made.
            grid: rows and columns of patches in it.
        """
        return pixels

    @abstractmethod
    def reduce(self, view: EncoderView) -> Reduced:
        """The tokens to hand over."""


class FrameReducer(EncoderReducer):
    """Takes videos, too, whose frames the model pools behind the projector."""

    @abstractmethod
    def reduce_frames(
        self, frames: Float[Tensor, "frames tokens width"], patches: int
    ) -> Float[Tensor, "frames kept width"]:
        """The tokens of each frame that the language model reads.

        Args:
            frames: what it would read of an untouched video, projected and pooled.
            patches: patch tokens of an untouched crop, to which a budget per crop refers.
        """


@dataclass(frozen=True)
class SizedReducer(EncoderReducer):
    """An encoder reducer whose own parameter is the budget: visual tokens per crop.

    Attributes:
        kept_tokens: what the language model gets, exactly or at most, as the method says.
    """

    kept_tokens: Annotated[Tokens, "T, what the language model gets of a crop"]

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """The budget as it is; all else as by default."""
        check_budget(kept_tokens, total_tokens)
        return cls(kept_tokens)

    def check(self, shape: Shape) -> None:
        """The budget must be in 1..patches."""
        check_budget(self.kept_tokens, shape.most, self)


class LayerReducer(Method):
    """Acts before decoder layers: visual tokens that are dropped are gone from there on.

    Attributes:
        masks_only: dropped tokens stay in the sequence and are hidden from later layers by a mask,
            which saves nothing; some released code works so.
        renumbers: position ids close the gaps after a cut; otherwise tokens keep theirs.
    """

    masks_only: ClassVar[bool] = False
    renumbers: ClassVar[bool] = False

    @abstractmethod
    def layers(self, decoder_layers: int) -> tuple[int, ...]:
        """The decoder layers (0-based) before which tokens are dropped, ascending."""

    @abstractmethod
    def keep(self, view: LayerView) -> Kept:
        """The visual tokens that stay."""


@dataclass(frozen=True)
class LooksBehind(LayerReducer):
    """A layer reducer that ranks tokens by the attention of the layer behind its cuts.

    Attributes:
        behind: turns the view before a layer into the same view with the attention of that very
            layer; filled in while the method is on a model.
    """

    behind: Callable[[LayerView], LayerView] | None = field(
        default=None, repr=False, compare=False, kw_only=True, metadata=RUNTIME
    )


@dataclass(frozen=True)
class GuidedReducer(LayerReducer):
    """A layer reducer that asks a small model which tokens to keep.

    Attributes:
        guide: a `frugalvlm.views.SmallModel`, or a `frugalvlm.engine.guidance.Guide`.
        ask: what the guide says about a view's prompt; filled in while the method is on a model.
    """

    guide: Annotated[Any, "the small model that ranks; see `guided_by`"] = field(
        default=None, kw_only=True
    )
    ask: Callable[[LayerView], Any] | None = field(
        default=None, repr=False, compare=False, kw_only=True, metadata=RUNTIME
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide is not None and not hasattr(self.guide, "model"):
            raise refuse(self, "guide", "what guided_by(small_model) makes, or None")

    def __repr__(self) -> str:
        name = getattr(self.guide, "name", None)
        plain = short(replace(self, guide=None))
        return plain if self.guide is None else f"{plain[:-1]}, guide=<{name}>)"

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, as records keep them; the guide by its name."""
        return {**super().describe(), "guide": getattr(self.guide, "name", None)}

    def guided_by(self, model: PreTrainedModel, name: str = "", max_new_tokens: int = 10) -> Self:
        """The method with its small model; see `frugalvlm.views.SmallModel` for the arguments.

        Raises:
            UnsupportedError: for a model that is none, or a length that is no number of tokens.
        """
        if not hasattr(model, "config"):
            raise UnsupportedError(
                f"{self.key} is guided by a Transformers model, got {shown(model)}: load one, for "
                "instance with load_vlm."
            )
        if not whole(max_new_tokens) or max_new_tokens < 1:
            raise UnsupportedError(
                f"max_new_tokens={shown(max_new_tokens)} is impossible: a guide's answer has a "
                "whole number of tokens from 1."
            )
        return replace(self, guide=SmallModel(model, name, max_new_tokens))


class DepthPolicy(Method):
    """Acts per decoded token: which decoder block is its last.

    Attributes:
        kv_copy: what blocks that a token skips get in the KV cache: "hidden", "keys_values" or
            "recompute".
        first_layer: the first block, from 1, after which a token may leave.
    """

    kv_copy: str
    first_layer: int

    def on(
        self, model: PreTrainedModel, placeholders: Tensor | None = None
    ) -> AbstractContextManager[ExitTrace]:
        """Run the model with early exits inside a `with` block; see `Method.on`.

        Works for vision-language and for plain language models; `placeholders` is not needed.
        """
        return operator_of(type(self))(self, model, placeholders)

    @abstractmethod
    def score(
        self, logits: Float[Tensor, "tokens vocabulary"], repeats: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """What the gate looks at, per token.

        Args:
            logits: what the model's own output layer makes of the block's state.
            repeats: for how many blocks in a row the likeliest word has been what it is now.
        """

    @abstractmethod
    def fires(self, score: Float[Tensor, "*tokens"]) -> Bool[Tensor, "*tokens"]:
        """Whether a token with this score may leave."""


@dataclass(frozen=True)
class Composed(Method):
    """Several methods on one model, entered in order; what `A | B` gives.

    Attributes:
        members: at least two methods, the first one outermost.
    """

    members: Annotated[tuple[Method, ...], "method objects, the first one outermost"]

    def __post_init__(self) -> None:
        members = self.members if isinstance(self.members, tuple) else ()
        if len(members) < 2 or not all(isinstance(m, Method) for m in members):
            raise UnsupportedError(
                "A composed method has two or more method objects: write A | B, for example "
                "VisionZip(28, 4) | FastV(16)."
            )
        super().__post_init__()

    # A kind's own name and flags are known with the class; here the parts decide them.
    @property
    def key(self) -> str:  # type: ignore[override]
        """The keys of the parts, in order: `visionzip+fastv`."""
        return "+".join(member.key for member in self.members)

    @property
    def needs_cls(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(member.needs_cls for member in self.members)

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        """Whether any part is."""
        return any(member.adaptive for member in self.members)

    @property
    def parts(self) -> tuple[Method, ...]:
        """Its members."""
        return self.members

    @classmethod
    def for_budget(cls, kept_tokens: int, total_tokens: int = 576) -> Self:
        """No rule says how parts share a budget.

        Raises:
            BudgetError: always; says what to do.
        """
        raise BudgetError(
            "No rule shares a budget among the parts of a composed method: make each part with its "
            "own budget, for example VisionZip(28, 4) | FastV(16)."
        )

    def check(self, shape: Shape) -> None:
        """Each part must suit the model; what does not go together is refused on entering."""
        for member in self.members:
            member.check(shape)

    def describe(self) -> dict[str, Any]:
        """Its name, and all parts with their hyper-parameters."""
        return {"method": self.key, "parts": [member.describe() for member in self.members]}


def tokens_of(share: float, patches: int) -> int:
    """A share of so many tokens: rounded down, at least one.

    The slack is for products that are whole but for their last bit.
    """
    return max(1, int(share * patches + 1e-9))


def check_budget(kept_tokens: int, total_tokens: int, asked: Method | None = None) -> None:
    """Refuse a budget that is not in 1..`total_tokens`.

    Args:
        kept_tokens: visual tokens per crop.
        total_tokens: those of an untouched crop.
        asked: the method that was made for this budget.

    Raises:
        BudgetError: with the range that works.
    """
    for name, number in (("A budget", kept_tokens), ("total_tokens", total_tokens)):
        if not whole(number):
            raise BudgetError(f"{name} is a whole number of visual tokens, got {shown(number)}.")
    if total_tokens < 1:
        raise BudgetError(f"total_tokens is a whole number from 1, got {total_tokens}.")
    if not 1 <= kept_tokens <= total_tokens:
        whose = "" if asked is None else f" ({asked})"
        raise BudgetError(
            f"A budget of {kept_tokens} visual tokens{whose} is impossible with {total_tokens} "
            f"per crop: choose 1 to {total_tokens}."
        )


def check_keeps_all(key: str, kept_tokens: int, total_tokens: int) -> None:
    """Refuse any budget but `total_tokens`, for a method that leaves visual tokens alone.

    Raises:
        BudgetError: with the one that works.
    """
    check_budget(kept_tokens, total_tokens)
    if kept_tokens != total_tokens:
        raise BudgetError(
            f"{key} keeps every visual token, so a budget of {kept_tokens} of {total_tokens} is "
            f"impossible: choose {total_tokens}."
        )


def grid_cells(grid: tuple[int, int], count: int) -> list[int]:
    """Cut a grid of patches into exactly `count` cells, as square and as equal as can be.

    Rows are cut into about sqrt(count) bands, the cells are dealt out to the bands as evenly as
    possible, and each band is cut into its cells.

    Returns:
        The cell of every patch, in raster order; cells are numbered in raster order too.
    """
    rows, cols = grid
    bands = min(rows, count, max(-(-count // cols), round((count * rows / cols) ** 0.5)))
    firsts = [band * count // bands for band in range(bands + 1)]
    cells = []
    for y in range(rows):
        first, last = firsts[y * bands // rows], firsts[y * bands // rows + 1]
        cells += [first + x * (last - first) // cols for x in range(cols)]
    return cells
