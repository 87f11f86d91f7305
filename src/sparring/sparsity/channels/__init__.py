"""Whole channels: which layers share them, and how to remove them."""
