"""Exact distances to the decision boundary of piecewise linear networks."""
