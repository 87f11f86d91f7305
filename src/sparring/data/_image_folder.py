"""A user's own images: a folder, zip or tar with train/<class>/* and test/<class>/* (and valid/<class>/*, if any)."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError, DataWarning, UserError
from ..files import read_bounded, safe_members
from ._types import Dataset, Split, balanced_order, from_splits, hold_out

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
PARTS = ("train", "valid", "test")
MISNAMED = ("val", "validation")  # which stand for valid/ elsewhere
CLASSES = "classes.txt"
# Formats that know their own files; any other is tried only on files of its ending.
COMMON = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
# Not pixels of Pillow's own decoding: an interpreter of programs, Windows' own, and mere names.
EXCLUDED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}
LOSSY = {"JPEG": "jpeg", "MPO": "jpeg", "JPEG2000": "jpeg2000", "WEBP": "webp", "AVIF": "avif"}
IGNORED = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r")
GREY, COLOUR = ("1", "L", "LA", "La"), ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX")
MOST_SIDE = 4096
MOST_FILE = 64 << 20
MOST_SCANS = 32  # an honest progressive JPEG has about ten; each is a pass over all pixels for a few bytes of file
MOST_PIXELS = 512 << 20  # bytes of all images as three channels


class _Item(NamedTuple):
    part: str
    label: str
    name: str
    pixels: Pixels


@dataclass
class _Census:
    """What there is: class folders, files and folders in them that are not read, what CLASSES says, and formats."""

    endings: dict[str, str]
    folders: set[tuple[str, str]] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)
    nested: set[str] = field(default_factory=set)
    outside: list[str] = field(default_factory=list)
    misnamed: set[str] = field(default_factory=set)
    roots: set[str] = field(default_factory=set)
    named: list[str] = field(default_factory=list)
    lossy: set[str] = field(default_factory=set)
    animated: list[str] = field(default_factory=list)

    def wants(self, member: str) -> bool:
        """Say whether to read a file, and remember the rest; the name of a folder ends in "/"."""
        *folders, name = member.rstrip("/").split("/")
        if any(part.startswith(".") or part in IGNORED for part in (*folders, name)):
            return False  # a notebook's copies, and the hidden twin that macOS packs of every file
        *within, _ = member.split("/")
        depth = next((at for at, folder in enumerate(within) if folder in PARTS), len(within)) + 3
        if len(within) >= depth and within[-2] not in PARTS:
            self.nested.add("/".join(within[:depth]))
        elif member.endswith("/"):
            self.folders |= {(folders[-1], name)} if folders and folders[-1] in PARTS else set()
        elif len(folders) >= 2 and folders[-2] in PARTS:
            self.folders.add((folders[-2], folders[-1]))
            self.roots.add("/".join(folders[:-2]))
            if Path(name).suffix.lower() in self.endings:
                return True
            self.skipped.append(member)
        elif set(folders) & set(PARTS):
            self.skipped.append(member)
        elif len(folders) >= 2 and folders[-2] in MISNAMED:
            self.misnamed.add(folders[-2])
        elif Path(name).suffix.lower() in self.endings:
            self.outside.append(member)
        return name.lower() == CLASSES and not set(folders) & set(PARTS)


def load_images(path: Path, name: str) -> Dataset:
    """Load images of one size in any format that Pillow decodes, without ever unpacking anything to disk.

    Classes are the folder names in sorted order, or the lines of classes.txt beside train/, which may name more than
    there are folders. Images are grey (1, H, W) if all of them are, else (3, H, W); they are turned as EXIF says,
    transparency is dropped, of several frames the first is read. Hidden files and folders are ignored; a DataWarning
    counts what is not read, and names classes without test images and labels that do not count as their names do. Where
    there is no valid/, every tenth training image of a class (by name) is held out. Each split comes in balanced order.
    A set with images in a lossy format has that in its name, as "jpeg".

    Raises DataError, naming the file, for a damaged image, one of another size, of more than 4,096 pixels a side or of
    16 bits a channel, for a class without training images, and for more than 512 MiB of pixels.
    """
    items: list[_Item] = []
    census = _Census(_endings())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for member, data in _members(path, census):
                if member.rpartition("/")[2].lower() == CLASSES:
                    census.named = _listed(data, f"{member} in {path}")
                    continue
                part, label, file = member.split("/")[-3:]
                pixels = _decode(data, member, path, census)
                _check_size(pixels, member, items, path)
                items.append(_Item(part, label, file, pixels))
    except UserError as error:
        raise DataError(str(error)) from error
    labels = _labels(items, census, path)
    _tell(items, census, labels, path)
    extra = sorted(kind for kind in census.lossy if kind not in name.lower())
    return _assemble("-".join([name, *extra]), items, labels, path)


def _endings() -> dict[str, str]:
    """Return the format that each ending of an image file stands for."""
    known = Image.registered_extensions()  # which also imports all that Pillow can decode
    return {ending: kind for ending, kind in known.items() if kind in Image.OPEN and kind not in EXCLUDED}


def _listed(data: bytes, where: str) -> list[str]:
    """Return the lines of a list of classes that are not empty."""
    try:
        return [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not text in UTF-8; save it so") from error


def _members(path: Path, census: _Census) -> Iterator[tuple[str, bytes]]:
    if not path.is_dir():
        yield from safe_members(path, wanted=census.wants)
        return
    for file in sorted(file for depth in ("*", "*/*", "*/*/*") for file in path.glob(depth)):
        member = file.relative_to(path).as_posix()
        if census.wants(f"{member}/" if file.is_dir() else member):
            yield member, read_bounded(file, limit=MOST_FILE)


def _decode(data: bytes, member: str, path: Path, census: _Census) -> Pixels:
    where = f"{member} in {path}"
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MOST_SCANS:
        raise DataError(f"{where} makes its decoder pass over the image more than {MOST_SCANS} times; save it again")
    try:
        formats = (*COMMON, census.endings[Path(member).suffix.lower()])
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if max(image.size) > MOST_SIDE:
                raise DataError(f"{where} has {image.width}×{image.height} pixels; at most {MOST_SIDE} a side are read")
            if image.mode not in GREY + COLOUR or _is_deep(image, data):
                raise DataError(f"{where} has pixels of kind {_kind(image)}; save it as 8-bit grey or RGB")
            packed = image.info.get("compression") if image.format == "TIFF" else image.format
            if kind := LOSSY.get(str(packed).upper()):
                census.lossy.add(kind)
            if getattr(image, "is_animated", False) and image.format != "MPO":  # whose second picture is a preview
                census.animated.append(member)
            mode = "L" if image.mode in GREY else "RGB"
            image = ImageOps.exif_transpose(image)
            return np.asarray(image if image.mode == mode else image.convert(mode))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{where} is not an image that Pillow knows; get it again or remove it") from error
    except Exception as error:  # a decoder that meets hostile bytes raises whatever it likes
        raise DataError(f"{where} is not a sound image ({error}); get it again or remove it") from error


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Return whether an image that Pillow shows with 8 bits a channel has more in its file."""
    decoders = [(tile[0], tile[3] if isinstance(tile[3], tuple) else (tile[3],)) for tile in getattr(image, "tile", ())]
    if any(";16" in str(part) for _, args in decoders for part in args) or any(kind == "SGI16" for kind, _ in decoders):
        return True
    if image.format == "PPM":
        return any(isinstance(part, int) and part > 255 for _, args in decoders for part in args)
    if image.format == "JPEG2000":
        return (data[data.find(b"\xff\x4f\xff\x51") + 42] & 0x7F) > 7
    return image.format == "AVIF" and bool(data[data.find(b"av1C") + 6] & 0x40)


def _kind(image: Image.Image) -> str:
    return image.mode if image.mode not in GREY + COLOUR else f"{image.mode} with 16 bits a channel"


def _check_size(pixels: Pixels, member: str, before: list[_Item], path: Path) -> None:
    shape = pixels.shape[:2]
    first = before[0].pixels.shape[:2] if before else shape
    if shape != first:
        raise DataError(f"{member} in {path} is {shape[1]}×{shape[0]}, others are {first[1]}×{first[0]}; resize them")
    if 3 * shape[0] * shape[1] * (len(before) + 1) > MOST_PIXELS:
        raise DataError(f"{path} holds more than {MOST_PIXELS >> 20} MiB of pixels; use fewer or smaller images")


def _labels(items: list[_Item], census: _Census, path: Path) -> list[str]:
    """Return the classes' names in the order of their labels; refuse what would shift or lose one."""
    if len(census.roots) > 1:
        raise DataError(f"{path} holds several sets ({', '.join(sorted(census.roots))}); give one at a time")
    for part in sorted(census.misnamed):
        raise DataError(f"{path} has a folder {part}/; rename it to valid/ (or take it out)")
    for part in ("train", "test"):
        if not any(item.part == part for item in items):
            others = sorted([*census.outside, *census.nested, *census.skipped])[:3]
            found = f", only {', '.join(others)}" if others else ""
            few = "; to attack a trained network, two of each class will do" if part == "train" else ""
            raise DataError(f"{path} has no images in {part}/<class>/{found}; put some there{few}")
    labels = census.named or sorted({label for part, label in census.folders if part == "train"})
    if len(set(labels)) != len(labels):
        raise DataError(f"{CLASSES} in {path} names a class twice")
    for part, label in sorted(census.folders):
        if label not in labels:
            place = f"{CLASSES} does not name it" if census.named else "not in train/"
            raise DataError(f"{path} has the class '{label}' in {part}/ but {place}")
        if part == "train" and not any(item[:2] == (part, label) for item in items):
            raise DataError(
                f"{path} has no image that can be read in train/{label}/; put some there, or remove the folder (which "
                f"without {CLASSES} changes the labels of the classes after it)"
            )
    return labels


def _tell(items: list[_Item], census: _Census, labels: list[str], path: Path) -> None:
    """Warn of files that were not read, frames left out, and classes that a split lacks."""
    found = {
        "left out, since they are no images": census.skipped,
        "images outside of train/, valid/ and test/, not read": census.outside,
        "folders within a class's folder, not read": sorted(census.nested),
        "of several frames only the first was read": census.animated,
    }
    for part in PARTS[1:]:
        present = {item.label for item in items if item.part == part}
        if present and not census.named:
            found[f"classes without images in {part}/"] = [label for label in labels if label not in present]
    if not census.named and labels != sorted(labels, key=_as_counted):
        found[f"labels go by the names as text, which is not as one counts; {CLASSES} may say another order"] = labels
    for what, names in found.items():
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            warnings.warn(f"{path}: {what}: {len(names)} ({shown})", DataWarning, stacklevel=4)


def _as_counted(label: str) -> list[str | int]:
    """Return a key that sorts "2" before "10"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", label)]


def _assemble(name: str, items: list[_Item], labels: list[str], path: Path) -> Dataset:
    grey = all(item.pixels.ndim == 2 for item in items)
    parts = {part: [item for item in items if item.part == part] for part in PARTS}
    splits = {part: _split(own, labels, grey) for part, own in parts.items() if own}
    train, valid = (splits["train"], splits["valid"]) if "valid" in splits else hold_out(splits["train"])
    if len(valid.y) == 0:
        raise DataError(f"{path} has one image a class in train/; add more, or some in valid/<class>/")
    return from_splits(name, train, valid, splits["test"], classes=len(labels), class_names=labels)


def _split(items: list[_Item], labels: list[str], grey: bool) -> Split:
    items = sorted(items, key=lambda item: (item.label, item.name))
    number = {label: at for at, label in enumerate(labels)}
    y = torch.tensor([number[item.label] for item in items])
    order, _ = balanced_order(y)
    planes = np.stack([_planes(items[at].pixels, grey) for at in order.tolist()])
    return Split(torch.from_numpy(planes), y[order])


def _planes(pixels: Pixels, grey: bool) -> Pixels:
    if pixels.ndim == 3:
        return pixels.transpose(2, 0, 1)
    return np.broadcast_to(pixels, (1 if grey else 3, *pixels.shape))
