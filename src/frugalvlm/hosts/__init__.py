"""Model families that methods can act on."""

from transformers import PreTrainedModel

from frugalvlm.hosts.base import Host
from frugalvlm.hosts.llava import LlavaHost, LlavaNextHost, LlavaOnevisionHost
from frugalvlm.views import UnsupportedError

HOSTS: dict[str, type[Host]] = {
    "llava": LlavaHost,
    "llava_next": LlavaNextHost,
    "llava_onevision": LlavaOnevisionHost,
}

__all__ = ["HOSTS", "Host", "LlavaHost", "LlavaNextHost", "LlavaOnevisionHost", "host_for"]


def host_for(model: PreTrainedModel) -> Host:
    """The host of a model, by its configuration's `model_type`.

    Raises:
        UnsupportedError: for a family that no host knows; the message lists the known ones.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in HOSTS:
        raise UnsupportedError(
            f"No host knows the model family '{family}'. Known families: {', '.join(HOSTS)}. "
            "A new one is one file in src/frugalvlm/hosts/."
        )
    return HOSTS[family](model)
