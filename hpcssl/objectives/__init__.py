"""What is learnt: the contract of an objective, those that ship, and the registry of all."""
