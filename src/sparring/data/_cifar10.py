"""CIFAR-10 from its binary distribution (Krizhevsky 2009, "Learning multiple layers of features from tiny images")."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import DataError
from ._places import Content, File, Find, Source
from ._types import Dataset, Split, from_splits

VALID = 5_000
RECORDS, RECORD = 10_000, 1 + 3 * 32 * 32  # a label, then the red, green and blue planes

# The sum is that of the packed archive, published beside it; the files in it are checked by their structure.
CIFAR10 = Source(
    name="cifar10",
    files=(*(File(f"data_batch_{number}.bin") for number in range(1, 6)), File("test_batch.bin")),
    folders=("cifar10", "cifar10/cifar-10-batches-bin", "cifar-10-batches-bin", ""),
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    archive=File("cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(find: Find) -> Dataset:
    """Load CIFAR-10: 45,000 training, 5,000 validation (the last of the fifth batch) and 10,000 test images."""
    batches = [_batch(content) for content in find(CIFAR10)]
    x, y = (torch.cat(parts) for parts in zip(*batches[:5], strict=True))
    kept = len(x) - VALID
    train, valid = Split(x[:kept], y[:kept]), Split(x[kept:], y[kept:])
    return from_splits("cifar10", train, valid, batches[5], classes=10, class_names=CLASSES)


def _batch(content: Content) -> Split:
    if len(content.data) != RECORDS * RECORD:
        raise DataError(
            f"{content.where} has {len(content.data):,} bytes, not {RECORDS * RECORD:,}: it is truncated, or not a "
            "file of CIFAR-10's binary version; get it again"
        )
    records = np.frombuffer(content.data, np.uint8).reshape(RECORDS, RECORD)
    labels = records[:, 0]
    if int(labels.max()) > 9:
        at = int((labels > 9).argmax())
        raise DataError(f"{content.where} has the label {int(labels[at])} at image {at}; labels go from 0 to 9")
    x = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy())
    return Split(x, torch.from_numpy(labels.astype(np.int64)))
