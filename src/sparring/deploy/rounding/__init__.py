"""Networks on bytes: which values are rounded, to what, and what they compute in integers."""
