"""Backends that execute a plan, and the prefetching stream."""
