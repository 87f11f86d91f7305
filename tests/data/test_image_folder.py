"""What a folder or zip of images holds is what is loaded: nothing is lost, shifted or read otherwise without a word."""

from __future__ import annotations

import io
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from sparring import data
from sparring.data._request import Geometry
from sparring.errors import DataError, DataWarning

from .hostile_parts import image, zipped

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
        ({"train/cow/": b""}, "no readable image in train/cow/"),
        ({"train/cow/0.heic": b"x", "test/cow/0.png": image()}, "no readable image in train/cow/"),
        ({"train/cow/0.txt": b"x"}, "no readable image in train/cow/"),
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
        ({f"train/cat/{n}.svg": b"x" for n in range(4)}, r"not images: 4 \(train/cat/0.svg, .*, \.\.\.\)"),
        ({"train/0.png": image()}, r"images in no class's folder, not read: 1 \(train/0.png\)"),
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


def test_a_class_has_one_name_however_its_accents_are_written(tmp_path: Path) -> None:
    others = {f"train/e\u0301mu/{n}.png": image() for n in range(2)} | {"test/\u00e9mu/0.png": image()}
    for path in laid_out(members() | others, tmp_path):
        assert data.load(str(path)).class_names == ("cat", "dog", "\u00e9mu")


def test_names_that_are_not_text_and_links_to_themselves_are_refused(tmp_path: Path) -> None:
    next(laid_out(members(), tmp_path))
    (tmp_path / "set/test/cat/9.png").symlink_to("9.png")
    with pytest.raises(DataError, match=r"cannot read .*cat/9.png: Too many levels"):
        data.load(str(tmp_path / "set"))
    (tmp_path / "set/test/cat").rename(tmp_path / "set/test/\udcff")
    with pytest.raises(DataError, match=r"the folder '\\udcff' has no name in UTF-8; rename it"):
        data.load(str(tmp_path / "set"))


def test_a_tar_of_the_current_folder_is_the_folder(tmp_path: Path) -> None:
    folder, *_ = laid_out(members() | {"classes.txt": b"dog\ncat\n", ".git/train/a/0.png": image()}, tmp_path)
    with tarfile.open(tmp_path / "dot.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname=".")  # as `tar -C folder -czf dot.tar.gz .`
    loaded, plain = data.load(str(tmp_path / "dot.tar.gz")), data.load(str(folder))
    assert loaded.class_names == plain.class_names == ("dog", "cat")
    assert torch.equal(loaded.train.x, plain.train.x) and torch.equal(loaded.test.y, plain.test.y)


def test_a_list_of_classes_fixes_the_labels(tmp_path: Path) -> None:
    names = [f"n{at:04}" for at in range(1000)]
    files = members(("n0243", "n0999")) | {"classes.txt": "\n".join(names).encode()}
    for path in laid_out(files, tmp_path):
        loaded = data.load(str(path))
        assert (loaded.classes, sorted(set(loaded.test.y.tolist()))) == (1000, [243, 999])


def test_lists_of_classes_of_other_names_are_told(tmp_path: Path) -> None:
    lists = {"labels.txt": b"dog", "classes.json": b"[]", "class_to_idx.json": b"{}", "README.txt": b""}
    told = r"not read as lists of classes; classes.txt is, .*: 3 \(class_to_idx.json, classes.json, labels.txt\)"
    for path in laid_out(members() | lists, tmp_path):
        with pytest.warns(DataWarning, match=told):
            found = data.load(str(path))
        assert found.class_names == ("cat", "dog")
        (listed := tmp_path / "listed.json").write_text('["dog", "cat"]')
        assert data.load(str(path), request=data.Request(classes=data.read_classes(listed))).class_names[0] == "dog"
    for path in laid_out(members() | lists | {"classes.txt": b"dog\ncat"}, tmp_path):
        assert data.load(str(path)).class_names == ("dog", "cat")


@pytest.mark.filterwarnings("default:.*more than one label")
@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_with_two_labels_is_told(tmp_path: Path, part: str) -> None:
    rng = np.random.default_rng(0)
    names = [f"{one}/{label}/{n}.png" for one in ("train", "test") for label in ("cat", "dog") for n in range(3)]
    files = {name: png(rng.integers(0, 256, (8, 8, 3)), 8) for name in names}
    files[f"{part}/dog/8.png"] = files[f"{part}/dog/9.png"] = files[f"{part}/cat/0.png"]
    for path in laid_out(files, tmp_path):
        with pytest.warns(DataWarning, match=rf"1 image has more than one label, such as {part}/.* \('cat'\) and"):
            data.load(str(path))


def test_a_list_of_classes_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    for path in laid_out(members() | {"classes.txt": "dog\ncat\n".encode("utf-8-sig")}, tmp_path):
        assert data.load(str(path)).class_names == ("dog", "cat")


@pytest.mark.parametrize("name", ["Classes.txt", "CLASSES.TXT"])
def test_a_list_of_classes_is_found_however_its_name_is_written(tmp_path: Path, name: str) -> None:
    for path in laid_out(members() | {name: b"dog\ncat\n"}, tmp_path):
        assert data.load(str(path)).class_names == ("dog", "cat")


@pytest.mark.parametrize("classes", [("-1", "0", "1"), ("0.1", "0.15", "0.2"), ("a-1", "a-2"), ("-1", "0", "x")])
def test_numbers_in_the_order_of_their_values_are_no_surprise(tmp_path: Path, classes: tuple[str, ...]) -> None:
    for path in laid_out(members(classes), tmp_path):
        assert data.load(str(path)).class_names == tuple(sorted(classes))


@pytest.mark.parametrize("classes", [("1", "2", "10"), ("class 9", "class 10"), ("-2", "-1", "0"), ("2.5", "10.5")])
def test_labels_that_do_not_count_as_their_names_do_are_named(tmp_path: Path, classes: tuple[str, ...]) -> None:
    for path in laid_out(members(classes), tmp_path):
        with pytest.warns(DataWarning, match="with 10 before 2; classes.txt can give another order"):
            data.load(str(path))
    for path in laid_out(members(classes) | {"classes.txt": "\n".join(classes).encode()}, tmp_path):
        assert data.load(str(path)).class_names == classes
    for path in laid_out(members(("01", "02", "10")), tmp_path / "padded"):
        assert data.load(str(path)).class_names == ("01", "02", "10")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test/cat/0.png": image()}, r"no images in train/<class>/; .*; a test split is enough"),
        ({"train/cat/0.png": image()}, r"no images in test/<class>/; put some there"),
        ({"cat/0.png": image(), "dog/0.png": image()}, r"in train/<class>/, only cat/0.png, dog/0.png"),
        ({"Train/cat/0.png": image()}, r"in train/<class>/, only Train/cat/0.png"),
        ({"train/pets/cat/0.png": image()}, r"in train/<class>/, only train/pets/cat"),
        ({"train/0.png": image()}, r"in train/<class>/, 1 images in no class.s folder, not read .train/0.png"),
    ],
)
def test_a_set_without_a_part_is_refused_and_told_what_it_has(tmp_path: Path, files: Members, message: str) -> None:
    for path in laid_out(files, tmp_path):
        with pytest.raises(DataError, match=message):
            data.load(str(path))


def test_what_is_almost_right_is_told_how_to_be_right(tmp_path: Path) -> None:
    cases: dict[str, tuple[Members, str]] = {
        "capital": ({"Test/cat/0.png": image()}, r"has Test/; rename it to test/"),
        "training": ({"training/cat/0.png": image(), "val.txt": b""}, r"has training/; rename it to train/"),
        "within": ({"mine/test/cat/0.png": image()}, r"is it .*within/mine\?"),
        "nested": (
            {"i/train/a/0.png": image(), "all.csv": b"path,label"},
            r"no folders of classes.*give .*/all.csv if",
        ),
        "list": (
            {"images/0.png": image(), "labels.csv": b"path,label"},
            r"give .*list/labels.csv if that has the images'",
        ),
    }
    for name, (files, message) in cases.items():
        for member, content in files.items():
            (tmp_path / name / member).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / member).write_bytes(content)
        with pytest.raises(DataError, match=message):
            data.load(str(tmp_path / name), request=data.Request("any"))


def test_ink_is_colour_and_a_name_that_comes_twice_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile's own
        for _ in range(2):
            archive.writestr("test/cat/0.jpg", image("JPEG", mode="CMYK"))
    with pytest.warns(DataWarning, match=r"listed more than once: 1 \(test/cat/0.jpg\)"):
        assert data.load(str(tmp_path / "mine.zip"), request=data.Request("any")).test.x.shape == (2, 3, 8, 8)


def test_two_sets_in_one_archive_are_not_mixed(tmp_path: Path) -> None:
    files = {f"{root}/{name}": content for root in ("a", "b") for name, content in members().items()}
    (tmp_path / "two.zip").write_bytes(zipped(files))
    with pytest.raises(DataError, match="several data sets"):
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


@pytest.mark.parametrize("turned", ["0", "1"])
def test_a_size_that_exif_turned_is_told(tmp_path: Path, turned: str) -> None:
    exif, plain, sideways = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("L", (12, 8)).save(plain, "PNG")
    Image.new("L", (12, 8)).save(sideways, "PNG", exif=exif)
    mixed = {name: (sideways if f"/{turned}." in name else plain).getvalue() for name in members()}
    for path in laid_out(mixed, tmp_path):
        with pytest.raises(DataError, match=r"EXIF orientation is applied.*--resize and --crop"):
            data.load(str(path))
        request = data.Request(geometry=Geometry(resize=(8, 8)))
        assert data.load(str(path), request=request).test.x.shape[1:] == (1, 8, 8)


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


@pytest.mark.parametrize("name", ["val", "validation"])
def test_another_word_for_valid_is_understood(tmp_path: Path, name: str) -> None:
    files = members() | {f"{name}/{label}/0.png": image() for label in ("cat", "dog")}
    for path in laid_out(files, tmp_path):
        loaded = data.load(str(path))
        assert (len(loaded.train.y), loaded.valid.y.tolist(), len(loaded.test.y)) == (8, [0, 1], 4)
    for path in laid_out(files | {"valid/cat/0.png": image()}, tmp_path / "both"):
        with pytest.raises(DataError, match=r"has val\w*/ and val\w*/, which have the same meaning"):
            data.load(str(path))


def test_a_class_may_be_called_val(tmp_path: Path) -> None:
    for path in laid_out(members(("cat", "val")), tmp_path):
        assert data.load(str(path)).class_names == ("cat", "val")


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
        with pytest.warns(DataWarning, match=r"not images: 1 \(train/ant/notes.txt\)"):
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
