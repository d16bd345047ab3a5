"""Model families that methods can act on."""

from typing import Any

from torch import nn

from frugalvlm.hosts.base import Host
from frugalvlm.hosts.internvl import InternVLHost
from frugalvlm.hosts.llava import LlavaHost, LlavaNextHost, LlavaOnevisionHost
from frugalvlm.hosts.qwen_vl import Qwen2VLHost, Qwen3VLHost
from frugalvlm.hosts.smolvlm import SmolVLMHost
from frugalvlm.hosts.units import TileHost, UnitHost
from frugalvlm.views import UnsupportedError

HOSTS: dict[str, type[Host]] = {
    "llava": LlavaHost,
    "llava_next": LlavaNextHost,
    "llava_onevision": LlavaOnevisionHost,
    "qwen2_vl": Qwen2VLHost,
    "qwen2_5_vl": Qwen2VLHost,
    "qwen3_vl": Qwen3VLHost,
    "internvl": InternVLHost,
    "smolvlm": SmolVLMHost,
    "idefics3": SmolVLMHost,
}

__all__ = [
    "HOSTS",
    "Host",
    "InternVLHost",
    "LlavaHost",
    "LlavaNextHost",
    "LlavaOnevisionHost",
    "Qwen2VLHost",
    "Qwen3VLHost",
    "SmolVLMHost",
    "TileHost",
    "UnitHost",
    "host_for",
    "whole",
]


def host_for(model: Any) -> Host:
    """The host of a model, by its configuration's `model_type`.

    Raises:
        UnsupportedError: for a family that no host knows; the message lists the known ones. Also
            for what is no whole model: replicated, or without its output layer.
    """
    model = whole(model)
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in HOSTS:
        raise UnsupportedError(
            f"No host knows the model family '{family}'. Known families: {', '.join(HOSTS)}. "
            "A new one is one file in src/frugalvlm/hosts/."
        )
    if getattr(model, "lm_head", None) is None:
        raise UnsupportedError(
            f"This is the inner {type(model).__name__}, without an output layer; put the method on "
            "the whole ...ForConditionalGeneration model."
        )
    return HOSTS[family](model)


def whole(model: Any) -> Any:
    """The model itself, out of `torch.compile` or a `peft.PeftModel`.

    Adapters live in the model's very modules; compiled models run as they are written in a block.

    Raises:
        UnsupportedError: for wrappers that copy the model.
    """
    while isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedError(
            f"This is a {type(model).__name__} around the model; put the method on its .module and "
            "run that, one process per device."
        )
    return model
