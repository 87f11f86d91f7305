"""Certified margins and radii: intervals, CROWN, and the relaxations behind them."""
