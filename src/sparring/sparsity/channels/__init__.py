"""Whole channels: which layers share them, and networks really made smaller."""
