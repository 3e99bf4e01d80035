"""Slide tables; reading whole slides; tissue."""
