"""The precomputed, organ-balanced order of tiles."""
