"""What is asked for is what is read: parts, sizes, a network's own classes, and no more images than are needed."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparring import data, study
from sparring.data import ClassList, Geometry, Request
from sparring.errors import DataError

from .hostile_parts import image, zipped
from .test_image_folder import laid_out, members

TESTED = Request("any")
NAMES = ClassList(
    ("tench, Tinca tinca", "crane", "fox, crane", "cat", "crane"), "the list", tuple(f"n{i:08}" for i in range(5))
)


def noise(seed: int, height: int, width: int) -> bytes:
    pixels, file = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def only(files: dict[str, bytes], *parts: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith(parts)}


def test_a_test_split_alone_is_read_to_be_attacked(tmp_path: Path) -> None:
    for path in laid_out(only(members(), "test"), tmp_path):
        loaded = data.load(str(path), request=TESTED)
        assert (loaded.class_names, loaded.test.y.tolist(), loaded.mean) == (("cat", "dog"), [0, 1, 0, 1], ())
        assert loaded.train.x.shape == (0, *loaded.test.x.shape[1:]) and len(loaded.valid.y) == 0
        assert len(data.content_hash(loaded)) == 64 and loaded.notes == (f"{path}: images: 4 for test (2 cat, 2 dog)",)
        assert {item.where for item in data.available(tmp_path)} >= {str(path)}
        with pytest.raises(DataError, match=r"no images in train/<class>/"):
            data.load(str(path))


@pytest.mark.parametrize(
    ("files", "note"),
    [
        ({f"{label}/0.png": image() for label in ("cat", "dog")}, "has no splits: all its images are test images"),
        ({f"val/{label}/0.png": image() for label in ("cat", "dog")}, "no test/; the images of val/ are used as test"),
        ({f"train/{label}/0.png": image() for label in ("cat", "dog")}, "trained on"),
    ],
)
def test_what_stands_for_a_test_split_is_said(tmp_path: Path, files: dict[str, bytes], note: str) -> None:
    for path in laid_out(files, tmp_path):
        loaded = data.load(str(path), request=TESTED)
        assert note in loaded.notes[0] and loaded.test.y.tolist() == [0, 1]


def test_class_folders_at_several_depths_are_refused(tmp_path: Path) -> None:
    for path in laid_out({"cat/0.png": image(), "more/dog/0.png": image()}, tmp_path):
        with pytest.raises(DataError, match="several depths"):
            data.load(str(path), request=TESTED)


@pytest.mark.parametrize(("height", "width"), [(37, 53), (53, 37), (40, 40), (20, 90), (31, 24)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "crop"), [(32, (24, 24)), (32, (25, 24)), ((30, 28), (24, 24)), (20, (24, 23))])
def test_images_are_prepared_as_torchvision_does(
    height: int, width: int, interpolation: str, resize: int | tuple[int, int], crop: tuple[int, int]
) -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    from sparring.models import describe

    describe("torchvision:resnet18")  # imports torchvision, whatever torch it was built for
    transforms = importlib.import_module("torchvision.transforms")
    original = Image.open(io.BytesIO(noise(0, height, width)))
    how = transforms.InterpolationMode(interpolation)
    steps = transforms.Compose([transforms.Resize(resize, interpolation=how), transforms.CenterCrop(crop)])
    assert np.array_equal(np.asarray(Geometry(resize, crop, interpolation)(original)), np.asarray(steps(original)))


def test_images_are_resized_and_cropped_by_pillow(tmp_path: Path) -> None:
    shapes = {"cat": (37, 53), "dog": (53, 37)}
    files = {f"test/{label}/0.png": noise(at, *shape) for at, (label, shape) in enumerate(shapes.items())}
    geometry = Geometry(32, (24, 20), "bicubic")
    for path in laid_out(files, tmp_path):
        with pytest.raises(DataError, match="use --resize and --crop"):
            data.load(str(path), request=TESTED)
        loaded = data.load(str(path), request=replace(TESTED, geometry=geometry))
        for pixels, (label, (height, width)) in zip(loaded.test.x, shapes.items(), strict=True):
            size = (32 * width // 37, 32) if width > height else (32, 32 * height // 37)
            whole = Image.open(io.BytesIO(files[f"test/{label}/0.png"])).resize(size, Image.Resampling.BICUBIC)
            left, top = (size[0] - 20) // 2, (size[1] - 24) // 2
            cut = np.asarray(whole)[top : top + 24, left : left + 20]
            assert size[0] % 2 == size[1] % 2 == 0 or math.prod(size) % 2 == 0  # halves are tested against torchvision
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), cut)
        assert loaded.notes[-2].endswith("the shorter side is resized to 32 (bicubic), cropped to the central 24×20")


@pytest.mark.parametrize(
    ("resize", "crop", "padded"),
    [(None, (8, 8), True), (8, (8, 8), False), (8, (8, 9), True), ((9, 8), (9, 8), False), ((8, 9), (9, 8), True)],
)
def test_a_border_is_said_where_there_may_be_one(
    resize: int | tuple[int, int] | None, crop: tuple[int, int], padded: bool
) -> None:
    assert str(Geometry(resize, crop)).endswith(", smaller images padded with black") == padded


def test_labels_are_those_of_a_list_of_classes(tmp_path: Path) -> None:
    files = {f"test/{label}/0.png": image() for label in ("Tinca_tinca", "n00000002", "Cat")}
    for path in laid_out(files, tmp_path):
        loaded = data.load(str(path), request=replace(TESTED, classes=NAMES))
        assert (loaded.classes, loaded.test.y.tolist(), loaded.class_names) == (5, [0, 2, 3], NAMES.names)
        how = "labels are the numbers of the 5 classes of the list: 1 by WordNet id and 2 by name"
        assert loaded.notes[0] == f"{path}: {how}"
    for path in laid_out(files | {"test/crane/0.png": image(), "test/dog/0.png": image()}, tmp_path / "more"):
        with pytest.raises(
            DataError, match=r"2 of 5 classes .* the list: crane \(which of 1, 4\?\), dog; .*--classes FILE"
        ):
            data.load(str(path), request=replace(TESTED, classes=NAMES))


def test_what_a_set_says_of_its_classes_comes_before_a_library(tmp_path: Path) -> None:
    files = {"test/cat/0.png": image(), "classes.txt": b"dog\ncat"}
    for path in laid_out(files, tmp_path):
        library = replace(TESTED, classes=replace(NAMES, fallback=True))
        assert data.load(str(path), request=library).class_names == ("dog", "cat")
        assert data.load(str(path), request=replace(TESTED, classes=NAMES)).test.y.tolist() == [3]


@pytest.mark.parametrize(
    ("text", "names", "ids"),
    [
        ("tench\ncat, tom\n\n", ("tench", "cat, tom"), ()),
        (
            "\ufeffn01440764 tench, Tinca tinca\nn02123045 tabby",
            ("tench, Tinca tinca", "tabby"),
            ("n01440764", "n02123045"),
        ),
        (json.dumps(["a", "b"]), ("a", "b"), ()),
        (json.dumps({"1": "b", "0": "a"}), ("a", "b"), ()),
        (json.dumps({"b": 1, "a": 0}), ("a", "b"), ()),
        (json.dumps({"model_type": "vit", "id2label": {"0": "a", "1": "b"}}), ("a", "b"), ()),
        (
            json.dumps({"0": ["n01440764", "tench"], "1": ["n02123045", "tabby"]}),
            ("tench", "tabby"),
            ("n01440764", "n02123045"),
        ),
    ],
)
def test_lists_of_classes(tmp_path: Path, text: str, names: tuple[str, ...], ids: tuple[str, ...]) -> None:
    (tmp_path / "classes").write_text(text, encoding="utf-8")
    found = data.read_classes(tmp_path / "classes")
    assert (found.names, found.ids) == (names, ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no name for class 0"),
        (b"a\n\nb", "no name for class 1"),
        (b'{"0": "a", "2": "b"}', "not numbered from 0 to 1"),
        (b'{"x": "a"}', "not a list of classes"),
        (b'{"x": 0, "y": 0}', "two of its names have one number"),
        (b'["a", 3]', "not names"),
        (b"[[1, 2]]", "not a list of classes"),
        (b"[" * 100_000, "not a list of classes"),
        (b"\xff\xfe", "not a list of classes"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "classes").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.read_classes(tmp_path / "classes")


def test_only_the_chosen_images_are_decoded_and_they_stay_the_same(tmp_path: Path) -> None:
    files = members() | {
        f"test/{label}/{n}.png": noise(n + 10 * (label == "dog"), 8, 8) for label in ("cat", "dog") for n in range(6)
    }
    (tmp_path / "whole.zip").write_bytes(zipped(files))
    whole = data.load(str(tmp_path / "whole.zip"))
    x, y = study.chosen_images(whole, "test", 0, 5)
    places = data.fixed_order(12)[:5]
    names = [f"test/{label}/{n}.png" for n in range(6) for label in ("cat", "dog")]
    kept = {names[at] for at in places.tolist()}
    damaged = {name: content if name in kept else b"no image" for name, content in files.items()}
    for path in laid_out(damaged, tmp_path):
        drawn = data.load(str(path), request=Request("test", images=5))
        assert drawn.drawn is not None and torch.equal(drawn.drawn, places)
        for mine, own in zip(study.chosen_images(drawn, "test", 1, 5), (x[1:], y[1:]), strict=True):
            assert torch.equal(mine, own)


def test_grey_images_are_colour_where_the_others_are(tmp_path: Path) -> None:
    grey = {f"test/cat/{n}.png": image(mode="L") for n in range(3)}
    for path in laid_out(grey, tmp_path):
        assert data.load(str(path), request=Request("test", images=1)).test.x.shape[1] == 1
        assert data.load(str(path), request=Request("test", images=1, channels=3)).test.x.shape[1] == 3
    for path in laid_out(grey | {"train/cat/0.png": image()}, tmp_path / "mixed"):
        assert data.load(str(path), request=Request("test", images=1)).test.x.shape[1] == 3


def test_arrays_may_have_some_of_a_networks_classes(tmp_path: Path) -> None:
    x, path = np.zeros((3, 4, 4, 3), np.uint8), tmp_path / "x.npz"
    np.savez(path, x_test=x, y_test=[0, 3, 3])
    given, library = (replace(TESTED, classes=replace(NAMES, fallback=own)) for own in (False, True))
    for request in (given, library):
        loaded = data.load(str(path), request=request)
        assert (loaded.classes, loaded.test.y.tolist(), len(loaded.train.x)) == (5, [0, 3, 3], 0)
    with pytest.raises(DataError, match="x_train"):
        data.load(str(path))
    np.savez(path, x_test=x, y_test=[0, 1, 1], class_names=["cat", "tench"])
    assert data.load(str(path), request=library).test.y.tolist() == [3, 0, 0]
    np.savez(path, x_test=x, y_test=[0, 1, 1])
    assert data.load(str(path), request=given).classes == 5
    assert data.load(str(path), request=library).classes == 2  # which may be any two
    with pytest.raises(DataError, match="only images can be resized"):
        data.load(str(path), request=replace(TESTED, geometry=Geometry(8)))


def test_a_known_set_has_its_own_classes() -> None:
    with pytest.raises(DataError, match="its own classes"):
        data.load("digits", request=replace(TESTED, classes=NAMES))


@pytest.mark.parametrize(
    "text", ["0,cat\n1,dog\n", "index,name\r\n0,cat\r\n1,dog", "0: cat\n1: dog", " 0\tcat\n 1\tdog"]
)
def test_a_list_of_numbered_classes(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes").write_text(text)
    assert data.read_classes(tmp_path / "classes").names == ("cat", "dog")


@pytest.mark.parametrize("text", ["1,dog\n0,cat\n", "1,cat\n2,dog\n", "id,name\n0,cat\n2,dog"])
def test_numbers_of_classes_in_another_order_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes").write_text(text)
    with pytest.raises(DataError, match=r"its lines are not numbered 0, 1, ..., 1 in this order"):
        data.read_classes(tmp_path / "classes")
