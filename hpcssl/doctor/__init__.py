"""Checks of a machine and of a cluster."""
