"""Data sets as three splits of uint8 images; see `load`.

Examples:
    >>> from sparring import data
    >>> digits = data.load("digits")
    >>> digits.train.x.shape, digits.classes
    (torch.Size([1266, 1, 8, 8]), 10)
"""

from ._registry import DATASETS, Available, available, kind_of, load
from ._request import EVERYTHING, SPLITS, ClassList, Geometry, Preparation, Request, read_classes
from ._types import Dataset, Split, as_float, check_classes, content_hash, fixed_order, from_splits, untrained
from .formats._torch_datasets import from_torch

__all__ = [
    "DATASETS",
    "EVERYTHING",
    "SPLITS",
    "Available",
    "ClassList",
    "Dataset",
    "Geometry",
    "Preparation",
    "Request",
    "Split",
    "as_float",
    "available",
    "check_classes",
    "content_hash",
    "fixed_order",
    "from_splits",
    "from_torch",
    "kind_of",
    "load",
    "read_classes",
    "untrained",
]
