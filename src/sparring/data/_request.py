"""Which of a user's own images to read, and how: splits, size and classes."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..errors import DataError, UnknownNameError
from ..files import MIB, read_bounded

INTERPOLATIONS = {filter.name.lower(): filter for filter in Image.Resampling}
SPLITS = ("train", "valid", "test")
MOST_SIDE = 4096  # four times as much for photographs that are resized, below Pillow's own limit of pixels
NUMBERED = re.compile(r"\s*(\d+)\s*[,;:\t]\s*(\S.*)")
SYNSET = re.compile(r"(n\d{8})[\s,]+(\S.*)")


@dataclass(frozen=True)
class Geometry:
    """How images are brought to one size, as in timm and torchvision: resized, then cropped at the centre.

    `resize` is the length of the shorter side in pixels, with the aspect ratio kept, or height and width to stretch to.
    `crop` is height and width; an area beyond the image is black. `interpolation` is one of Pillow's, with
    antialiasing. `source` names the origin of these settings.
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    source: str = field(default="", compare=False)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a resized and cropped image."""
        if self.resize is not None:
            image = _resized(image, self.resize, INTERPOLATIONS[self.interpolation])
        return image if self.crop is None else _cropped(image, *self.crop)

    def _is_inside(self) -> bool:
        """Return whether the crop lies inside every image, whatever its size was."""
        sides = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize or (0, 0)
        return self.crop is None or all(crop <= side for crop, side in zip(self.crop, sides, strict=True))

    def __str__(self) -> str:
        steps = []
        if isinstance(self.resize, tuple):
            steps.append(f"stretched to {self.resize[0]}×{self.resize[1]} ({self.interpolation})")
        elif self.resize is not None:
            steps.append(f"the shorter side is resized to {self.resize} ({self.interpolation})")
        if self.crop is not None:
            steps.append(f"cropped to the central {self.crop[0]}×{self.crop[1]}")
            steps += [] if self._is_inside() else ["smaller images padded with black"]
        if self.source:
            steps.append(f"as {self.source} has it")
        return ", ".join(steps)


def _resized(image: Image.Image, size: int | tuple[int, int], how: Image.Resampling) -> Image.Image:
    if isinstance(size, int):
        short, long = min(image.size), max(image.size)
        if short == size:
            return image
        other = size * long // short
        size = (other, size) if image.width <= image.height else (size, other)
    return image.resize((size[1], size[0]), how)


def _cropped(image: Image.Image, height: int, width: int) -> Image.Image:
    # Rounding as in torchvision: if a border of odd width is padded, the larger part is right and below; if one is
    # cut, halves are rounded to even.
    left, top = (
        -((wanted - there) // 2) if wanted > there else round((there - wanted) / 2)
        for wanted, there in ((width, image.width), (height, image.height))
    )
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class ClassList:
    """Names of a network's classes in the order of its outputs, their WordNet ids, and their source.

    If it is a `fallback`, class names in the data set itself take precedence.
    """

    names: tuple[str, ...]
    source: str
    ids: tuple[str, ...] = ()
    fallback: bool = False

    def numbers(self, found: Iterable[str]) -> tuple[dict[str, int], str]:
        """Return the number of each class that was found by its name or id, and a sentence on how.

        Case is ignored, "_" stands for a space, and any of several names separated by commas matches; the narrowest
        match counts. Raise DataError, with the names, if one matches no class, several, or the class of another.
        """
        tables = [_table(self.ids, lambda text: [text]), _table(self.names, lambda text: [text])]
        tables += [
            _table(self.names, lambda text: text.split(",")[:1]),
            _table(self.names, lambda text: text.split(",")),
        ]
        placed: dict[str, int] = {}
        wrong, by_id = [], 0
        for label in sorted(found):
            at = next((at for at, table in enumerate(tables) if _plain(label) in table), None)
            numbers = [] if at is None else tables[at][_plain(label)]
            if len(numbers) == 1 and numbers[0] not in placed.values():
                placed[label] = numbers[0]
                by_id += at == 0
            else:
                several = f" (which of {', '.join(map(str, numbers))}?)" if len(numbers) > 1 else ""
                taken = f" (class {numbers[0]} already has another name here)" if len(numbers) == 1 else ""
                wrong.append(f"{label}{several}{taken}")
        if wrong:
            shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
            raise DataError(
                f"{len(wrong)} of {len(wrong) + len(placed)} classes are not among those of {self.source}: {shown}; "
                "rename them, or give --classes FILE with the names in the order of the network's outputs"
            )
        how = " and ".join(
            f"{count} by {what}" for count, what in ((by_id, "WordNet id"), (len(placed) - by_id, "name")) if count
        )
        return placed, f"labels are the numbers of the {len(self.names):,} classes of {self.source}: {how}"


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).replace("_", " ").strip().casefold()


def _table(names: Sequence[str], parts: Callable[[str], list[str]]) -> dict[str, list[int]]:
    table: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        for part in dict.fromkeys(map(_plain, parts(name))):
            table.setdefault(part, []).append(number)
    return table


def read_classes(path: Path) -> ClassList:
    """Read the names of a network's classes in the order of its outputs; raise DataError for other files.

    The file has one name per line ("n01440764 tench, Tinca tinca" starts with a WordNet id), or is JSON: a list, or a
    dictionary from number to name or to [WordNet id, name], such as ImageNet's class index, from name to number, such
    as torchvision's `class_to_idx`, or a config.json of Hugging Face.
    """
    try:
        text = read_bounded(path, limit=16 * MIB).decode("utf-8-sig")
        entries = _from_json(json.loads(text)) if text.lstrip()[:1] in ("[", "{") else _from_lines(text.splitlines())
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is not a list of classes ({error}); give names, one per line, or JSON: a list, or a map from "
            "number to name"
        ) from error
    entries = [entry.strip() for entry in entries]
    while entries and not entries[-1]:
        entries.pop()
    if not entries or not all(entries):
        raise DataError(f"{path} has no name for class {entries.index('') if entries else 0}")
    split = [SYNSET.fullmatch(entry) for entry in entries]
    if all(split):
        return ClassList(tuple(m[2] for m in split if m), str(path), ids=tuple(m[1] for m in split if m))
    return ClassList(tuple(entries), str(path))


def _from_lines(lines: list[str]) -> list[str]:
    """Return the names in lines; of a table such as "0,tench", maybe under a heading, those after the numbers."""
    found = [NUMBERED.fullmatch(line) for line in lines if line.strip()]
    numbered = [one for one in found if one is not None]
    if not numbered or numbered != found[-len(numbered) :] or len(found) - len(numbered) > 1:
        return lines
    if [int(one[1]) for one in numbered] != list(range(len(numbered))):
        raise ValueError(f"its lines are not numbered 0, 1, ..., {len(numbered) - 1} in this order")
    return [one[2] for one in numbered]


def _from_json(content: Any) -> list[str]:
    if isinstance(content, dict) and isinstance(content.get("id2label"), dict):
        content = content["id2label"]  # of a Hugging Face config.json
    if isinstance(content, dict) and content and all(type(number) is int for number in content.values()):
        if len(set(content.values())) < len(content):
            raise ValueError("two of its names have one number")
        content = {number: name for name, number in content.items()}  # class_to_idx of torchvision's folders
    if isinstance(content, dict):
        numbers = sorted(map(int, content))
        if numbers != list(range(len(numbers))):
            raise ValueError(f"its {len(numbers)} classes are not numbered from 0 to {len(numbers) - 1}")
        by_number = {int(key): value for key, value in content.items()}
        content = [by_number[number] for number in numbers]
    entries = [" ".join(entry) if isinstance(entry, list) else entry for entry in content]
    if not all(isinstance(entry, str) for entry in entries):
        raise TypeError("its entries are not names")
    return entries


@dataclass(frozen=True)
class Request:
    """What to read of a user's own data.

    `parts`: all (training images are required), all that exist, or test images only. Without test/, the images of
    valid/, or else of train/, are used as test images, with a note. `images`: decode only this number of test images,
    the first of `fixed_order`. `channels`: 3 to convert grey images to colour. `cache`: False to keep nothing: images
    in files of their own are decoded whenever they are used, others once, into memory. `limit`: largest number of
    images per split, balanced over classes. `valid_seed`: seed of the validation images that are held out, if the data
    have none. `identify`: hash images in files by all their files, whatever is decoded.
    """

    parts: Literal["all", "any", "test"] = "all"
    images: int | None = None
    geometry: Geometry | None = None
    classes: ClassList | None = None
    channels: int | None = None
    cache: bool = True
    limit: Mapping[str, int] = field(default_factory=dict)
    valid_seed: int | None = None
    identify: bool = False


EVERYTHING = Request()


@dataclass(frozen=True)
class Preparation:
    """How a user's own images are prepared and how many are used, as in plans and commands.

    `resize` and `crop` are pixels, such as 224 or "224x320" (height and width); `classes` is a file for `read_classes`;
    `limit` is the largest number of images per split, or one number for all; `valid_seed` as in `Request`.
    """

    resize: int | str | None = None
    crop: int | str | None = None
    interpolation: str | None = None
    classes: str | None = None
    limit: Mapping[str, int] | int | None = None
    valid_seed: int | None = None

    def __post_init__(self) -> None:
        self.geometry()
        for split, count in self.limits().items():
            if split not in SPLITS:
                raise UnknownNameError("split", split, SPLITS)
            if count < 1:
                raise DataError(f"limit.{split} must be 1 or more, not {count}")

    def sizes(self) -> tuple[int | tuple[int, int] | None, tuple[int, int] | None]:
        """Return resize and crop in the form that `Geometry` takes."""
        resize, crop = _sizes("--resize", self.resize), _sizes("--crop", self.crop)
        return (resize[0] if resize is not None and "x" not in str(self.resize).lower() else resize), crop

    def geometry(self) -> Geometry | None:
        """Return how images are brought to one size, or None if no setting says so."""
        side, crop = self.sizes()
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise UnknownNameError("interpolation", self.interpolation, INTERPOLATIONS)
        return None if side is crop is None else Geometry(side, crop, self.interpolation or "bilinear")

    def limits(self) -> dict[str, int]:
        """Return the largest number of images of each split."""
        return dict.fromkeys(SPLITS, self.limit) if isinstance(self.limit, int) else dict(self.limit or {})

    def request(self, *, cache: bool = True) -> Request:
        """Return the request for training; raise DataError if an interpolation is given without a size."""
        geometry = self.geometry()
        if self.interpolation is not None and self.sizes()[0] is None:
            raise DataError("--interpolation needs --resize")
        listed = None if self.classes is None else read_classes(Path(self.classes))
        return Request("all", None, geometry, listed, None, cache, self.limits(), self.valid_seed)


def _sizes(option: str, said: int | str | None) -> tuple[int, int] | None:
    """Return height and width from 224, "224" or "224x320"; raise DataError for anything else."""
    if said is None:
        return None
    text = str(said).lower()
    sides = [int(part) for part in text.split("x") if part.isdecimal()]
    if len(sides) != text.count("x") + 1 or len(sides) > 2 or not all(1 <= side <= MOST_SIDE for side in sides):
        raise DataError(f"{option} takes pixels from 1 to {MOST_SIDE}, such as 224 or HEIGHTxWIDTH, not '{said}'")
    return sides[0], sides[-1]
