"""How work is launched: profiles, submitit, SLURM, ranks, requeues, arrays; what the work is, callers say."""
