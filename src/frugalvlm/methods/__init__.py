"""Every method of the kit, by name. Adding one: a file, a class, its import and its name here."""

import inspect

from frugalvlm.methods.aim import AIM, AIMEarly, AIMMask, AIMMerge, AIMVideo
from frugalvlm.methods.avgpool import AvgPool
from frugalvlm.methods.base import Composed, EncoderReducer, LayerReducer, Method
from frugalvlm.methods.divprune import DivPrune
from frugalvlm.methods.downsample import Downsample
from frugalvlm.methods.dyvte import DyVTE, DyVTEFastV, DyVTERate, ManualExit
from frugalvlm.methods.early_exit import EarlyExit
from frugalvlm.methods.fastervlm import FasterVLM
from frugalvlm.methods.fastv import FastV
from frugalvlm.methods.gsearch import GSearch
from frugalvlm.methods.no_image import Blank, NoImage, NoImageAfter
from frugalvlm.methods.prumerge_plus import PruMergePlus
from frugalvlm.methods.pyramiddrop import PyramidDrop
from frugalvlm.methods.random import Random
from frugalvlm.methods.random_cut import (
    RandomAIM,
    RandomFastV,
    RandomGSearch,
    RandomPyramidDrop,
    RandomSGL,
    RandomSparseVLM,
)
from frugalvlm.methods.sgl import SGL
from frugalvlm.methods.sparsevlm import SparseVLM, SparseVLMRank
from frugalvlm.methods.tome import ToMe
from frugalvlm.methods.uniform import Uniform
from frugalvlm.methods.vanilla import Vanilla
from frugalvlm.methods.visionzip import VisionZip, VisionZipMean
from frugalvlm.methods.visionzip_dominant import VisionZipDominant
from frugalvlm.methods.vtw import VTW
from frugalvlm.views import UnsupportedError

# The one list: registry, tables and tab completion follow.
METHODS: dict[str, type[Method]] = {
    method.key: method
    for method in (
        Vanilla, Random, Uniform, AvgPool, Downsample, ToMe, DivPrune, PruMergePlus, FastV,
        FasterVLM, VisionZip, VisionZipMean, EarlyExit, AIM, AIMMask,
        PyramidDrop, GSearch,
        SparseVLM, SparseVLMRank, SGL, DyVTE,
    )
}  # fmt: skip
# What papers compare with themselves, in ablations and as controls: known by name, but no methods
# of their own, or without a budget that they keep.
VARIANTS: dict[str, type[Method]] = {
    kind.key: kind
    for kind in (
        AIMMerge, AIMEarly, AIMVideo, VisionZipDominant, VTW,
        ManualExit, DyVTERate, DyVTEFastV,
        Blank, NoImage, NoImageAfter,
        RandomFastV, RandomPyramidDrop, RandomGSearch, RandomSparseVLM, RandomAIM, RandomSGL,
    )
}  # fmt: skip
# What bounds a choice of tokens and chooses nothing itself, or not by what the picture shows.
# Tables show these apart; they are ranked with no method.
WITHOUT_BUDGET: tuple[str, ...] = ("blank", "no_image", "no_image_after")
CONTROLS: tuple[str, ...] = (
    *WITHOUT_BUDGET, "random", "uniform", "avgpool", "downsample",
    "random_fastv", "random_pyramiddrop", "random_gsearch", "random_sparsevlm", "random_aim",
    "random_sgl",
)  # fmt: skip
KINDS: tuple[type[Method], ...] = (Method, EncoderReducer, LayerReducer)  # to derive from

# `help()` wants plain text where a class keeps its docstring, not something that makes it.
for _kind in (*METHODS.values(), *VARIANTS.values()):
    _kind.__doc__ = inspect.getdoc(_kind)

__all__ = ["CONTROLS", "METHODS", "VARIANTS", "WITHOUT_BUDGET", "Composed", "method_class"]
__all__ += [kind.__name__ for kind in (*METHODS.values(), *VARIANTS.values(), *KINDS)]


def __dir__() -> list[str]:
    """Tab completion: methods, not the modules that they live in."""
    return sorted(__all__)


def method_class(key: str) -> type[Method]:
    """The class of a method, or of a variant.

    Raises:
        UnsupportedError: for an unknown name; the message lists the known ones.
    """
    known = {**METHODS, **VARIANTS}
    if key not in known:
        raise UnsupportedError(f"Unknown method '{key}'. Known methods: {', '.join(METHODS)}.")
    return known[key]
