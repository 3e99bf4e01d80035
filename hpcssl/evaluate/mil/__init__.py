"""Heads over the bags of slides, many at once."""
