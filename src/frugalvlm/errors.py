"""The ground that every known problem stands on."""

from __future__ import annotations

__all__ = ["FrugalError"]


class FrugalError(Exception):
    """A problem that the kit knows: its message is one sentence that names the remedy.

    Each derives from it where it belongs, beside the built-in error that Python users expect.
    """
