"""The verbs, one module each: what is missing, then here or as a job."""
