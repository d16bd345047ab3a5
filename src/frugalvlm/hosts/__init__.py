"""Model families that methods can act on."""

from typing import Any

from torch import nn

from frugalvlm.hosts.base import Host
from frugalvlm.hosts.llava import LlavaHost, LlavaNextHost, LlavaOnevisionHost
from frugalvlm.views import UnsupportedError

HOSTS: dict[str, type[Host]] = {
    "llava": LlavaHost,
    "llava_next": LlavaNextHost,
    "llava_onevision": LlavaOnevisionHost,
}

__all__ = ["HOSTS", "Host", "LlavaHost", "LlavaNextHost", "LlavaOnevisionHost", "host_for", "whole"]


def host_for(model: Any) -> Host:
    """The host of a model, by its configuration's `model_type`.

    Raises:
        UnsupportedError: for a family that no host knows; the message lists the known ones. Also
            for what is no whole model: compiled, replicated, or without its output layer.
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
    """The model itself, out of a `peft.PeftModel`, whose adapters live in its very modules.

    Raises:
        UnsupportedError: for other wrappers, and for compiled modules.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedError(
            f"This is a {type(model).__name__} around the model; put the method on its .module and "
            "run that, one process per device."
        )
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    compiled = next((name or "model" for name, part in modules if _is_compiled(part)), None)
    if compiled is not None:
        raise UnsupportedError(
            f"'{compiled}' is compiled (torch.compile), and compiled code does not run hooks as "
            "they come; put the method on the model as it was loaded."
        )
    return model


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
