"""Errors, counter-based random numbers, the `World` value, atomic files, provenance, configuration."""
