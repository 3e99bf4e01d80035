"""The verbs, one module each: what is missing is done here, or submitted."""
