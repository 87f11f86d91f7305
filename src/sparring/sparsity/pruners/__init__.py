"""Pruning algorithms, each with the signature of `Pruner`."""
