"""From (seed, position, view) to the parameters of every crop, colour change and mask."""
