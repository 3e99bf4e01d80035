"""Values as functions of the step, parameter groups, gradient clipping."""
