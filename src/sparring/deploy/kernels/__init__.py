"""Sparse CPU kernels: code generation, planning and execution."""
