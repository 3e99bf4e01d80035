"""Feature files: one HDF5 file per slide."""
