"""Verify properties of a network: questions in the verification competition's format, and a complete search."""
