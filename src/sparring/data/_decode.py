"""Decode the bytes of one untrusted image: which formats are read and what is refused."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import DataError
from ..files import read_bounded
from ._request import MOST_SIDE, Geometry

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
# Formats that are recognised by content; any other is tried only on files with its extension.
COMMON = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
# Not decoded by Pillow itself: an interpreter of programs, Windows formats, and mere names.
EXCLUDED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}
LOSSY = {"JPEG": "jpeg", "MPO": "jpeg", "JPEG2000": "jpeg2000", "WEBP": "webp", "AVIF": "avif"}
GREY = ("1", "L", "LA", "La")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK")  # ImageNet contains a few of the last
SIDEWAYS = (5, 6, 7, 8)  # orientations of EXIF that exchange height and width
MOST_FILE = 64 << 20
MOST_SCANS = 32  # a normal progressive JPEG has about ten; each is a pass over all pixels for a few bytes of file


class Picture(NamedTuple):
    """An 8-bit grey or RGB image, its lossy source format, if any, and whether it is one of several frames.

    `turned`: EXIF says that it is shown with height and width exchanged.
    """

    image: Image.Image
    lossy: str = ""
    animated: bool = False
    turned: bool = False

    @property
    def channels(self) -> int:
        return len(self.image.getbands())

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.height, self.image.width

    def planes(self) -> Pixels:
        """Return the pixels (C, H, W)."""
        bands = self.image.getbands()  # one by one: to pack them in lines takes half as long again
        packed = b"".join(self.image.tobytes("raw", band) for band in bands)
        return np.frombuffer(packed, np.uint8).reshape(len(bands), *self.size)


@functools.cache
def endings() -> dict[str, str]:
    """Return the format of each extension of an image file."""
    known = Image.registered_extensions()  # which also imports all that Pillow can decode
    return {ending: kind for ending, kind in known.items() if kind in Image.OPEN and kind not in EXCLUDED}


@contextmanager
def strict() -> Iterator[None]:
    """Refuse an image with suspiciously many pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def read(content: Any) -> bytes:
    """Return the bytes of an image, given directly or in a file of at most 64 MiB."""
    return content if isinstance(content, bytes) else read_bounded(content, limit=MOST_FILE)


def decode(data: bytes, where: str, geometry: Geometry | None) -> Picture:
    """Return an image as displayed: rotated as EXIF says, without transparency, the first of several frames.

    `where` names it, and its extension identifies rarer formats. Raise DataError for one that is damaged, has more than
    4,096 pixels a side (16,384 if a `geometry` resizes it) or 16 bits a channel.
    """
    most = MOST_SIDE * (1 if geometry is None else 4)
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MOST_SCANS:
        raise DataError(f"{where} makes its decoder pass over the image more than {MOST_SCANS} times; save it again")
    try:
        own = endings().get(PurePosixPath(where.partition(" in ")[0]).suffix.lower())
        with Image.open(io.BytesIO(data), formats=(*COMMON, *([own] if own else []))) as image:
            if max(image.size) > most:
                raise DataError(f"{where} has {image.width}×{image.height} pixels; the limit is {most} per side")
            if image.mode not in GREY + COLOUR or _is_deep(image, data):
                raise DataError(f"{where} has pixels of kind {_kind(image)}; save it as 8-bit grey or RGB")
            lossy, animated = _kept(image)
            mode = "L" if image.mode in GREY else "RGB"
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
            image = ImageOps.exif_transpose(image)
            image = image if image.mode == mode else image.convert(mode)
            image = image if geometry is None else geometry(image)
            image.load()
            return Picture(image, lossy, animated, turned)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{where} is not an image that Pillow can read; replace or remove it") from error
    except Exception as error:  # a decoder of hostile bytes can raise anything
        raise DataError(f"{where} is damaged ({error}); replace or remove it") from error


class Header(NamedTuple):
    """Describe an image that is not decoded, as `Picture` does for one that is."""

    coloured: bool = False
    lossy: str = ""
    animated: bool = False


def header(data: bytes) -> Header:
    """Return the description in an image's header; a file without one is judged when it is decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return Header(image.mode not in GREY, *_kept(image))
    except Exception:  # a decoder of hostile bytes can raise anything
        return Header()


def _kept(image: Image.Image) -> tuple[str, bool]:
    """Return the lossy format of an image, if it is one, and whether it is one of several."""
    packed = image.info.get("compression") if image.format == "TIFF" else image.format
    animated = getattr(image, "is_animated", False) and image.format != "MPO"  # its second one is a preview
    return LOSSY.get(str(packed).upper(), ""), animated


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Return whether an image that Pillow reads with 8 bits per channel has more in its file."""
    decoders = [(tile[0], tile[3] if isinstance(tile[3], tuple) else (tile[3],)) for tile in getattr(image, "tile", ())]
    if any(";16" in str(part) for _, args in decoders for part in args) or any(kind == "SGI16" for kind, _ in decoders):
        return True
    if image.format == "PPM":
        return any(isinstance(part, int) and part > 255 for _, args in decoders for part in args)
    if image.format == "JPEG2000":
        return (data[data.find(b"\xff\x4f\xff\x51") + 42] & 0x7F) > 7
    return image.format == "AVIF" and bool(data[data.find(b"av1C") + 6] & 0x40)


def _kind(image: Image.Image) -> str:
    return image.mode if image.mode not in GREY + COLOUR else f"{image.mode} with 16 bits per channel"
