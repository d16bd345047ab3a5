"""Putting methods on unmodified models. Importing it registers what operates which kind."""

from frugalvlm.engine import composed, exits, guidance, lookahead, session

__all__ = ["composed", "exits", "guidance", "lookahead", "session"]
