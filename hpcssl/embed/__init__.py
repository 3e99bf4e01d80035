"""From a checkpoint to a feature file per slide."""
