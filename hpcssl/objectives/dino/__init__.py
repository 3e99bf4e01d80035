"""Self-distillation of a student by its own running mean (Caron et al. 2021)."""
