"""Splits, metrics, results; heads over bags, nearest neighbours."""
