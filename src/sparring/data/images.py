"""A user's own images: a folder, zip or tar with train/<class>/* and test/<class>/* (and valid/<class>/*, if any)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..errors import DataError, UserError
from ..files import read_bounded, safe_members
from .splits import balanced_order, hold_out
from .types import Dataset, Split, from_splits

__all__ = ["load_images"]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
PARTS = ("train", "valid", "test")
SUFFIXES = (".jpg", ".jpeg", ".png")
GREY, COLOUR = ("1", "L", "LA"), ("P", "RGB", "RGBA")
MOST_SIDE = 4096
MOST_FILE = 64 << 20
MOST_SCANS = 32  # an honest progressive JPEG has about ten; each is a pass over all pixels for a few bytes of file
MOST_PIXELS = 512 << 20  # bytes of all images as three channels


class _Item(NamedTuple):
    part: str
    label: str
    name: str
    pixels: Pixels


def load_images(path: Path, name: str) -> Dataset:
    """Load JPEG and PNG images of one size, without ever unpacking anything to disk.

    Classes are the folder names in sorted order. Images are grey (1, H, W) if all of them are, else (3, H, W);
    transparency is dropped. Where there is no valid/, every tenth training image of a class (by name) is held out. Each
    split comes in balanced order. A set with JPEG images has "jpeg" in its name, since that is a lossy copy.

    Raises DataError, naming the file, for a damaged image, one of another size, of more than 4,096 pixels a side or of
    16 bits a channel, for a test class without training images, and for more than 512 MiB of pixels.
    """
    items: list[_Item] = []
    lossy = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for member, data in _members(path):
                part, label, file = member.split("/")[-3:]
                pixels = _decode(data, f"{member} in {path}")
                _check_size(pixels, member, items, path)
                items.append(_Item(part, label, file, pixels))
                lossy = lossy or not file.lower().endswith(".png")
    except UserError as error:
        raise DataError(str(error)) from error
    if lossy and "jpeg" not in name.lower():
        name += "-jpeg"
    return _assemble(name, items, path)


def _wanted(member: str) -> bool:
    parts = member.split("/")
    return (
        len(parts) >= 3
        and parts[-3] in PARTS
        and parts[-1].lower().endswith(SUFFIXES)
        and not parts[-1].startswith(".")  # macOS packs a hidden twin of every file
    )


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    if not path.is_dir():
        yield from safe_members(path, wanted=_wanted)
        return
    for part in PARTS:
        for file in sorted((path / part).glob("*/*")):
            member = file.relative_to(path).as_posix()
            if _wanted(member):
                yield member, read_bounded(file, limit=MOST_FILE)


def _decode(data: bytes, where: str) -> Pixels:
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MOST_SCANS:
        raise DataError(f"{where} makes its decoder pass over the image more than {MOST_SCANS} times; save it again")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if max(image.size) > MOST_SIDE:
                raise DataError(f"{where} has {image.width}×{image.height} pixels; at most {MOST_SIDE} a side are read")
            if image.mode not in GREY + COLOUR:
                raise DataError(f"{where} has pixels of kind {image.mode}; save it as 8-bit grey or RGB")
            mode = "L" if image.mode in GREY else "RGB"
            return np.asarray(image if image.mode == mode else image.convert(mode))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{where} is not a JPEG or PNG image; get it again or remove it") from error
    except Exception as error:  # a decoder that meets hostile bytes raises whatever it likes
        raise DataError(f"{where} is not a sound JPEG or PNG image ({error}); get it again or remove it") from error


def _check_size(pixels: Pixels, member: str, before: list[_Item], path: Path) -> None:
    shape = pixels.shape[:2]
    first = before[0].pixels.shape[:2] if before else shape
    if shape != first:
        raise DataError(f"{member} in {path} is {shape[1]}×{shape[0]}, others are {first[1]}×{first[0]}; resize them")
    if 3 * shape[0] * shape[1] * (len(before) + 1) > MOST_PIXELS:
        raise DataError(f"{path} holds more than {MOST_PIXELS >> 20} MiB of pixels; use fewer or smaller images")


def _assemble(name: str, items: list[_Item], path: Path) -> Dataset:
    labels = sorted({item.label for item in items if item.part == "train"})
    for part in ("train", "test"):
        if not any(item.part == part for item in items):
            raise DataError(f"{path} has no images in {part}/<class>/ (JPEG or PNG); put some there")
    for item in items:
        if item.label not in labels:
            raise DataError(f"{path} has the class '{item.label}' in {item.part}/ but not in train/")
    grey = all(item.pixels.ndim == 2 for item in items)
    splits = {part: _split([item for item in items if item.part == part], labels, grey) for part in PARTS}
    train, valid = splits["train"], splits["valid"]
    if len(valid.y) == 0:
        train, valid = hold_out(train)
    if len(valid.y) == 0:
        raise DataError(f"{path} has one image a class in train/; add more, or some in valid/<class>/")
    return from_splits(name, train, valid, splits["test"], classes=len(labels), class_names=labels)


def _split(items: list[_Item], labels: list[str], grey: bool) -> Split:
    items = sorted(items, key=lambda item: (item.label, item.name))
    if not items:
        return Split(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    number = {label: at for at, label in enumerate(labels)}
    y = torch.tensor([number[item.label] for item in items])
    order, _ = balanced_order(y)
    planes = np.stack([_planes(items[at].pixels, grey) for at in order.tolist()])
    return Split(torch.from_numpy(planes), y[order])


def _planes(pixels: Pixels, grey: bool) -> Pixels:
    if pixels.ndim == 3:
        return pixels.transpose(2, 0, 1)
    return np.broadcast_to(pixels, (1 if grey else 3, *pixels.shape))
