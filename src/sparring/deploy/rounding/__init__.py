"""Networks with int8 activations: which values are rounded and how, and their arithmetic in integers."""
