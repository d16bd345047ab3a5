"""Putting methods on unmodified models. Importing it registers who operates which kind of method."""

from frugalvlm.engine import exits, guidance, lookahead, session

__all__ = ["exits", "guidance", "lookahead", "session"]
