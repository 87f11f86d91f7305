"""The data sets that this machine can load: shapes, fixed splits, identity, and clear errors for the rest."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring import data
from sparring.data._places import SYSTEM_ROOTS, File, Find, Source
from sparring.data._types import balanced_order
from sparring.errors import DataError, DataWarning, UnknownNameError

from .hostile_parts import arrays, image, pictures, zipped


@pytest.fixture(autouse=True)
def _no_other_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARRING_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def mnist_5k() -> data.Dataset:
    return data.load("mnist-5k")


def test_mnist_5k_is_split_as_promised(mnist_5k: data.Dataset) -> None:
    for split, count in ((mnist_5k.train, 350), (mnist_5k.valid, 50), (mnist_5k.test, 100)):
        assert split.x.shape == (10 * count, 1, 28, 28)
        assert split.x.dtype == torch.uint8
        assert torch.bincount(split.y).tolist() == [count] * 10
    assert mnist_5k.class_names == tuple("0123456789")


def test_no_image_of_mnist_5k_is_in_two_splits(mnist_5k: data.Dataset) -> None:
    every = torch.cat([mnist_5k.train.x, mnist_5k.valid.x, mnist_5k.test.x]).flatten(1)
    assert len(every.unique(dim=0)) == 5_000


def test_mnist_5k_is_these_images(mnist_5k: data.Dataset) -> None:
    assert data.content_hash(mnist_5k) == "cf374b5bb5f8a42fb7b495d6b7f99ff92084f186b127e7ed3ef3f42bc165b675"


def test_digits_prefixes_are_balanced() -> None:
    digits = data.load("digits")
    assert (len(digits.train.x), len(digits.valid.x), len(digits.test.x)) == (1266, 178, 353)
    assert digits.train.y[:100].bincount().tolist() == [10] * 10
    assert int(digits.train.x.max()) == 255


@pytest.mark.skipif(not (SYSTEM_ROOTS[0] / "fashion-mnist").is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_found_where_debian_puts_it() -> None:
    fashion = data.load("fashion-mnist")
    assert fashion.train.x.shape == (55_000, 1, 28, 28)
    assert fashion.test.y.bincount().tolist() == [1_000] * 10
    assert fashion.class_names[9] == "ankle boot"
    assert data.Available("fashion-mnist", str(SYSTEM_ROOTS[0] / "fashion-mnist")) in data.available()


def test_moments_are_those_of_the_training_images(mnist_5k: data.Dataset) -> None:
    x = data.as_float(mnist_5k.train.x).double()
    assert mnist_5k.mean == pytest.approx([float(x.mean())], rel=1e-6)
    assert mnist_5k.std == pytest.approx([float(x.std(correction=0))], rel=1e-6)


def test_floats_span_zero_to_one() -> None:
    x = data.as_float(torch.arange(256, dtype=torch.uint8))
    assert x.dtype == torch.float32
    assert (float(x[0]), float(x[255])) == (0.0, 1.0)


def _tiny(x: torch.Tensor | None = None, y: torch.Tensor | None = None) -> data.Dataset:
    split = data.Split(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4) % 2)
    changed = data.Split(split.x if x is None else x, split.y if y is None else y)
    return data.from_splits("tiny", split, split, changed, classes=2)


def test_a_constant_channel_has_no_deviation_to_divide_by() -> None:
    assert _tiny().std == (1.0,)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(4, 1, 2, 2), None, "uint8"),
        (torch.zeros(4, 2, 2, dtype=torch.uint8), None, "uint8 images"),
        (torch.zeros(4, 1, 2, 3, dtype=torch.uint8), None, "shape"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "no images"),
        (None, torch.zeros(3, dtype=torch.int64), "4 images but 3 labels"),
        (None, torch.tensor([0, 1, 2, 0]), "label 2 at image 2"),
        (None, torch.tensor([0, -1, 0, 0]), "label -1 at image 1"),
    ],
)
def test_bad_splits_are_refused(x: torch.Tensor | None, y: torch.Tensor | None, words: str) -> None:
    with pytest.raises(DataError, match=words):
        _tiny(x, y)


def test_identity_is_the_content_not_the_name(mnist_5k: data.Dataset) -> None:
    splits = (mnist_5k.train, mnist_5k.valid, mnist_5k.test)
    renamed = data.from_splits("other", *splits, classes=10)
    assert data.content_hash(renamed) == data.content_hash(mnist_5k)
    x = mnist_5k.test.x.clone()
    x[7, 0, 3, 3] += 1
    changed = data.from_splits("mnist-5k", *splits[:2], data.Split(x, mnist_5k.test.y), classes=10)
    assert data.content_hash(changed) != data.content_hash(mnist_5k)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_balanced_order_is_a_permutation_with_balanced_prefixes(labels: list[int]) -> None:
    y = torch.tensor(labels)
    order, rank = balanced_order(y)
    assert sorted(order.tolist()) == list(range(len(y)))
    assert rank.tolist() == sorted(rank.tolist())
    seen: dict[int, int] = {}
    for label, place in zip(y[order].tolist(), rank.tolist(), strict=True):
        assert seen.get(label, 0) == place
        seen[label] = place + 1


def test_missing_files_are_listed_with_their_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.load("mnist", tmp_path)
    text = str(caught.value)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"):
        assert name in text
    assert str(tmp_path / "mnist") in text
    assert str(tmp_path / "cache" / "sparring" / "mnist") in text
    assert "--download" in text


def test_unknown_names_get_the_nearest_match() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'mnist-5k'"):
        data.load("mnist-5000")


def test_root_that_does_not_exist_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="the data folder"):
        data.load("mnist", tmp_path / "nowhere")
    monkeypatch.setenv("SPARRING_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="SPARRING_DATA"):
        data.load("mnist")


def test_lossy_copies_and_namesakes_say_so(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(zipped(pictures({"train/cat/0.jpg": image("JPEG")})))
    (tmp_path / "cifar10.zip").write_bytes(zipped(pictures()))
    (tmp_path / "MNIST.npz").write_bytes(arrays())
    assert data.load(str(tmp_path / "photos.zip")).name == "photos-jpeg"
    assert data.load(str(tmp_path / "cifar10.zip")).name == "cifar10-user"
    assert data.load(str(tmp_path / "MNIST.npz")).name == "MNIST-user"


@pytest.mark.parametrize(
    "name", ["no/such/folder", "nothing.zip", "gone.npz", "~nobody-has-this-name/x", "a/" + "b" * 5_000]
)
def test_path_to_nothing_is_a_data_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check the path"):
        data.load(name, tmp_path)


def test_a_new_data_set_is_a_source_and_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = Source("blobs", (File("blobs.bin"),), folders=("blobs", ""), mirrors=())

    def load_blobs(find: Find) -> data.Dataset:
        (content,) = find(blobs)
        x = torch.frombuffer(bytearray(content.data), dtype=torch.uint8).view(-1, 1, 2, 2)
        return data.from_splits("blobs", *[data.Split(x, torch.arange(len(x)) % 2)] * 3, classes=2)

    monkeypatch.setitem(data.DATASETS, "blobs", load_blobs)
    with pytest.raises(DataError, match=r"blobs\.bin"):
        data.load("blobs", tmp_path)
    (tmp_path / "blobs.bin").write_bytes(bytes(range(16)))
    assert data.load("blobs", tmp_path).test.x[3].flatten().tolist() == [12, 13, 14, 15]


def test_what_is_available_can_be_asked_of_an_odd_folder(tmp_path: Path) -> None:
    (tmp_path / "odd:name.zip").write_bytes(b"")
    (tmp_path / "fine.npz").write_bytes(b"")
    assert [item.name for item in data.available(tmp_path) if str(tmp_path) in item.where] == ["fine"]


@pytest.mark.parametrize("name", ["X.NPZ", "x.Npz"])
def test_an_ending_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(arrays())
    assert data.load(str(tmp_path / name)).name.lower() == "x"


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "x.tar.xz"])
def test_a_file_of_another_kind_is_not_called_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name} is not one of .zip, .*numpy.savez"):
        data.load(str(tmp_path / name))


@pytest.mark.filterwarnings("default:.*more than one label")
def test_arrays_with_two_labels_for_an_image_are_told(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    x[25], x[27] = x[20], x[22]
    (tmp_path / "x.npz").write_bytes(
        arrays(x_train=x[:20], y_train=np.arange(20) % 2, x_test=x[20:], y_test=np.arange(10) % 2)
    )
    found = r"2 images have more than one label, such as a test image \('.'\) and a test image \('.'\)"
    with pytest.warns(DataWarning, match=found):
        data.load(str(tmp_path / "x.npz"))


@pytest.mark.filterwarnings("default:.*test images are also training")
def test_test_images_among_the_others_are_counted(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    for shared in (0, 3):
        content = arrays(x_train=x[:20], y_train=np.arange(20) % 2, x_test=x[20 - shared :], y_test=[0] * (10 + shared))
        (tmp_path / "x.npz").write_bytes(content)
        with warnings.catch_warnings(record=True) as told:
            data.load(str(tmp_path / "x.npz"))
        assert [str(one.message).rpartition(": ")[2] for one in told] == [
            f"{shared} of {10 + shared} test images are also training or validation images"
        ] * (shared > 0)
