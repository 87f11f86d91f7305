"""Timing: one network in every engine that is installed, side by side, and which of them to ship."""
