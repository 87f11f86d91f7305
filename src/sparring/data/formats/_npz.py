"""A user's own arrays: an .npz file with x_train, y_train, x_test, y_test, and optionally x_valid, y_valid,
class_names.

To attack a trained network x_test and y_test suffice.
"""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import DataError, DataWarning, UserError
from ...files import safe_members
from .._places import space
from .._request import EVERYTHING, ClassList, Request
from .._types import Dataset, Split, check_split, counted, from_splits, hold_out

Array = np.ndarray[Any, np.dtype[Any]]
NEEDED = ("x_train", "y_train", "x_test", "y_test")
MOST = 1 << 50  # bytes: the disk is the limit
HEADER = 1 << 14
CHUNK = 1_000  # images
OPTIONAL = ("x_valid", "y_valid", "class_names", "classes", "layout")
CHANNELS, ALPHA = (1, 3), (2, 4)  # the latter with transparency, where they stand last
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def load_arrays(path: Path, name: str, request: Request = EVERYTHING) -> Dataset:
    """Load an .npz; nothing in it is ever unpickled. Arrays of more than 256 MiB lie in mapped files without a name.

    Images x are uint8 from 0 to 255, (N, H, W), (N, C, H, W) or (N, H, W, C) with C = 1 or 3; with `layout`, "NCHW" or
    "NHWC", any C. Labels y are integers (N,) or (N, 1) from 0 to classes - 1, each occurring in
    y_train unless `classes` says how many there are, or `request.classes` names them. Without x_valid and y_valid every
    tenth training image of a class is held out. Raises DataError, naming file and key, for anything else, also where a
    shape has two readings.
    """
    arrays = _read(path)
    if request.parts != "all" and all(len(arrays.get(key, ())) == 0 for key in NEEDED[:2]):
        arrays = {key: array for key, array in arrays.items() if key not in NEEDED[:2]}  # none, or empty ones
    trainable = request.parts == "all" or bool(arrays.keys() & {"x_train", "y_train"})
    needed: tuple[str, ...] = NEEDED if trainable else NEEDED[2:]
    needed += ("x_valid", "y_valid") if arrays.keys() & {"x_valid", "y_valid"} else ()
    for key in needed:
        if key not in arrays:
            raise DataError(f"{path} has no array '{key}'; it needs {', '.join(needed)}")
    layout = str(arrays["layout"].item()) if "layout" in arrays and arrays["layout"].size == 1 else None
    if "layout" in arrays and layout not in ("NCHW", "NHWC"):
        raise DataError(f"layout in {path} must be 'NCHW' or 'NHWC'")
    splits = {
        part: Split(
            _images(arrays[f"x_{part}"], f"x_{part}", layout, path), _labels(arrays[f"y_{part}"], f"y_{part}", path)
        )
        for part in ("train", "test", "valid")
        if f"x_{part}" in arrays
    }
    names = [str(item) for item in arrays["class_names"].ravel()] if "class_names" in arrays else []
    if len(set(names)) != len(names):
        raise DataError(f"class_names in {path} names a class twice; give each class its own name")
    first = "train" if "train" in splits else "test"
    y, said, notes, listed = splits[first].y, arrays.get("classes"), [], request.classes
    try:
        if listed is not None and _are_listed(listed, names, y, said):
            splits = {part: Split(split.x, _renumbered(split.y, names, listed)) for part, split in splits.items()}
            told = listed.numbers(names)[1] if names else f"labels are used as the class numbers of {listed.source}"
            notes, names = [f"{path}: {told}"], list(listed.names)
            classes = len(names)
        else:
            classes = _count_classes(y, said, f"y_{first}")
            if names and len(names) != classes:
                way = "add the entry 'classes' with their number" if said is None else "make them agree"
                raise DataError(f"class_names holds {len(names)} names, but there are {classes} classes; {way}")
        train, valid = splits.get("train"), splits.get("valid")
        if train is not None:
            check_split(f"the training split of '{name}'", train, train.x.shape[1:], classes)
            train, valid = (train, valid) if valid else hold_out(train, seed=request.valid_seed)
        parts = {"train": train, "valid": valid, "test": splits["test"]}
        notes.append(f"{path}: {counted({part: own.y for part, own in parts.items() if own}, names)}")
        return from_splits(name, train, valid, splits["test"], classes=classes, class_names=names, notes=notes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Array]:
    """Return the arrays of a file by name; warn of others."""
    others: list[str] = []
    try:
        found = safe_members(
            path, wanted=lambda member: _is_known(member, others), max_bytes=MOST, max_files=1_000, room=space
        )
        arrays = {member.removesuffix(".npy"): _array(data, member, path) for member, data in found}
    except UserError as error:
        raise DataError(str(error)) from error
    if others:
        known = ", ".join((*NEEDED, *OPTIONAL))
        told = f"{path}: ignored arrays: {', '.join(others)}; known: {known}"
        warnings.warn(told, DataWarning, stacklevel=4)
    return arrays


def _is_known(member: str, others: list[str]) -> bool:
    """Return whether an array is read, and record the names of others."""
    key = member.removesuffix(".npy")
    others += [] if key in NEEDED + OPTIONAL else [key]
    return key not in others


def _array(data: Any, member: str, path: Path) -> Array:
    file = io.BytesIO(data[:HEADER])
    try:
        shape, fortran, dtype = HEADERS[np.lib.format.read_magic(file)](file)
        whole = min(shape, default=0) >= 0 and math.prod(shape) * dtype.itemsize == len(data) - file.tell()
        if whole and dtype.kind in "uiU":
            flat = np.frombuffer(data, dtype, offset=file.tell())
            return flat.reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # the header is a Python literal: a hostile one can raise anything
        raise DataError(f"{member} in {path} is damaged; create it again") from error
    if whole or dtype.hasobject:
        raise DataError(
            f"{member} in {path} has the type {dtype}; images must be uint8 from 0 to 255 (of x in [0, 1]: "
            "(255 * x).round().astype('uint8')), labels integers, class names text"
        )
    raise DataError(f"{member} in {path} is truncated, or its header has the wrong shape {shape}; create it again")


def _images(array: Array, key: str, layout: str | None, path: Path) -> torch.Tensor:
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise DataError(
            f"{key} in {path} must be uint8 images (N, C, H, W) from 0 to 255, not {array.dtype} {array.shape}"
        )
    if array[:CHUNK].max(initial=0) == 1:  # nearly black: it was meant to be 0 and 255
        raise DataError(f"{key} in {path} holds 0 and 1 only, of 0 to 255; multiply it by 255")
    if array.ndim == 3:
        return _in_order(array[:, None])
    a, b, c = array.shape[1:]
    last = c in CHANNELS
    if layout is None and (last == (a in CHANNELS) or c in ALPHA):
        raise DataError(
            f"{key} in {path} has images of shape {(a, b, c)}: {a} channels of {b}×{c}, or {a}×{b} with {c} channels? "
            'Say which by an entry layout="NCHW" or layout="NHWC" in the file'
        )
    if layout == "NHWC" or (layout is None and last):
        array = array.transpose(0, 3, 1, 2)
    return _in_order(array)


def _in_order(array: Array) -> torch.Tensor:
    """Return an array as a contiguous tensor."""
    if not array.flags.c_contiguous and array.size:
        out = np.frombuffer(space(array.nbytes), array.dtype).reshape(array.shape)
        for start in range(0, len(array), CHUNK):
            out[start : start + CHUNK] = array[start : start + CHUNK]
        array = out
    return torch.from_numpy(array)


def _labels(array: Array, key: str, path: Path) -> torch.Tensor:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "ui" or array.ndim != 1 or array.max(initial=0) > np.iinfo(np.int64).max:
        raise DataError(f"{key} in {path} must be integers of shape (N,), not {array.dtype} {array.shape}")
    return torch.from_numpy(array.astype(np.int64))


def _are_listed(listed: ClassList, names: list[str], y: torch.Tensor, said: Array | None) -> bool:
    """Return whether a list of classes is for these data; without a given one, only if nothing else is possible."""
    present = np.unique(y.numpy()).tolist()
    return not listed.fallback or (said is None and (bool(names) or present != list(range(len(present)))))


def _renumbered(y: torch.Tensor, names: list[str], listed: ClassList) -> torch.Tensor:
    """Return labels as numbers of a list of classes: by name, or unchanged if they are numbers."""
    if not names or not len(y):
        return y
    if int(y.min()) < 0 or int(y.max()) >= len(names):
        raise DataError(f"labels must lie between 0 and {len(names) - 1}, the last of class_names")
    numbers = listed.numbers(names)[0]
    return torch.tensor([numbers[name] for name in names])[y]


def _count_classes(y: torch.Tensor, said: Array | None, key: str) -> int:
    if said is not None and (said.size != 1 or said.dtype.kind not in "ui"):
        raise DataError("classes must be one integer, the number of classes")
    if said is not None:
        return int(said.item())
    present = np.unique(y.numpy())
    if len(present) == 0 or int(present[0]) < 0 or int(present[-1]) != len(present) - 1:
        raise DataError(
            f"{key} must hold every label from 0 to the last, but holds {_few(present)}; number the "
            "classes 0, 1, 2, ..., or add the entry 'classes' with their number, or give --classes FILE"
        )
    return len(present)


def _few(labels: Array) -> str:
    shown = ", ".join(map(str, labels[:5].tolist()))
    return f"{shown}, ..." if len(labels) > 5 else shown or "none"
