"""Deployment: pack a sparse network into one small file, run it fast on a CPU, and attack what is shipped."""

from __future__ import annotations

from .program import Program
from .runtime import Packed, export, load, pack

__all__ = ["Packed", "Program", "export", "load", "pack"]
