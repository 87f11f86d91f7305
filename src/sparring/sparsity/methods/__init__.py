"""Pruning during training: schedules, and methods that change masks."""
