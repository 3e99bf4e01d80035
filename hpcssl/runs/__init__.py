"""The run folder: resolved config, checkpoints, metrics, restart history."""
