"""One step, the train state, the loop."""
