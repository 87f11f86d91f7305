"""What a folder or zip of images holds is what is loaded: nothing is lost, shifted or read otherwise without a word."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from sparring import data
from sparring.errors import DataError, DataWarning

from .hostile_parts import arrays, image, zipped

Members = dict[str, bytes]


def members(classes: tuple[str, ...] = ("cat", "dog"), **more: bytes) -> Members:
    files = {
        f"{part}/{label}/{n}.png": image() for part, count in (("train", 4), ("test", 2)) for label in classes
        for n in range(count)
    }  # fmt: skip
    return files | more


def laid_out(files: Members, folder: Path) -> Iterator[Path]:
    """Yield a folder and a zip that hold these files; names that end in "/" are empty folders."""
    for name, content in files.items():
        path = folder / "set" / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(content)
    (folder / "set.zip").write_bytes(zipped(files))
    yield folder / "set"
    yield folder / "set.zip"


def png(pixels: np.ndarray, depth: int) -> bytes:
    """Write RGB pixels as a PNG of 8 or 16 bits a channel."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in pixels)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    text = b"\x89PNG\r\n\x1a\n"
    for kind, body in (*chunks, (b"IEND", b"")):
        text += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return text


def test_hidden_files_and_folders_are_no_data(tmp_path: Path) -> None:
    hidden = {
        f"{part}/{name}": image()
        for part in ("train", "test")
        for name in (".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0.png", "cat/._0.png", "__MACOSX/0.png")
    } | {
        "train/.DS_Store": b"x",
        "train/cat/Thumbs.db": b"x",
        "train/@eaDir/0.png": image(),
        "test/@eaDir/0.png": image(),
        "__MACOSX/train/cat/9.png": image(),
        ".git/train/a/0": b"",
    }
    for path in laid_out(members() | hidden, tmp_path):
        loaded = data.load(str(path))
        assert loaded.class_names == ("cat", "dog")
        assert (len(loaded.train.y) + len(loaded.valid.y), len(loaded.test.y)) == (8, 4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train/cow/": b""}, "no image that can be read in train/cow/"),
        ({"train/cow/0.heic": b"x", "test/cow/0.png": image()}, "no image that can be read in train/cow/"),
        ({"train/cow/0.txt": b"x"}, "no image that can be read in train/cow/"),
        ({"test/cow/0.png": image()}, "'cow' in test/ but not in train/"),
        ({"test/cow/": b""}, "'cow' in test/ but not in train/"),
        ({"valid/cow/0.png": image()}, "'cow' in valid/ but not in train/"),
        ({"classes.txt": b"cat\ndog\ncat\n"}, "twice"),
        ({"classes.txt": b"cat\n"}, "does not name it"),
        ({"train/cat/9.jpg": b"x"}, "train/cat/9.jpg"),
        ({"classes.txt": "caf\u00e9\n".encode("latin-1")}, "classes.txt in .* UTF-8"),
    ],
)
def test_what_would_lose_or_shift_a_class_is_refused(tmp_path: Path, more: Members, message: str) -> None:
    for path in laid_out(members() | more, tmp_path):
        with pytest.raises(DataError, match=message):
            data.load(str(path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({f"train/cat/{n}.svg": b"x" for n in range(4)}, r"no images: 4 \(train/cat/0.svg, .*, \.\.\.\)"),
        ({"train/0.png": image()}, r"no images: 1 \(train/0.png\)"),
        ({f"train/cat/more/{n}.png": image() for n in range(3)}, r"class's folder, not read: 1 \(train/cat/more\)"),
        ({"train/cow/0.png": image(), "train/cow/1.png": image()}, r"classes without images in test/: 1 \(cow\)"),
        ({"valid/dog/0.png": image()}, r"classes without images in valid/: 1 \(cat\)"),
        ({"more/cat/0.png": image(), "1.png": image()}, r"images outside of train/.*: 2 \(1.png, more/cat/0.png\)"),
    ],
)
def test_what_is_left_out_is_counted_and_named(tmp_path: Path, more: Members, message: str) -> None:
    for path in laid_out(members() | more, tmp_path):
        with pytest.warns(DataWarning, match=message):
            data.load(str(path))


def test_a_list_of_classes_fixes_the_labels(tmp_path: Path) -> None:
    names = [f"n{at:04}" for at in range(1000)]
    files = members(("n0243", "n0999")) | {"classes.txt": "\n".join(names).encode()}
    for path in laid_out(files, tmp_path):
        loaded = data.load(str(path))
        assert (loaded.classes, sorted(set(loaded.test.y.tolist()))) == (1000, [243, 999])


def test_a_list_of_classes_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    for path in laid_out(members() | {"classes.txt": "dog\ncat\n".encode("utf-8-sig")}, tmp_path):
        assert data.load(str(path)).class_names == ("dog", "cat")


@pytest.mark.parametrize("name", ["Classes.txt", "CLASSES.TXT"])
def test_a_list_of_classes_is_found_however_its_name_is_written(tmp_path: Path, name: str) -> None:
    for path in laid_out(members() | {name: b"dog\ncat\n"}, tmp_path):
        assert data.load(str(path)).class_names == ("dog", "cat")


@pytest.mark.parametrize("classes", [("1", "2", "10"), ("class 9", "class 10")])
def test_labels_that_do_not_count_as_their_names_do_are_named(tmp_path: Path, classes: tuple[str, ...]) -> None:
    for path in laid_out(members(classes), tmp_path):
        with pytest.warns(DataWarning, match="not as one counts; classes.txt may say another order"):
            data.load(str(path))
    for path in laid_out(members(classes) | {"classes.txt": "\n".join(classes).encode()}, tmp_path):
        assert data.load(str(path)).class_names == classes
    for path in laid_out(members(("01", "02", "10")), tmp_path / "padded"):
        assert data.load(str(path)).class_names == ("01", "02", "10")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test/cat/0.png": image()}, r"no images in train/<class>/; .* two of each class"),
        ({"train/cat/0.png": image()}, r"no images in test/<class>/; put some there"),
        ({"cat/0.png": image(), "dog/0.png": image()}, r"in train/<class>/, only cat/0.png, dog/0.png"),
        ({"Train/cat/0.png": image()}, r"in train/<class>/, only Train/cat/0.png"),
        ({"train/pets/cat/0.png": image()}, r"in train/<class>/, only train/pets/cat"),
        ({"train/0.png": image()}, r"in train/<class>/, only train/0.png"),
    ],
)
def test_a_set_without_a_part_is_refused_and_told_what_it_has(tmp_path: Path, files: Members, message: str) -> None:
    for path in laid_out(files, tmp_path):
        with pytest.raises(DataError, match=message):
            data.load(str(path))


@pytest.mark.filterwarnings("default:.*test images are also among")
def test_test_images_among_the_others_are_counted(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    for shared in (0, 3):
        content = arrays(x_train=x[:20], y_train=np.arange(20) % 2, x_test=x[20 - shared :], y_test=[0] * (10 + shared))
        (tmp_path / "x.npz").write_bytes(content)
        with warnings.catch_warnings(record=True) as told:
            data.load(str(tmp_path / "x.npz"))
        assert [str(one.message).rpartition(": ")[2] for one in told] == [
            f"{shared} of {10 + shared} test images are also among those for training or validation"
        ] * (shared > 0)


def test_two_sets_in_one_archive_are_not_mixed(tmp_path: Path) -> None:
    files = {f"{root}/{name}": content for root in ("a", "b") for name, content in members().items()}
    (tmp_path / "two.zip").write_bytes(zipped(files))
    with pytest.raises(DataError, match="several sets"):
        data.load(str(tmp_path / "two.zip"))


KINDS = {
    "bmp": "BMP",
    "webp": "WEBP",
    "tiff": "TIFF",
    "tif": "TIFF",
    "gif": "GIF",
    "ppm": "PPM",
    "tga": "TGA",
    "pcx": "PCX",
}
KINDS |= {"jp2": "JPEG2000"} if features.check("jpg_2000") else {}


@pytest.mark.parametrize("ending", KINDS)
def test_every_format_is_read(tmp_path: Path, ending: str) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = (200, 40, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, KINDS[ending], **({"lossless": True} if ending == "webp" else {}))
    files = {name.replace("png", ending.upper()): file.getvalue() for name in members()}
    for path in laid_out(files, tmp_path):
        loaded = data.load(str(path))
        assert loaded.name == "set" + {"webp": "-webp", "jp2": "-jpeg2000"}.get(ending, "")
        assert np.abs(loaded.test.x[0].permute(1, 2, 0).numpy().astype(int) - pixels).max() <= 2


def test_jpeg_within_tiff_is_jpeg(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), 100).save(file, "TIFF", compression="jpeg")
    for path in laid_out(members() | {"train/cat/9.tiff": file.getvalue()}, tmp_path):
        assert data.load(str(path)).name == "set-jpeg"


def test_of_a_moving_picture_the_first_frame_is_read(tmp_path: Path) -> None:
    frames, file = [Image.new("L", (8, 8), value) for value in (10, 200)], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    for path in laid_out(members() | {"test/cat/9.gif": file.getvalue()}, tmp_path):
        with pytest.warns(DataWarning, match=r"several frames only the first was read: 1 \(test/cat/9.gif\)"):
            loaded = data.load(str(path))
        assert loaded.test.x[4].unique().tolist() == [10]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_turned_as_a_viewer_shows_them(tmp_path: Path, kind: str) -> None:
    exif, pixels, file = Image.Exif(), np.zeros((8, 12, 3), np.uint8), io.BytesIO()
    exif[0x0112] = 6
    pixels[:4] = 255  # above, which is at the right when shown
    Image.fromarray(pixels).save(file, kind, exif=exif)
    for path in laid_out({name.replace("png", kind.lower()): file.getvalue() for name in members()}, tmp_path):
        x = data.load(str(path)).train.x
        assert x.shape[1:] == (3, 12, 8)
        assert float(x[..., 4:].float().mean()) > 240 and float(x[..., :4].float().mean()) < 15


def test_sixteen_bits_a_channel_are_refused(tmp_path: Path) -> None:
    deep = np.full((8, 8, 3), 40_000)
    grey, tall = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(grey, "PNG")
    tall.write(b"P6 8 8 65535\n" + deep.astype(">u2").tobytes())
    for number, (ending, content) in enumerate(
        (("png", png(deep, 16)), ("png", grey.getvalue()), ("ppm", tall.getvalue()))
    ):
        for path in laid_out(members() | {f"train/cat/9.{ending}": content}, tmp_path / str(number)):
            with pytest.raises(DataError, match=f"9.{ending}.*8-bit grey or RGB"):
                data.load(str(path))
    for path in laid_out(members() | {"train/cat/0.png": png(deep // 256, 8)}, tmp_path / "8"):
        assert 156 in data.load(str(path)).train.x


@pytest.mark.parametrize("shape", [(4, 4, 4), (8, 8, 4), (8, 8, 2), (2, 8, 8), (3, 8, 3), (1, 8, 1), (1, 8, 3)])
def test_shapes_with_two_readings_are_refused_with_both(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.zeros((4, *shape), np.uint8)
    (tmp_path / "x.npz").write_bytes(arrays(x_train=x, x_test=x, y_train=[0, 1, 0, 1], y_test=[0, 1, 0, 1]))
    a, b, c = shape
    with pytest.raises(DataError, match=f"{a} channels of {b}×{c}, or {a}×{b} with {c} channels"):
        data.load(str(tmp_path / "x.npz"))
    for layout, wanted in (("NCHW", shape), ("NHWC", (c, a, b))):
        content = arrays(x_train=x, x_test=x, y_train=[0, 1, 0, 1], y_test=[0, 1, 0, 1], layout=np.array(layout))
        (tmp_path / "x.npz").write_bytes(content)
        assert data.load(str(tmp_path / "x.npz")).test.x.shape[1:] == wanted


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"y_train": np.array([0.0, 1.0, 0.0, 1.0])}, "y_train.npy .* float64"),
        ({"y_train": np.array([5, 7, 5, 7])}, "holds 5, 7; number the classes"),
        ({"y_train": np.array([-1, 0, 1, 0])}, "holds -1, 0, 1"),
        ({"y_train": np.eye(4, 2, dtype=np.int64)}, r"integers of shape \(N,\)"),
        ({"y_train": np.array([0, 1])}, "4 images but 2 labels"),
        ({"y_test": np.array([0, 1, 2, 1])}, "label 2"),
        ({"x_train": np.random.default_rng(0).random((4, 8, 8))}, "in \\[0, 1\\]"),
        ({"x_train": np.full((4, 8, 8), 9, np.uint16)}, "not uint16"),
        ({"classes": np.array([2, 3])}, "one integer"),
        ({"classes": np.array(-1)}, "cannot have -1 classes; from 1 to 1,000,000"),
        ({"classes": np.array(10**12)}, "cannot have 1000000000000 classes"),
        ({"classes": np.array(2), "y_train": np.array([-1, 0, 1, 0])}, "label -1 at image 0; labels go from 0 to 1"),
        ({"classes": np.array(2), "y_train": np.array([2**64 - 1, 0, 1, 0], np.uint64)}, "not uint64"),
        ({"class_names": np.array(["cat", "dog"], dtype=object)}, "the type object"),
        ({"layout": np.array("HWCN")}, "'NCHW' or 'NHWC'"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, more: dict[str, np.ndarray], message: str) -> None:
    (tmp_path / "x.npz").write_bytes(arrays(**more))
    with pytest.raises(DataError, match=message):
        data.load(str(tmp_path / "x.npz"))


def test_arrays_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(arrays(x_val=np.zeros((2, 8, 8), np.uint8), y_val=[0, 1]))
    with pytest.warns(DataWarning, match="arrays that are not read: x_val, y_val; known: x_train, .*, x_valid"):
        data.load(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("name", ["X.NPZ", "x.Npz"])
def test_an_ending_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(arrays())
    assert data.load(str(tmp_path / name)).name.lower() == "x"


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "x.tar.xz"])
def test_a_file_of_another_kind_is_not_called_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name} is none of .zip, .*numpy.savez"):
        data.load(str(tmp_path / name))


def test_the_number_of_classes_may_be_said(tmp_path: Path) -> None:
    y = np.array([243, 559, 243, 990])
    (tmp_path / "x.npz").write_bytes(arrays(y_train=y, y_test=y, classes=np.array(1000)))
    loaded = data.load(str(tmp_path / "x.npz"))
    assert loaded.classes == 1000 and set(loaded.test.y.tolist()) == {243, 559, 990}


@pytest.mark.parametrize("name", ["val", "validation"])
def test_another_word_for_valid_is_refused(tmp_path: Path, name: str) -> None:
    for path in laid_out(members() | {f"{name}/cat/0.png": image()}, tmp_path):
        with pytest.raises(DataError, match=rf"{name}/; rename it to valid/"):
            data.load(str(path))


def test_a_class_may_be_called_val(tmp_path: Path) -> None:
    for path in laid_out(members(("cat", "val")), tmp_path):
        assert data.load(str(path)).class_names == ("cat", "val")
