"""frugalvlm."""
