"""frugalvlm: a Jupyter-first reproducibility study kit for efficient vision-language models."""

from frugalvlm import methods
from frugalvlm.loading import load_vlm

__version__ = "0.1.0"

__all__ = ["__version__", "load_vlm", "methods"]
