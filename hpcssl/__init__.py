"""hpcssl: pretraining of pathology foundation models, exact from tiles to benchmark."""

__version__ = "0.1.0"
