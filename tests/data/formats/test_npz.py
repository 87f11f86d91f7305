"""Arrays are read as they are meant, or refused with the file, the key and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparring import data
from sparring.data import _places, _types
from sparring.data.formats import _npz
from sparring.errors import DataError, DataWarning

from ..hostile_parts import arrays


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


def test_training_arrays_that_are_empty_are_as_if_not_there(tmp_path: Path) -> None:
    nothing = {"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, np.int64)}
    (tmp_path / "mine.npz").write_bytes(arrays(**nothing))
    mine = data.load("mine", tmp_path, request=data.Request("any"))
    assert (len(mine.train.y), mine.classes) == (0, 2) and len(mine.test.y)
    with pytest.raises(DataError, match="holds none"):
        data.load("mine", tmp_path)


def test_arrays_with_their_own_validation_split(tmp_path: Path) -> None:
    (tmp_path / "mine.npz").write_bytes(arrays(x_valid=np.full((1, 8, 8), 9, np.uint8), y_valid=np.array([1])))
    mine = data.load("mine", tmp_path)
    assert (len(mine.train.y), len(mine.valid.y)) == (4, 1)


@pytest.mark.parametrize(
    "shape", [(4, 4, 4), (8, 8, 4), (8, 8, 2), (3, 8, 4), (1, 8, 2), (2, 8, 8), (3, 8, 3), (1, 8, 1), (1, 8, 3)]
)
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
        ({"x_train": np.eye(8, dtype=np.uint8)[None].repeat(4, 0)}, "0 and 1 only, of 0 to 255; multiply it"),
        ({"classes": np.array([2, 3])}, "one integer"),
        ({"classes": np.array(-1)}, "cannot have -1 classes; the range is 1 to 1,000,000"),
        ({"classes": np.array(10**12)}, "cannot have 1000000000000 classes"),
        ({"classes": np.array(2), "y_train": np.array([-1, 0, 1, 0])}, "label -1 at image 0; labels go from 0 to 1"),
        ({"classes": np.array(2), "y_train": np.array([2**64 - 1, 0, 1, 0], np.uint64)}, "not uint64"),
        ({"class_names": np.array(["cat", "dog"], dtype=object)}, "the type object"),
        ({"class_names": np.array(["cat", "cat"])}, "names a class twice; give each"),
        ({"class_names": np.array(["a", "b", "c"])}, "holds 3 names, but there are 2 classes; add the entry 'classes'"),
        ({"class_names": np.array(["a"]), "classes": np.array(2)}, "1 names, but there are 2 classes; make them agree"),
        ({"layout": np.array("HWCN")}, "'NCHW' or 'NHWC'"),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path: Path, more: dict[str, np.ndarray], message: str) -> None:
    (tmp_path / "x.npz").write_bytes(arrays(**more))
    with pytest.raises(DataError, match=message):
        data.load(str(tmp_path / "x.npz"))


def test_arrays_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(arrays(x_val=np.zeros((2, 8, 8), np.uint8), y_val=[0, 1]))
    with pytest.warns(DataWarning, match="ignored arrays: x_val, y_val; known: x_train, .*, x_valid"):
        data.load(str(tmp_path / "x.npz"))


def test_the_number_of_classes_may_be_said(tmp_path: Path) -> None:
    y = np.array([243, 559, 243, 990])
    (tmp_path / "x.npz").write_bytes(arrays(y_train=y, y_test=y, classes=np.array(1000)))
    loaded = data.load(str(tmp_path / "x.npz"))
    assert loaded.classes == 1000 and set(loaded.test.y.tolist()) == {243, 559, 990}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_large_arrays_lie_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, save: Callable[..., None]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 6, 7), dtype=np.uint8)
    x, y = x if layout == "NCHW" else np.ascontiguousarray(x.transpose(0, 2, 3, 1)), np.arange(40) % 4
    save(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x[:8] // 2, y_test=y[:8])
    plain = data.load(str(tmp_path / "x.npz"))
    monkeypatch.setattr(_places, "MOST", 100)
    monkeypatch.setattr(_types, "LARGE", 100)
    monkeypatch.setattr(_types, "ROWS", 7)
    monkeypatch.setattr(_npz, "CHUNK", 7)
    mapped = data.load(str(tmp_path / "x.npz"))
    assert data.content_hash(mapped) == data.content_hash(plain) and mapped.mean == plain.mean
    assert list((tmp_path / "cache" / "sparring").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match=r"cannot write .* GB into .*cache.*: the disk is full"):
        data.load(str(tmp_path / "x.npz"))
