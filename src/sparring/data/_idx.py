"""MNIST and Fashion-MNIST from IDX files (LeCun, Cortes & Burges, "The MNIST database"; Xiao et al. 2017)."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..errors import DataError
from ..files import sha256_bytes
from ._places import Content, File, Find, Source
from ._types import Dataset, Split, from_splits

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

VALID = 5_000

MNIST = Source(
    name="mnist",
    files=(
        File("train-images-idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        File("train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
        File("t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        File("t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    ),
    folders=("mnist", ""),
    mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
)

FASHION_MNIST = Source(
    name="fashion-mnist",
    files=(
        File("train-images-idx3-ubyte", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        File("train-labels-idx1-ubyte", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
        File("t10k-images-idx3-ubyte", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        File("t10k-labels-idx1-ubyte", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    ),
    folders=("fashion-mnist", ""),
    mirrors=(
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    hint="On Debian and Ubuntu: apt-get install dataset-fashion-mnist",
)

FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def mnist(find: Find) -> Dataset:
    """Load MNIST: 55,000 training, 5,000 validation (the last of the training file) and 10,000 test images."""
    return _load(MNIST, find, tuple("0123456789"))


def fashion_mnist(find: Find) -> Dataset:
    """Load Fashion-MNIST: 55,000 training, 5,000 validation (the last of the training file) and 10,000 test images."""
    return _load(FASHION_MNIST, find, FASHION_CLASSES)


def _load(source: Source, find: Find, class_names: tuple[str, ...]) -> Dataset:
    contents = find(source)
    _refuse_namesake(source, contents[3])
    train = _split(contents[0], contents[1], 60_000)
    test = _split(contents[2], contents[3], 10_000)
    kept = len(train.x) - VALID
    return from_splits(
        source.name,
        Split(train.x[:kept], train.y[:kept]),
        Split(train.x[kept:], train.y[kept:]),
        test,
        classes=len(class_names),
        class_names=class_names,
    )


def _refuse_namesake(source: Source, test_labels: Content) -> None:
    # Both sets have the same file names, so the one may lie where the other is expected.
    found = sha256_bytes(test_labels.data)
    for other in (MNIST, FASHION_MNIST):
        if other.name != source.name and found == other.files[3].sha256:
            raise DataError(
                f"{test_labels.where} belongs to '{other.name}'; "
                f"put the files of '{source.name}' into a folder called {source.folders[0]}"
            )


def _split(images: Content, labels: Content, count: int) -> Split:
    x, y = read_idx(images), read_idx(labels)
    for content, array, shape in ((images, x, (count, 28, 28)), (labels, y, (count,))):
        if array.shape != shape:
            raise DataError(f"{content.where} has the shape {array.shape}, not {shape}; get the original file")
    if int(y.max()) > 9:
        at = int((y > 9).argmax())
        raise DataError(f"{labels.where} has the label {int(y[at])} at image {at}; labels go from 0 to 9")
    return Split(torch.from_numpy(x.copy()).unsqueeze(1), torch.from_numpy(y.astype(np.int64)))


def read_idx(content: Content) -> Bytes:
    """Return the uint8 array in an IDX file, read-only; raise DataError, naming the file, if it is not a whole one."""
    data = content.data
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise DataError(f"{content.where} is not an IDX file of bytes; get it again")
    start = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4))
    if len(data) != start + math.prod(shape):
        raise DataError(
            f"{content.where} is truncated or damaged: its header promises {start + math.prod(shape):,} bytes "
            f"for shape {shape}, it has {len(data):,}; get it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
