"""Kernels for 8-bit weights and activations: four channels in four bytes, multiplied and summed together."""
