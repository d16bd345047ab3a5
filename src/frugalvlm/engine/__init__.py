"""Putting methods on unmodified models. Importing it registers what operates which kind."""

from frugalvlm.engine import exits, guidance, lookahead, session

__all__ = ["exits", "guidance", "lookahead", "session"]
