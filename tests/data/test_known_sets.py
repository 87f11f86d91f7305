"""Data sets from files: where they are looked for, what is refused, and what a user's own files become."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparring import data
from sparring.data import _registry as registry
from sparring.data._known_sets import CIFAR10, FASHION_MNIST, MNIST, RECORD, RECORDS
from sparring.data._places import SYSTEM_ROOTS, File, Find, Source
from sparring.errors import DataError, DataWarning

from .hostile_parts import arrays, image, pictures, zipped


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
    with pytest.raises(DataError, match=r"does not hold data_batch_1\.bin"):
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


def _unzip(packed: bytes, folder: Path) -> Path:
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(folder)
    return folder


def test_folder_and_zip_of_images_are_the_same_data(tmp_path: Path) -> None:
    members = {f"train/{c}/{n:02}.png": image(mode="L", size=(6, 5)) for c in ("ant", "bee") for n in range(20)}
    members |= {f"test/{c}/{n}.png": image(mode="L", size=(6, 5)) for c in ("ant", "bee") for n in range(3)}
    members |= {"README.txt": b"", "train/ant/._00.png": b"", "train/ant/notes.txt": b"", "__MACOSX/x/._a.png": b""}
    (tmp_path / "bugs.zip").write_bytes(zipped(members))
    for path in (tmp_path / "bugs.zip", _unzip(zipped(members), tmp_path / "bugs")):
        with pytest.warns(DataWarning, match=r"no images: 1 \(train/ant/notes.txt\)"):
            data.load(str(path))
    (tmp_path / "bugs" / "train" / "ant" / "notes.txt").unlink()
    members.pop("train/ant/notes.txt")
    (tmp_path / "bugs.zip").write_bytes(zipped(members))
    packed, plain = data.load(str(tmp_path / "bugs.zip")), data.load(str(tmp_path / "bugs"))
    assert data.content_hash(packed) == data.content_hash(plain)
    assert (packed.name, packed.class_names, packed.classes) == ("bugs", ("ant", "bee"), 2)
    assert packed.train.x.shape == (36, 1, 5, 6)
    assert (packed.valid.y.bincount().tolist(), packed.test.y.tolist()) == ([2, 2], [0, 1, 0, 1, 0, 1])
    assert data.load("bugs", tmp_path).name == "bugs"
    assert {item.name for item in data.available(tmp_path)} >= {"bugs"}


def test_pixels_arrive_where_they_belong(tmp_path: Path) -> None:
    pixels = torch.randint(256, (7, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    grey = image(mode="L", size=(4, 7))
    members = {f"{part}/a/{n}.png": file.getvalue() for part in ("train", "valid", "test") for n in range(2)}
    (tmp_path / "x.zip").write_bytes(zipped(members | {"test/a/2.png": grey}))
    loaded = data.load("x", tmp_path)
    assert torch.equal(loaded.train.x[1], pixels.permute(2, 0, 1))
    assert loaded.train.x.stride() == torch.empty(2, 3, 7, 4).stride()
    assert len(loaded.valid.x) == 2
    assert loaded.test.x[2].unique().tolist() == [100]


def test_noise_that_looks_like_jpeg_scans_is_read(tmp_path: Path) -> None:
    # A palette image that is stored, not deflated: the marks of scans stand in the PNG as they are.
    noise = Image.frombytes("P", (64, 64), b"\xff\xda" * 2_048)
    noise.putpalette([value for value in range(256) for _ in range(3)])
    file = io.BytesIO()
    noise.save(file, "PNG", compress_level=0)
    assert file.getvalue().count(b"\xff\xda") > 1_000
    members = {f"{part}/a/{n}.png": file.getvalue() for part in ("train", "test") for n in range(2)}
    (tmp_path / "noise.zip").write_bytes(zipped(members))
    assert data.load("noise", tmp_path).test.x.unique().tolist() == [0xDA, 0xFF]


def test_lossy_copies_and_namesakes_say_so(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(zipped(pictures({"train/cat/0.jpg": image("JPEG")})))
    (tmp_path / "cifar10.zip").write_bytes(zipped(pictures()))
    (tmp_path / "MNIST.npz").write_bytes(arrays())
    assert data.load(str(tmp_path / "photos.zip")).name == "photos-jpeg"
    assert data.load(str(tmp_path / "cifar10.zip")).name == "cifar10-user"
    assert data.load(str(tmp_path / "MNIST.npz")).name == "MNIST-user"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW", "fortran"])
def test_arrays_in_any_usual_layout(tmp_path: Path, layout: str) -> None:
    x = np.arange(20 * 3 * 4 * 5, dtype=np.int64).reshape(20, 3, 4, 5).astype(np.uint8)
    x = x[:, :1] if layout == "NHW" else x
    given = {"NHWC": x.transpose(0, 2, 3, 1), "NHW": x[:, 0], "fortran": np.asfortranarray(x)}.get(layout, x)
    y = np.arange(20)[:, None] % 2
    (tmp_path / "mine.npz").write_bytes(
        arrays(x_train=given, y_train=y, x_test=given, y_test=y, class_names=np.array(["no", "yes"]))
    )
    mine = data.load("mine", tmp_path)
    assert torch.equal(mine.test.x, torch.from_numpy(x))
    assert (len(mine.train.y), mine.valid.y.tolist()) == (18, [0, 1])
    assert mine.class_names == ("no", "yes")


def test_arrays_with_their_own_validation_split(tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_bytes(arrays(x_valid=np.ones((1, 8, 8), np.uint8), y_valid=np.array([1])))
    mine = data.load("mine", tmp_path)
    assert (len(mine.train.y), len(mine.valid.y)) == (4, 1)


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
