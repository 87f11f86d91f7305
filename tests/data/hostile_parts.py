"""Sound little files of every kind, and knobs to make them lie; see hostile.py."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image


def deflated(mib: int) -> bytes:
    """Return a raw deflate stream of that many MiB of zeros, at a thousandth of the size, without making them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * mib + b"\x03\x00"


BOMB = deflated(3_000)


def image(kind: str = "PNG", size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    """Return a sound picture of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, 100).save(file, kind)
    return file.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a sound zip."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, data)
    return file.getvalue()


def tarred(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """Return a tar of headers, as they are, and contents."""
    blocks = [info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512) for info, data in members]
    return b"".join(blocks) + bytes(1024)


def pictures(extra: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """Return the members of a sound, tiny set of pictures, with more or others in place."""
    names = [f"{part}/{label}/{n}.png" for part in ("train", "test") for label in ("cat", "dog") for n in range(2)]
    return {name: image() for name in names} | (extra or {})


def arrays(**changed: object) -> bytes:
    """Return a tiny .npz, sound but for what is changed (None: left out)."""
    x, y = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    every = {"x_train": x, "y_train": y, "x_test": x, "y_test": y} | changed
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, **{key: np.asarray(value) for key, value in every.items() if value is not None})
    return file.getvalue()


def tensors(header: object, body: bytes = b"") -> bytes:
    """Return a safetensors file of any header, given as bytes or as what JSON can say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
