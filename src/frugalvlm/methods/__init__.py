"""Every method of the kit, by name. Adding one: a file, a class, a line here."""

from frugalvlm.methods.base import EncoderReducer, LayerReducer, Method
from frugalvlm.methods.fastervlm import FasterVLM
from frugalvlm.methods.fastv import FastV
from frugalvlm.methods.random import Random
from frugalvlm.methods.vanilla import Vanilla
from frugalvlm.methods.visionzip import VisionZip, VisionZipMean

METHODS: dict[str, type[Method]] = {
    method.key: method for method in (Vanilla, Random, FastV, FasterVLM, VisionZip, VisionZipMean)
}

__all__ = [
    "METHODS",
    "EncoderReducer",
    "FastV",
    "FasterVLM",
    "LayerReducer",
    "Method",
    "Random",
    "Vanilla",
    "VisionZip",
    "VisionZipMean",
    "method_class",
]


def method_class(key: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if key not in METHODS:
        raise ValueError(f"Unknown method '{key}'. Known methods: {', '.join(METHODS)}.")
    return METHODS[key]
