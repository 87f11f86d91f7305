"""Files that lie: a corpus made by hand and a fuzzer, for every kind of file that sparring reads.

`corpus()` and `fuzzed(count)` yield `Hostile(kind, name, data)`; a test writes `data` to a file and reads it. Only a
`UserError` or a sound result may come out. CANARY is a file name that a pickle in the corpus would create.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from PIL import Image, PngImagePlugin

from .hostile_parts import BOMB, arrays, image, pictures, tarred, tensors, zipped

CANARY = "canary"
SUFFIX = {"idx": "", "gz": ".gz", "zip": ".zip", "tar": ".tar", "images": ".zip", "npz": ".npz", "safetensors": ""}
SUFFIX["json"] = ".json"
TRICKS = ("../up", "a/../../up", "/absolute", "..", "back\\slash", "C:/drive", "a/b/../../../c")


class Hostile(NamedTuple):
    """Name a hostile file: the kind of reader it is for, what is wrong with it, its bytes."""

    kind: str
    name: str
    data: bytes


def corpus() -> Iterator[Hostile]:
    """Yield the files made by hand."""
    for kind, make in MAKERS.items():
        for name, data in make():
            yield Hostile(kind, name, data)


def fuzzed(count: int, seed: int = 0) -> Iterator[Hostile]:
    """Yield `count` mutations of a sound file of every kind; the same for the same seed."""
    dice = random.Random(seed)
    for kind, sound in seeds().items():
        for number in range(count):
            yield Hostile(kind, f"fuzz-{number}", _mutate(sound, dice))


def seeds() -> dict[str, bytes]:
    """Return a sound file of every kind."""
    idx = b"\0\0\x08\x03" + struct.pack(">III", 5, 4, 4) + bytes(80)
    mixed = pictures({"train/cat/0.jpg": image("JPEG"), "train/dog/1.png": image(mode="L")})
    sound = tarfile.TarInfo("a/b")
    sound.size = 700
    return {
        "idx": idx,
        "gz": gzip.compress(idx * 20, mtime=0),
        "zip": zipped({"a": b"x" * 1000, "b/c": b"yz" * 500}),
        "tar": tarred([(sound, b"x" * 700), (sound, b"y" * 700)]),
        "images": zipped(mixed, zipfile.ZIP_STORED),
        "npz": arrays(),
        "safetensors": safetensors.numpy.save({"w": np.ones((3, 4), np.float32), "b": np.zeros(3, np.float16)}),
        "json": json.dumps({"a": [1, 2.5, None, "x"], "b": {"c": True}}).encode(),
    }


def _mutate(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at = dice.randrange(max(len(changed), 1))
        act = dice.randrange(6)
        if act == 0:
            changed[at : at + 1] = bytes([changed[at] ^ 1 << dice.randrange(8)]) if changed else b"\0"
        elif act == 1:
            del changed[at:]
        elif act == 2:
            del changed[at : at + dice.randrange(1, 40)]
        elif act == 3:
            changed[at:at] = changed[at : at + dice.randrange(1, 200)]
        elif act == 4:
            changed[at : at + 4] = dice.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
        else:
            changed[at : at + 8] = dice.randbytes(8)
    return bytes(changed)


# -- what is wrong, kind by kind --------------------------------------------------------------------------------------

Named = Iterator[tuple[str, bytes]]


def _idx() -> Named:
    yield from (("empty", b""), ("one-byte", b"\0"), ("text", b"hello, world"), ("header-only", b"\0\0\x08\x03"))
    for kind in (0, 9, 0x0B, 0x0D, 0x0E, 255):
        yield f"type-{kind}", bytes([0, 0, kind, 1]) + struct.pack(">I", 4) + bytes(4)
    for dims in (0, 5, 255):
        yield f"dims-{dims}", bytes([0, 0, 8, dims]) + b"\xff" * 64
    for shape in ((2**32 - 1,) * 3, (2**31, 2, 1), (0, 2**32 - 1, 4), (5, 4, 5), (5, 4, 3)):
        yield f"shape-{shape}", b"\0\0\x08\x03" + struct.pack(">III", *shape) + bytes(80)


def _gz() -> Named:
    sound = seeds()["gz"]
    yield "bomb", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + BOMB + bytes(8)
    yield "bomb-of-members", gzip.compress(bytes(1 << 24), mtime=0) * 200
    for cut in (2, 9, 10, 20, len(sound) - 9, len(sound) - 1):
        yield f"cut-{cut}", sound[:cut]
    yield "wrong-crc", sound[:-8] + bytes(4) + sound[-4:]
    yield "wrong-size", sound[:-4] + b"\xff" * 4
    yield "junk-after", sound + b"junk"
    yield "extra-field", b"\x1f\x8b\x08\x04" + bytes(6) + b"\xff\xff"
    yield "endless-name", b"\x1f\x8b\x08\x08" + bytes(6) + b"a" * 100_000


def _zip() -> Named:
    sound = seeds()["zip"]
    for number, name in enumerate(TRICKS):
        yield f"name-{number}", zipped({name: b"x", "fine": b"y"})
    for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
        info = zipfile.ZipInfo("member")
        info.external_attr = (kind | 0o777) << 16
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(info, "/etc/passwd")
        yield f"kind-{kind:o}", file.getvalue()
    yield "bzip2", zipped({"a": bytes(1000)}, zipfile.ZIP_BZIP2)
    yield "lzma", zipped({"a": bytes(1000)}, zipfile.ZIP_LZMA)
    yield "many-large", _lying_zip([(f"{n}", 60 << 20) for n in range(60)])
    yield "one-large", _lying_zip([("a", 3_000 << 20)])
    yield "declares-less", _lying_zip([("a", 1000)])
    yield "declares-nothing", _lying_zip([("a", 0)])
    yield "encrypted", _patched(sound, b"PK\x01\x02", 8, b"\x01\x00")
    yield "wrong-crc", _patched(sound, b"PK\x01\x02", 16, b"\0\0\0\0")
    yield "offset-beyond", _patched(sound, b"PK\x01\x02", 42, b"\xff\xff\xff\x7f")
    yield "count-lies", _patched(sound, b"PK\x05\x06", 8, b"\xff\xff\xff\xff")
    yield "directory-lies", _patched(sound, b"PK\x05\x06", 12, b"\xff\xff\xff\x7f")
    yield "directory-beyond", _patched(sound, b"PK\x05\x06", 16, b"\xff\xff\xff\x7f")
    yield "large-directory", b"PK" + bytes(70 << 20) + _end_of_zip(70 << 20, 2)
    yield "many-files", zipped({f"{n:05}": b"" for n in range(10_001)})
    yield from (("only-end", _end_of_zip(0, 0)), ("only-start", b"PK\x03\x04"), ("cut", sound[:-10]))


def _lying_zip(members: list[tuple[str, int]]) -> bytes:
    # Every entry shares one local file, a deflate bomb, and declares the size it likes.
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 8, 0, 0, 0, len(BOMB), 0, 1, 0) + members[0][0].encode()[:1]
    directory = b""
    for name, size in members:
        head = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, 0, len(BOMB), size, len(name), *[0] * 6)
        directory += head + name.encode()
    return local + BOMB + directory + _end_of_zip(len(directory), len(local) + len(BOMB), len(members))


def _end_of_zip(size: int, offset: int, count: int = 0) -> bytes:
    return struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, size, offset, 0)


def _patched(data: bytes, mark: bytes, offset: int, new: bytes) -> bytes:
    at = data.index(mark) + offset
    return data[:at] + new + data[at + len(new) :]


def _tar() -> Named:
    for number, name in enumerate(TRICKS):
        yield f"name-{number}", tarred([(_info(name), b"")])
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        yield f"kind-{kind.decode()}", tarred([(_info("member", kind, linkname="/etc/passwd"), b"")])
    for size in (65 << 20, 8 << 30, 10**15):
        yield f"large-{size}", tarred([(_info("a", size=size), b"")])
        yield f"large-{size}-gz", gzip.compress(tarred([(_info("a", size=size), b"")]))
        for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, tarfile.XGLTYPE):
            head = _info("a", kind, size=size).tobuf(tarfile.GNU_FORMAT)
            yield f"header-{kind.decode()}-{size}", head
            if kind != tarfile.GNUTYPE_SPARSE and size == 8 << 30:
                start = zlib.compressobj(9, zlib.DEFLATED, -15)
                packed = start.compress(head) + start.flush(zlib.Z_FULL_FLUSH)
                yield f"header-{kind.decode()}-bomb", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + packed + BOMB + bytes(8)
    yield "negative-size", tarred([(_info("a", size=-512), b"")])
    chain = _info("x", tarfile.XHDTYPE, size=20)
    yield "chained-headers", tarred([(chain, b"20 path=aaaaaaaaaaa\n")] * 3000)
    yield "cut-member", tarred([(_info("a", size=2000), bytes(2000))])[:1200]
    yield "cut-header", tarred([(_info("a"), b"")])[:300]
    yield "many-files", tarred([(_info(str(n)), b"") for n in range(10_001)])
    for text in (
        b"30 size=99999999999999999999\n",
        b"12 size=-1\n",
        b"0 x=y\n",
        b"-9 x=y\n",
        b"9" * 600,
        b"22 GNU.sparse.map=a\n",
    ):
        pax = _info("x", tarfile.XHDTYPE, size=len(text))
        yield f"pax-{text[:14].decode().strip()}", tarred([(pax, text), (_info("a", size=3), b"abc")])


def _info(name: str, kind: bytes = tarfile.REGTYPE, *, size: int = 0, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, linkname
    return info


def _images() -> Named:
    at = "train/cat/0.png"
    png, jpeg = image(), image("JPEG")
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 2_000_000, zip=True)
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG", pnginfo=text)
    wrong = {
        "huge": _png_size(png, 100_000, 100_000),
        "wide": _png_size(png, 2**31 - 1, 1),
        "flat": _png_size(png, 0, 8),
        "larger": _png_size(png, 9, 8),
        "huge-jpeg": _patched(jpeg, b"\xff\xc0", 5, b"\xff\xff\xff\xff"),
        "flat-jpeg": _patched(jpeg, b"\xff\xc0", 5, b"\0\0\0\0"),
        "other-size": image(size=(9, 8)),
        "too-large": image(size=(5_000, 1), mode="L"),
        "deep": image(mode="I;16"),
        **{f"cut-{kind}".lower(): image(kind)[:-30] for kind in ("GIF", "TIFF", "BMP", "WEBP")},
        "text": b"not a picture",
        "empty": b"",
        "text-bomb": file.getvalue(),
        "profile-bomb": _png_chunk(png, b"iCCP", b"a\0\0" + b"\x78\x9c" + BOMB),
        "pixel-bomb": _png_chunk(png, b"IDAT", b"\x78\x9c" + BOMB),
        "scan-bomb": _scan_bomb(20_000),
        "bad-chunk": _png_chunk(png, b"\xff\xfe\xfd\xfc", b"x"),
    }
    wrong |= {f"cut-{cut}": png[:cut] for cut in (8, 30, 50, len(png) - 13)}
    wrong |= {f"cut-jpeg-{cut}": jpeg[:cut] for cut in (2, 20, 160, 400, len(jpeg) - 30)}
    for name, data in wrong.items():
        yield name, zipped(pictures({at: data}))
    yield "no-test", zipped({at: png})
    yield "no-train", zipped({"test/cat/0.png": png})
    yield "class-only-in-test", zipped(pictures({"test/<b>/0.png": png}))
    yield "one-image-a-class", zipped({"train/a/0.png": png, "test/a/0.png": png})
    yield "nothing", zipped({})
    yield "climbs", zipped(pictures({"train/../../0.png": png}))


def _scan_bomb(scans: int) -> bytes:
    # One more pass of a progressive JPEG costs 33 bytes of file and, here, tens of milliseconds of work.
    file = io.BytesIO()
    Image.new("L", (4096, 4096), 100).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


def _png_size(png: bytes, width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]


def _png_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    return png[:33] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) + png[33:]


class _Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(CANARY),)


def _npz() -> Named:
    wrong: dict[str, dict[str, Any]] = {
        "floats": {"x_train": np.zeros((4, 8, 8), np.float32)},
        "bytes-as-text": {"x_train": np.array(["a"] * 4)},
        "records": {"x_train": np.zeros(4, [("a", "u1")])},
        "dates": {"y_train": np.zeros(4, "M8[s]")},
        "flat-images": {"x_train": np.zeros((4, 64), np.uint8)},
        "fewer-labels": {"y_train": np.array([0, 1, 0])},
        "no-images": {"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, np.int64)},
        "no-pixels": {"x_train": np.zeros((4, 0, 8), np.uint8)},
        "no-test-images": {"x_test": np.zeros((0, 8, 8), np.uint8), "y_test": np.zeros(0, np.int64)},
        "negative-label": {"y_train": np.array([0, 1, 0, -1])},
        "huge-label": {"y_train": np.array([0, 1, 0, 2**62])},
        "unsigned-label": {"y_train": np.array([0, 1, 0, 2**64 - 1], np.uint64)},
        "label-only-in-test": {"y_test": np.array([0, 1, 0, 2])},
        "other-shape": {"x_test": np.zeros((4, 8, 9), np.uint8)},
        "scalar": {"y_train": np.array(3)},
        "names": {"class_names": np.array(["a", "b", "c"])},
        "half-valid": {"x_valid": np.zeros((0, 8, 8), np.uint8)},
        "wrong-valid": {"x_valid": np.zeros((2, 8, 8), np.uint8), "y_valid": np.array([0, 7])},
        **{f"without-{key}": {key: None} for key in ("x_train", "y_train", "x_test", "y_test")},
    }
    for name, changed in wrong.items():
        yield name, arrays(**changed)
    objects = io.BytesIO()
    np.lib.format.write_array(objects, np.array([_Payload()], dtype=object), allow_pickle=True)
    for name, data in (("pickled-array", objects.getvalue()), ("pickle", pickle.dumps(_Payload()))):
        yield name, zipped({"x_train.npy": data})
    for number, header in enumerate(_headers()):
        text = header.encode("latin-1")
        yield f"header-{number}", zipped({"x_train.npy": b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text})
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -1)}\n"
    yield "negative-shape", zipped({"x_train.npy": b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + b"abcd"})
    for version in (0, 3, 9):
        yield f"version-{version}", zipped({"x_train.npy": b"\x93NUMPY" + bytes([version, 0]) + bytes(100)})
    yield "no-zip", b"\x93NUMPY\x01\0"
    yield "bomb", _lying_zip([("x_train.npy", 3_000 << 20)])


def _headers() -> list[str]:
    say = "{{'descr': {}, 'fortran_order': False, 'shape': {}}}\n".format
    shapes = (
        "(10**9,)",
        "(1000000000000,)",
        "(-1,)",
        "(-4, -4)",
        "(2**62, 0)",
        "(4611686018427387904, 0)",
        "(True,)",
        "'x'",
        "(2**64,)",
        f"({'9' * 5000},)",
    )
    absurd = [say("'|u1'", shape) for shape in shapes] + [
        say(kind, "(1,)") for kind in ("'|O'", "'|V9'", "5", "'<f999'")
    ]
    return [*absurd, say("'|u1'", "(1000,)*60"), "(" * 5_000, "[" * 9_000, "{}", "", "__import__('os')", "\0" * 50]


def _safetensors() -> Named:
    sound = seeds()["safetensors"]
    for length in (0, 1, 2**24, 2**31, 2**32, 2**63, 2**64 - 1, len(sound), len(sound) - 7):
        yield f"length-{length}", struct.pack("<Q", length) + sound[8:]
    yield from (("empty", b""), ("cut-length", sound[:5]), ("cut", sound[:-1]), ("longer", sound + b"x"))
    for number, header in enumerate((b"[]", b"{", b"null", b"{}{}", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}")):
        yield f"json-{number}", tensors(header)
    entries = {
        "unknown-type": ("X9", [1], [0, 4]),
        "overflow": ("F32", [2**62, 4], [0, 4]),
        "negative": ("F32", [-1], [0, 4]),
        "huge": ("F32", [2**40], [0, 2**42]),
        "beyond": ("F32", [2], [0, 8]),
        "backwards": ("F32", [1], [4, 0]),
        "gap": ("F32", [0], [4, 4]),
        "huge-and-empty": ("F32", [0, 2**62], [0, 0]),
        "fraction": ("F32", [1.5], [0, 4]),
        "text": ("F32", ["a"], [0, 4]),
        "deep": ("F32", [1] * 100_000, [0, 4]),
        "nan": ("F32", [1], [0, 4]),
    }
    for name, (dtype, shape, offsets) in entries.items():
        body = struct.pack("<f", float("nan")) if name == "nan" else bytes(4)
        yield name, tensors({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, body)
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    yield "overlap", tensors({"a": one, "b": one}, bytes(4))
    yield "metadata", tensors({"__metadata__": {"a": 1}, "w": one}, bytes(4))
    yield "pickle", pickle.dumps(_Payload())


def _json() -> Named:
    texts = (
        "",
        "{",
        "[NaN]",
        "[Infinity]",
        "[" * 200_000,
        '{"a":' * 100_000,
        "9" * 5_000,
        '{"a":1}x',
        "\xff",
        "\0",
        "'a'",
    )
    for number, text in enumerate(texts):
        yield f"text-{number}", text.encode("latin-1")
    yield "large", b" " * (65 << 20)


MAKERS: dict[str, Callable[[], Named]] = {
    "idx": _idx,
    "gz": _gz,
    "zip": _zip,
    "tar": _tar,
    "images": _images,
    "npz": _npz,
    "safetensors": _safetensors,
    "json": _json,
}
