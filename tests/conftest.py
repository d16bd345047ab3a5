"""Shared by all tests: one thread, tensor shapes checked, helper modules on the path."""

import sys
from pathlib import Path

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent / "contract"))

# The axes written in annotations are checked while tests run, and only then.
install_import_hook(
    [f"frugalvlm.{name}" for name in ("views", "trace", "engine", "hosts", "methods")],
    "shape_checks.check",
)
