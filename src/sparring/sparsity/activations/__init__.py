"""Sparse activations: the modules that make them, and how sparse activations are."""
