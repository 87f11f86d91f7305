"""The known sets: where their files are looked for, how they are split, and what is refused."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sparring import data
from sparring.data import _registry as registry
from sparring.data._places import SYSTEM_ROOTS
from sparring.data.formats._known_sets import CIFAR10, FASHION_MNIST, MNIST, RECORD, RECORDS
from sparring.errors import DataError


@pytest.fixture(autouse=True)
def _no_other_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARRING_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_idx(path: Path, shape: tuple[int, ...], body: bytes = b"") -> None:
    """Write an IDX file of bytes, zeros after `body`; the zeros take no room on disk."""
    header = bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + body)
    os.truncate(path, len(header) + int(np.prod(shape)))


def write_mnist(folder: Path) -> list[Path]:
    """Write blank files of MNIST's shapes, with labels that go round."""
    paths = [folder / file.name for file in MNIST.files]
    write_idx(paths[0], (60_000, 28, 28), b"\xff" * 784)
    write_idx(paths[1], (60_000,), bytes(range(10)) * 6_000)
    write_idx(paths[2], (10_000, 28, 28))
    write_idx(paths[3], (10_000,), bytes(range(10)) * 1_000)
    return paths


@pytest.mark.parametrize("folder", ["mnist", ""])
def test_mnist_is_read_from_both_layouts_and_keeps_the_last_for_validation(tmp_path: Path, folder: str) -> None:
    paths = write_mnist(tmp_path / folder)
    labels = paths[1].read_bytes()[:-1] + b"\x03"
    paths[1].unlink()
    paths[1].with_name(paths[1].name + ".gz").write_bytes(gzip.compress(labels, 1))
    mnist = data.load("mnist", tmp_path)
    assert [len(split.x) for split in (mnist.train, mnist.valid, mnist.test)] == [55_000, 5_000, 10_000]
    assert int(mnist.valid.y[-1]) == 3
    assert int(mnist.train.x[0].min()) == 255
    assert mnist.mean == pytest.approx([1 / 55_000])


def test_places_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> str:
        return next(place.where for place in data.available(tmp_path / "given") if place.name == "mnist")

    monkeypatch.setenv("SPARRING_DATA", str(tmp_path / "named"))
    (tmp_path / "given").mkdir()
    (tmp_path / "named").mkdir()
    for folder in (tmp_path / "cache" / "sparring", tmp_path / "named", tmp_path / "given"):
        write_mnist(folder / "mnist")
        assert found() == str(folder / "mnist")
    (tmp_path / "given" / "mnist" / MNIST.files[2].name).unlink()
    assert found() == str(tmp_path / "named" / "mnist")


@pytest.mark.parametrize(
    ("file", "shape", "body", "words"),
    [
        (1, (60_000,), b"\0" * 7 + b"\x0a", "label 10 at image 7"),
        (1, (59_999,), b"", r"shape \(59999,\)"),
        (0, (60_000, 28, 27), b"", r"shape \(60000, 28, 27\)"),
        (3, (10_000, 1), b"", "shape"),
        (2, (60_000, 28, 28), b"", "shape"),
    ],
)
def test_mnist_files_that_are_not_mnist_are_named(
    tmp_path: Path, file: int, shape: tuple[int, ...], body: bytes, words: str
) -> None:
    paths = write_mnist(tmp_path)
    write_idx(paths[file], shape, body)
    with pytest.raises(DataError, match=words) as caught:
        data.load("mnist", tmp_path)
    assert str(paths[file]) in str(caught.value)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    paths = write_mnist(tmp_path)
    os.truncate(paths[0], 1_000_000)
    with pytest.raises(DataError, match="truncated") as caught:
        data.load("mnist", tmp_path)
    assert str(paths[0]) in str(caught.value)


@pytest.mark.skipif(not (SYSTEM_ROOTS[0] / "fashion-mnist").is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_not_taken_for_mnist(tmp_path: Path) -> None:
    for file in FASHION_MNIST.files:
        (tmp_path / f"{file.name}.gz").symlink_to(SYSTEM_ROOTS[0] / "fashion-mnist" / f"{file.name}.gz")
    with pytest.raises(DataError, match="belongs to 'fashion-mnist'"):
        data.load("mnist", tmp_path)


def cifar_batches() -> dict[str, bytes]:
    """Return six batches: image i has label i % 10, and red, green and blue planes of 10, 20 and 30."""
    planes = b"".join(bytes([value]) * 1024 for value in (10, 20, 30))
    batch = b"".join(bytes([label]) + planes for label in range(10)) * (RECORDS // 10)
    return {file.name: batch for file in CIFAR10.files}


def write_cifar_archive(path: Path, batches: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, batch in batches.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(batch)
            archive.addfile(info, io.BytesIO(batch))


def test_cifar10_is_read_from_folder_and_archive(tmp_path: Path) -> None:
    batches = cifar_batches()
    write_cifar_archive(tmp_path / "cifar-10-binary.tar.gz", batches)
    packed = data.load("cifar10", tmp_path)
    (tmp_path / "plain" / "cifar-10-batches-bin").mkdir(parents=True)
    for name, batch in batches.items():
        (tmp_path / "plain" / "cifar-10-batches-bin" / name).write_bytes(batch)
    plain = data.load("cifar10", tmp_path / "plain")
    assert data.content_hash(packed) == data.content_hash(plain)
    assert [len(split.x) for split in (plain.train, plain.valid, plain.test)] == [45_000, 5_000, 10_000]
    assert plain.train.x[4].amax((1, 2)).tolist() == [10, 20, 30]
    assert plain.train.y[:12].tolist() == [*range(10), 0, 1]
    assert plain.class_names[3] == "cat"


def test_cifar10_that_is_not_whole_is_named(tmp_path: Path) -> None:
    batches = cifar_batches()
    path = tmp_path / "cifar-10-binary.tar.gz"
    name = "data_batch_3.bin"
    wrong = {
        "is truncated": batches[name][:-1],
        "label 11 at image 5": batches[name][: 5 * RECORD] + b"\x0b" + batches[name][5 * RECORD + 1 :],
    }
    for words, batch in wrong.items():
        write_cifar_archive(path, {name: batch} | {key: batches[key] for key in batches if key != name})
        with pytest.raises(DataError, match=f"{name} in .*{words}"):
            data.load("cifar10", tmp_path)
    write_cifar_archive(path, {name: batches[name]})
    with pytest.raises(DataError, match=r"does not contain data_batch_1\.bin"):
        data.load("cifar10", tmp_path)
    path.write_bytes(path.read_bytes()[:-1_000])
    with pytest.raises(DataError, match="damaged"):
        data.load("cifar10", tmp_path)


def test_download_happens_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def fetch(source: object, folder: Path, progress: object) -> None:
        asked.append(folder)
        write_mnist(folder)

    monkeypatch.setattr(registry, "fetch", fetch)
    with pytest.raises(DataError):
        data.load("mnist", tmp_path)
    assert asked == []
    assert len(data.load("mnist", tmp_path, download=True).test.y) == 10_000
    assert asked == [tmp_path / "mnist"]
    data.load("mnist", tmp_path, download=True)
    assert len(asked) == 1
