"""frugalvlm: a Jupyter-first reproducibility study kit for efficient vision-language models.

Names are imported when they are used, so that what needs no model starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from frugalvlm import operators

if TYPE_CHECKING:
    from frugalvlm import carbon, methods
    from frugalvlm.door import compare, evaluate
    from frugalvlm.loading import load_vlm

__version__ = "0.1.0"

_PLACES = {
    "carbon": "frugalvlm.carbon",
    "compare": "frugalvlm.door",
    "evaluate": "frugalvlm.door",
    "load_vlm": "frugalvlm.loading",
    "methods": "frugalvlm.methods",
}

__all__ = ["__version__", "carbon", "compare", "evaluate", "load_vlm", "methods"]

# The front knows all floors: it tells the methods' floor where their operators are.
operators.fill_from(lambda: importlib.import_module("frugalvlm.engine"))


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_PLACES[name])
    return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
