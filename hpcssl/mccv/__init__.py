"""Monte-Carlo cross-validation: splits, batched fitting, metrics."""
