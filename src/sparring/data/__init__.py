"""Data sets as three splits of uint8 images; see `load`."""

from ._registry import DATASETS, Available, available, load
from ._types import Dataset, Split, as_float, content_hash, from_splits

__all__ = ["DATASETS", "Available", "Dataset", "Split", "as_float", "available", "content_hash", "from_splits", "load"]
