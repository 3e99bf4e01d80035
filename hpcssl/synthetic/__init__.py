"""Drawn tissue and slides."""
