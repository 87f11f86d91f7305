"""How masks come about during training: gradual schedules, and methods that move masks."""
