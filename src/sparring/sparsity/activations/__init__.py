"""Activation sparsity: the modules, where they are put, and what they leave active."""
