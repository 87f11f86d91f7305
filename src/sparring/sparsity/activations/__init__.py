"""Sparse activations: modules that create them, and measurements of them."""
