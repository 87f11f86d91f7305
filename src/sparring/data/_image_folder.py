"""A user's own images: a folder, zip or tar with train/<class>/*, test/<class>/* and valid/<class>/*, or some of them.

First what there is is listed; pixels are decoded of the images that are asked for.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError, DataWarning, UserError
from ..files import explain, read_bounded, safe_members
from ._request import EVERYTHING, Request
from ._types import Dataset, Split, balanced_order, fixed_order, from_splits, hold_out

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
PARTS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
WHOLE = ("train", "valid", "test")
CLASSES = "classes.txt"
# Formats that know their own files; any other is tried only on files of its ending.
COMMON = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
# Not pixels of Pillow's own decoding: an interpreter of programs, Windows' own, and mere names.
EXCLUDED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}
LOSSY = {"JPEG": "jpeg", "MPO": "jpeg", "JPEG2000": "jpeg2000", "WEBP": "webp", "AVIF": "avif"}
IGNORED = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r")
GREY, COLOUR = ("1", "L", "LA", "La"), ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX")
MOST_SIDE = 4096  # four times as much of photographs that are resized, below Pillow's own limit of pixels
MOST_FILE = 64 << 20
MOST_SCANS = 32  # an honest progressive JPEG has about ten; each is a pass over all pixels for a few bytes of file
MOST_PIXELS = 512 << 20  # bytes of all images as three channels


class _Entry(NamedTuple):
    """Name an image, of part "" outside of PARTS; `place` is its own in the order in which a set is read."""

    place: int
    part: str
    label: str
    member: str


@dataclass
class _Census:
    """What there is: images, class folders, files and folders that are not read, what CLASSES says, and formats."""

    endings: dict[str, str]
    entries: list[_Entry] = field(default_factory=list)
    flat: list[_Entry] = field(default_factory=list)
    count: int = 0
    folders: set[tuple[str, str]] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)
    nested: set[str] = field(default_factory=set)
    outside: list[str] = field(default_factory=list)
    named_parts: set[str] = field(default_factory=set)
    roots: set[str] = field(default_factory=set)
    named: list[str] = field(default_factory=list)
    lossy: set[str] = field(default_factory=set)
    animated: list[str] = field(default_factory=list)

    def wants(self, member: str) -> bool:
        """Say whether a file is a list of classes, and remember what else it is; the name of a folder ends in "/"."""
        self.count += 1
        *folders, name = member.rstrip("/").split("/")
        if any(part.startswith(".") or part in IGNORED for part in (*folders, name)):
            return False  # a notebook's copies, and the hidden twin that macOS packs of every file
        *within, _ = member.split("/")
        depth = next((at for at, folder in enumerate(within) if folder in PARTS), len(within)) + 3
        part, image = (folders[-2] if len(folders) >= 2 else ""), Path(name).suffix.lower() in self.endings
        if len(within) >= depth and within[-2] not in PARTS:
            self.nested.add("/".join(within[:depth]))
        elif member.endswith("/"):
            self.folders |= {(PARTS[folders[-1]], name)} if folders and folders[-1] in PARTS else set()
        elif part in PARTS:
            self.folders.add((PARTS[part], folders[-1]))
            self.named_parts.add(part)
            self.roots.add("/".join(folders[:-2]))
            if image:
                self.entries.append(_Entry(self.count, PARTS[part], folders[-1], member))
            else:
                self.skipped.append(member)
        elif set(folders) & set(PARTS):
            self.skipped.append(member)
        elif image:
            self.outside.append(member)
            if folders:
                self.flat.append(_Entry(self.count, "", folders[-1], member))
        return name.lower() == CLASSES and not set(folders) & set(PARTS)


def load_images(path: Path, name: str, request: Request = EVERYTHING) -> Dataset:
    """Load images of one size in any format that Pillow decodes, without ever unpacking anything to disk.

    Classes are the folder names in sorted order, or the lines of classes.txt beside train/, which may name more than
    there are folders, or those of `request.classes`. Images are grey (1, H, W) if all of them are, else (3, H, W); they
    are turned as EXIF says, transparency is dropped, of several frames the first is read. Hidden files and folders are
    ignored; a DataWarning counts what is not read, and names classes without test images and labels that do not count
    as their names do. Where there is no valid/ (or val/, validation/), every tenth training image of a class (by name)
    is held out. Each split comes in balanced order. A set with images in a lossy format has that in its name, as
    "jpeg". A folder of class folders alone is a test split. Only what is asked for is decoded, at most 512 MiB.

    Raises DataError, naming the file, for a damaged image, one of another size, of more than 4,096 pixels a side or of
    16 bits a channel, for a part that is asked for and has no images, and a class without training images.
    """
    census = _Census(_endings())
    try:
        for member, data in _members(path, census.wants):
            census.named = _listed(data, f"{member} in {path}")
        parts, notes = _parts(census, path, request)
        labels, numbers, told = _labels(parts, census, path, request)
        order = {part: _ordered(own, numbers) for part, own in parts.items()}
        drawn = None
        if request.images is not None:
            drawn = fixed_order(len(order["test"]))[: request.images]
            order["test"] = [order["test"][at] for at in drawn.tolist()]
        pixels = _decoded([entry for own in order.values() for entry in own], path, census, request)
        grey = request.channels != 3 and _all_grey(pixels, census, path)
    except UserError as error:
        raise DataError(str(error)) from error
    _tell(parts, census, labels, path, listed=bool(told))
    splits = {part: _split(own, numbers, pixels, grey) for part, own in order.items()}
    train, valid = splits.get("train"), splits.get("valid")
    if train is not None and valid is None:
        train, valid = hold_out(train)
        if len(valid.y) == 0:
            if request.parts == "all":
                raise DataError(f"{path} has one image a class in train/; add more, or some in valid/<class>/")
            valid = None
    extra = sorted(kind for kind in census.lossy if kind not in name.lower())
    notes += [f"{path}: {note}" for note in (told, f"{request.geometry or ''}") if note]
    return from_splits(
        "-".join([name, *extra]), train, valid, splits["test"], classes=len(labels), class_names=labels, drawn=drawn,
        notes=notes,
    )  # fmt: skip


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


def _members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the wanted files of a folder or archive, always in the same order."""
    if not path.is_dir():
        yield from safe_members(path, wanted=wanted)
        return
    for member in sorted(_walk(path, "", 3)):
        if wanted(member) and not member.endswith("/"):
            yield member, read_bounded(path / member, limit=MOST_FILE)


def _walk(folder: Path | str, prefix: str, depth: int) -> Iterator[str]:
    """Yield the names below a folder, down to a depth; those of folders end in "/"."""
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError as error:
        raise explain(error, folder, "read") from error
    for entry in entries:
        if entry.is_dir():
            yield f"{prefix}{entry.name}/"
            if depth > 1:
                yield from _walk(entry.path, f"{prefix}{entry.name}/", depth - 1)
        else:
            yield prefix + entry.name


def _read(entries: list[_Entry], path: Path) -> Iterator[tuple[_Entry, bytes]]:
    """Yield the content of some of a set's images."""
    counted, by_place = itertools.count(1), {entry.place: entry for entry in entries}
    found: list[_Entry] = []

    def wanted(_: str) -> bool:
        entry = by_place.get(next(counted))
        found.extend([] if entry is None else [entry])
        return entry is not None

    for _, data in _members(path, wanted):
        yield found[-1], data


def _decoded(entries: list[_Entry], path: Path, census: _Census, request: Request) -> dict[int, Pixels]:
    """Return the pixels of images by their places, all of one size."""
    decoded: dict[int, Pixels] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for entry, data in _read(entries, path):
            pixels = _decode(data, entry.member, path, census, request)
            _check_size(pixels, entry.member, decoded, path)
            decoded[entry.place] = pixels
    return decoded


def _all_grey(decoded: dict[int, Pixels], census: _Census, path: Path) -> bool:
    """Return whether all images of a set are grey, also those that were not decoded, by their headers."""
    if any(pixels.ndim == 3 for pixels in decoded.values()):
        return False
    for _, data in _read([entry for entry in census.entries if entry.place not in decoded], path):
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.mode not in GREY:
                    return False
        except Exception:  # what is not decoded is not judged
            continue
    return True


def _decode(data: bytes, member: str, path: Path, census: _Census, request: Request) -> Pixels:
    where, most = f"{member} in {path}", MOST_SIDE * (1 if request.geometry is None else 4)
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MOST_SCANS:
        raise DataError(f"{where} makes its decoder pass over the image more than {MOST_SCANS} times; save it again")
    try:
        formats = (*COMMON, census.endings[Path(member).suffix.lower()])
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if max(image.size) > most:
                raise DataError(f"{where} has {image.width}×{image.height} pixels; at most {most} a side are read")
            if image.mode not in GREY + COLOUR or _is_deep(image, data):
                raise DataError(f"{where} has pixels of kind {_kind(image)}; save it as 8-bit grey or RGB")
            packed = image.info.get("compression") if image.format == "TIFF" else image.format
            if kind := LOSSY.get(str(packed).upper()):
                census.lossy.add(kind)
            if getattr(image, "is_animated", False) and image.format != "MPO":  # whose second picture is a preview
                census.animated.append(member)
            mode = "L" if image.mode in GREY else "RGB"
            image = ImageOps.exif_transpose(image)
            image = image if image.mode == mode else image.convert(mode)
            return np.asarray(image if request.geometry is None else request.geometry(image))
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


def _check_size(pixels: Pixels, member: str, before: dict[int, Pixels], path: Path) -> None:
    shape = pixels.shape[:2]
    first = next(iter(before.values())).shape[:2] if before else shape
    if shape != first:
        raise DataError(
            f"{member} in {path} is {shape[1]}×{shape[0]}, others are {first[1]}×{first[0]}; resize them, or give "
            "--resize and --crop"
        )
    if 3 * shape[0] * shape[1] * (len(before) + 1) > MOST_PIXELS:
        raise DataError(f"{path} holds more than {MOST_PIXELS >> 20} MiB of pixels; use fewer or smaller images")


def _parts(census: _Census, path: Path, request: Request) -> tuple[dict[str, list[_Entry]], list[str]]:
    """Return the images of each part that is asked for, and what was taken for another; refuse what is ambiguous."""
    if len(census.roots) > 1:
        raise DataError(f"{path} holds several sets ({', '.join(sorted(census.roots))}); give one at a time")
    twice = sorted(part for part in census.named_parts if PARTS[part] == "valid")
    if len(twice) > 1:
        raise DataError(f"{path} has {'/ and '.join(twice)}/, which mean the same; keep one")
    parts = {part: [entry for entry in census.entries if entry.part == part] for part in WHOLE}
    parts, notes = {part: own for part, own in parts.items() if own}, []
    if request.parts != "all" and not parts and not census.folders and census.flat:
        if len({entry.member.rpartition("/")[0].rpartition("/")[0] for entry in census.flat}) > 1:
            raise DataError(f"{path} has class folders at several depths; put them into {path}/test/")
        parts, notes = {"test": census.flat}, [f"{path} has class folders alone: all its images are tested"]
        census.outside = [name for name in census.outside if name not in {entry.member for entry in census.flat}]
    if request.parts != "all" and "test" not in parts and parts:
        lent = "valid" if "valid" in parts else "train"
        shown = twice[0] if lent == "valid" else lent
        parts["test"] = parts[lent] if lent == "train" else parts.pop(lent)
        notes.append(
            f"{path} has no test/: the images of {shown}/ are tested"
            + (", which a network that was trained on them knows" if lent == "train" else "")
        )
    for part in ("train", "test") if request.parts == "all" else ("test",):
        if part not in parts:
            others = sorted([*census.outside, *census.nested, *census.skipped])[:3]
            found = f", only {', '.join(others)}" if others else ""
            few = "; to attack a trained network, a test split alone will do" if part == "train" else ""
            raise DataError(f"{path} has no images in {part}/<class>/{found}; put some there{few}")
    return ({"test": parts["test"]} if request.parts == "test" else parts), notes


def _labels(
    parts: dict[str, list[_Entry]], census: _Census, path: Path, request: Request
) -> tuple[list[str], dict[str, int], str]:
    """Return the classes' names, the number of each label, and what says so; refuse what would shift or lose one."""
    trained = {label for part, label in census.folders if part == "train"}
    present = {label for _, label in census.folders} or {entry.label for entry in parts["test"]}
    if request.classes is not None and not (census.named and request.classes.fallback):
        try:
            numbers, told = request.classes.numbers(present)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        return list(request.classes.names), numbers, told
    labels = census.named or sorted(trained or present)
    if len(set(labels)) != len(labels):
        raise DataError(f"{CLASSES} in {path} names a class twice")
    for part, label in sorted(census.folders):
        if label not in labels:
            place = f"{CLASSES} does not name it" if census.named else "not in train/"
            raise DataError(f"{path} has the class '{label}' in {part}/ but {place}")
        if part == "train" and not any(entry[1:3] == (part, label) for entry in census.entries):
            raise DataError(
                f"{path} has no image that can be read in train/{label}/; put some there, or remove the folder (which "
                f"without {CLASSES} changes the labels of the classes after it)"
            )
    if missing := sorted(present - set(labels)):
        raise DataError(f"{path} has the class '{missing[0]}' but {CLASSES} does not name it")
    return labels, {label: at for at, label in enumerate(labels)}, ""


def _tell(parts: dict[str, list[_Entry]], census: _Census, labels: list[str], path: Path, *, listed: bool) -> None:
    """Warn of files that were not read, frames left out, and classes that a split lacks."""
    found = {
        "left out, since they are no images": census.skipped,
        "images outside of train/, valid/ and test/, not read": census.outside,
        "folders within a class's folder, not read": sorted(census.nested),
        "of several frames only the first was read": census.animated,
    }
    listed = listed or bool(census.named)
    for part in WHOLE[1:]:
        present = {entry.label for entry in parts.get(part, ())}
        if present and not listed:
            found[f"classes without images in {part}/"] = [label for label in labels if label not in present]
    if not listed and labels != sorted(labels, key=_as_counted):
        found[f"labels go by the names as text, which is not as one counts; {CLASSES} may say another order"] = labels
    for what, names in found.items():
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            warnings.warn(f"{path}: {what}: {len(names)} ({shown})", DataWarning, stacklevel=4)


def _as_counted(label: str) -> list[str | int]:
    """Return a key that sorts "2" before "10"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", label)]


def _ordered(entries: list[_Entry], numbers: dict[str, int]) -> list[_Entry]:
    """Return images in balanced order."""
    entries = sorted(entries, key=lambda entry: (entry.label, entry.member.rpartition("/")[2]))
    order, _ = balanced_order(torch.tensor([numbers[entry.label] for entry in entries]))
    return [entries[at] for at in order.tolist()]


def _split(entries: list[_Entry], numbers: dict[str, int], pixels: dict[int, Pixels], grey: bool) -> Split:
    planes = np.stack([_planes(pixels[entry.place], grey) for entry in entries])
    return Split(torch.from_numpy(planes), torch.tensor([numbers[entry.label] for entry in entries]))


def _planes(pixels: Pixels, grey: bool) -> Pixels:
    if pixels.ndim == 3:
        return pixels.transpose(2, 0, 1)
    return np.broadcast_to(pixels, (1 if grey else 3, *pixels.shape))
