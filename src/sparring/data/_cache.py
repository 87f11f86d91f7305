"""Decoded images: in memory if they are few, otherwise in a mapped cache file.

The user's cache folder contains, for each set of pixels, NAME.pixels (N, C, H, W), NAME.hashes (the SHA-256 of each
image's file) and NAME.json, and for each list of files SET.json, which names its pixels. NAME is the hash of the
content: of the files' hashes, their preparation and the decoders. If a set is copied, or its files are touched, its
files are therefore hashed again, but not decoded. SET-CHANGED.* contain the work of an interrupted run, FILES.files the
hashes of files that were not decoded.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import features
from torch import Tensor

from ..errors import DataError, UserError
from ..files import canonical_json, explain, lock, read_bounded, read_json, sha256_bytes, write_atomic, write_json
from ._decode import Pixels, decode, header, read, strict
from ._pixels import (
    Coloured,
    Found,
    Rows,
    Summary,
    available_workers,
    count,
    fill_array,
    fill_file,
    hash_files,
    in_memory,
    jobs,
    look,
    work,
)
from ._places import Progress, cache_root
from ._undecoded import Decoder, Undecoded
from .formats._listing import Entry, Files, Source

SMALL = 16 << 20  # bytes of pixels that are decoded each time: in a second
SYNCED = 10.0  # seconds of work that an interrupted run may lose
SAMPLE = 8  # images that are timed
VERSION = 1
NAME = re.compile("[0-9a-f]{32}")  # of pixels


@dataclass(frozen=True)
class Decoded:
    """Pixels (N, C, H, W), uint8, and their statistics.

    `counts` (C, 256) count the values of the first `counted` rows; `hashes` (N, 32) are of the images' files. Both
    are missing if images were not decoded, or were few.
    """

    x: Tensor
    lossy: frozenset[str]
    animated: tuple[str, ...]
    counts: Tensor | None = None
    hashes: Pixels | None = None


def decoded(
    source: Source, entries: Sequence[Entry], how: Rows, *, kept: bool, progress: Progress | None, lazy: bool = False,
    begin: Callable[[Rows], None] = lambda _: None,
) -> Decoded:  # fmt: skip
    """Decode images, in this order: few in memory, many that are `kept` once, into the cache.

    Others are `lazy`, decoded whenever they are used, if each is in its own file; else in memory. `begin` is told the
    rows before many are decoded.
    """
    rows = list(enumerate(entries))
    try:
        large = len(entries) * math.prod(how.shape) > SMALL
        if kept and large:
            return _Cache(source, rows, how, progress, begin).open()
        if lazy and large and isinstance(source, Files):  # sets of which any image can be read by itself
            begin(how)
            return _undecoded(source, rows, how, progress)
        out, found = in_memory(source, rows, how)
        counts = torch.from_numpy(found.counts) if large else None
        return Decoded(torch.from_numpy(out), frozenset(found.lossy), tuple(sorted(found.animated)), counts)
    except Coloured:
        how = replace(how, shape=(3, *how.shape[1:]))
        return decoded(source, entries, how, kept=kept, progress=progress, lazy=lazy, begin=begin)


def rows_like_first(source: Source, entries: Sequence[Entry], how: Rows) -> Rows:
    """Return the shape that all images must have, which is that of the first; grey until another has colours."""
    first = min(entries, key=lambda entry: entry.place)
    with strict():
        for entry, content in source.contents([first]):
            picture = decode(read(content), how.name(entry), how.geometry)
            shape = (max(picture.channels, how.shape[0]), *picture.size)
            return replace(how, shape=shape, turned=picture.turned)
    raise DataError(f"{how.name(first)} is missing; was the data set changed while it was read?")


def any_coloured(source: Source, entries: Sequence[Entry]) -> bool:
    """Return whether any of the images has colours, by their headers."""
    return any(header(read(content)).coloured for _, content in source.contents(entries))


def hashes_of(source: Source, entries: Sequence[Entry]) -> Pixels:
    """Return the SHA-256 (N, 32) of images' files, without decoding any."""
    out = np.zeros((len(entries), 32), np.uint8)
    task, todo = functools.partial(_hash_rows, out), jobs(source, list(enumerate(entries)))
    for _ in work(task, todo, available_workers(), threads=True):
        pass
    return out


def known_hashes(source: Source, entries: Sequence[Entry], where: Path) -> Pixels:
    """Return the SHA-256 (N, 32) of images' files, which are read only once if they do not change."""
    stamps = source.stamps(entries)
    names = [[entry.member, *stamp] for entry, stamp in zip(entries, stamps, strict=True)]
    path = (
        cache_root() / "images" / f"{sha256_bytes(canonical_json([str(where.resolve()), names]).encode())[:32]}.files"
    )
    with contextlib.suppress(UserError):
        if len(data := read_bounded(path, limit=32 * len(entries))) == 32 * len(entries):
            return np.frombuffer(data, np.uint8).reshape(-1, 32)
    found = hashes_of(source, entries)
    with contextlib.suppress(UserError):  # if it cannot be stored, it is computed again
        write_atomic(path, found.tobytes())
    return found


def _hash_rows(out: Pixels, job: Any) -> None:
    for (row, *_), found in zip(job, hash_files(job), strict=True):
        out[row] = np.frombuffer(found, np.uint8)


def decoders() -> dict[str, str | None]:
    """Return what determines a file's pixels, besides the file."""
    return {"pillow": PIL.__version__, "jpeg": features.version("jpg"), "turbo": features.version("libjpeg_turbo")}


def _undecoded(source: Source, rows: list[tuple[int, Entry]], how: Rows, progress: Progress | None) -> Decoded:
    """Return images whose headers are read; the counted ones are decoded now, the others whenever they are used."""
    found, hashes = Summary(np.zeros((how.shape[0], 256), np.int64)), np.zeros((len(rows), 32), np.uint8)
    left = len(rows) + how.counted
    what = f"{len(rows):,} images hashed, {how.counted:,} decoded for mean and deviation"
    tell = functools.partial(_tell, progress, what, left, left * math.prod(how.shape))
    for task, own in ((look, rows), (count, rows[: how.counted])):
        for one in work(functools.partial(task, how=how), jobs(source, own), available_workers(), threads=False):
            found.add(one)
            hashes[one.rows] = np.frombuffer(b"".join(one.hashes), np.uint8).reshape(-1, 32)
            left -= len(one.rows)
            tell(left)
    x = Undecoded([entry for _, entry in rows], how.shape, Decoder(source, replace(how, trained=0)))
    animated = tuple(sorted(set(found.animated)))
    return Decoded(x, frozenset(found.lossy), animated, torch.from_numpy(found.counts), hashes)


@dataclass(frozen=True)
class Forecast:
    """The cost of a cache of images: bytes of disk, free bytes, and an estimate of the seconds."""

    images: int
    size: int
    free: int
    seconds: float
    folder: Path

    def __str__(self) -> str:
        minutes = f"about {self.seconds / 60:,.0f} minutes" if self.seconds > 90 else f"about {self.seconds:.0f} s"
        return f"{self.images:,} images decoded once, {_gigabytes(self.size)} in {self.folder}, {minutes}"

    def check(self) -> None:
        """Raise DataError, with the numbers, if the disk has no room."""
        if self.size > self.free:
            raise DataError(
                f"{self}: {_gigabytes(self.free)} are free there; free some space, set XDG_CACHE_HOME to a folder on a "
                "larger disk, or give --limit"
            )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def forecast(source: Source, rows: Sequence[tuple[int, Entry]], how: Rows, folder: Path, *, workers: int) -> Forecast:
    """Estimate the cost of a cache of these rows from a few that are decoded, and the free disk space."""
    sample = [(at, entry) for at, (_, entry) in enumerate(rows[: SAMPLE + 1])]
    out: Pixels = np.empty((len(sample), *how.shape), np.uint8)
    took = []
    for job in jobs(source, sample):
        for one in job:
            began = time.perf_counter()
            fill_array(out, [one], how)
            took.append(time.perf_counter() - began)
    seconds = sum(took[1:]) / max(1, len(took) - 1)
    return Forecast(
        len(rows),
        len(rows) * math.prod(how.shape),
        shutil.disk_usage(folder).free,
        seconds * len(rows) / workers,
        folder,
    )


class _Cache:
    """Rows of images in the user's cache folder."""

    def __init__(
        self, source: Source, rows: list[tuple[int, Entry]], how: Rows, progress: Progress | None,
        begin: Callable[[Rows], None],
    ) -> None:  # fmt: skip
        self.source, self.rows, self.how, self.progress, self.begin = source, rows, how, progress, begin
        self.folder, self.workers = cache_root() / "images", available_workers()
        prepared = (
            None if how.geometry is None else [how.geometry.resize, how.geometry.crop, how.geometry.interpolation]
        )
        self.recipe = {"version": VERSION, "shape": how.shape, "prepared": prepared, **decoders()}
        stamps = list(source.stamps([entry for _, entry in rows]))
        names = [[entry.member, size] for (_, entry), (size, _) in zip(rows, stamps, strict=True)]
        self.name = sha256_bytes(canonical_json([self.recipe, how.counted, names]).encode())[:32]
        self.changed = sha256_bytes(np.array([at for _, at in stamps], np.int64).tobytes())[:32]

    def open(self) -> Decoded:
        """Return the pixels; decode them first if there are none."""
        known = self._known()  # without a lock: the folder may be read-only, and the pointer is written last
        if known is not None:
            return self._mapped(known)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with lock(self.folder / f"{self.name}.lock", wait=math.inf):
                return self._mapped(self._known() or self._make())
        except (OSError, UserError) as error:
            if not os.access(self.folder, os.W_OK):
                way = "set XDG_CACHE_HOME to another folder, or add --no-cache"
                raise DataError(f"{self.folder} cannot be written, so images cannot be cached there; {way}") from error
            raise explain(error, self.folder, "use") if isinstance(error, OSError) else error from error

    def _known(self) -> str | None:
        """Return the name of the pixels of these files, if they are whole and the files have not changed."""
        said = _read(self.folder / f"{self.name}.json")
        content = str(said.get("content"))
        if not (NAME.fullmatch(content) and self._is_whole(content) and _read(self._file(content, "json"))):
            return None
        if said.get("changed") != self.changed:
            hashes = hashes_of(self.source, [entry for _, entry in self.rows])
            if not np.array_equal(hashes, self._array(content, "hashes", "r")):
                return None
            with contextlib.suppress(UserError):  # if it cannot be kept, the files are hashed again
                self._point(content)
        return content

    def _is_whole(self, name: str) -> bool:
        sizes = {"pixels": len(self.rows) * math.prod(self.how.shape), "hashes": 32 * len(self.rows)}
        files = {self._file(name, kind): size for kind, size in sizes.items()}
        return all(file.exists() and file.stat().st_size == size for file, size in files.items())

    def _point(self, content: str) -> None:
        write_json(self.folder / f"{self.name}.json", {"content": content, "changed": self.changed})

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{kind}"

    def _array(self, name: str, kind: str, mode: Any) -> Pixels:
        each = self.how.shape if kind == "pixels" else (32,)
        return np.memmap(self._file(name, kind), np.uint8, mode, shape=(len(self.rows), *each))

    def _mapped(self, content: str) -> Decoded:
        said = read_json(self._file(content, "json"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # splits are never written to
            x = torch.from_numpy(self._array(content, "pixels", "r"))
        counts = torch.tensor(said["counts"], dtype=torch.int64)
        hashes = self._array(content, "hashes", "r")
        return Decoded(x, frozenset(said["lossy"]), tuple(said["animated"]), counts, hashes)

    def _make(self) -> str:
        making = f"{self.name}-{self.changed}"
        log, journal = self._file(making, "log"), []
        if not (log.exists() and self._is_whole(making)):
            log.unlink(missing_ok=True)
            found = forecast(self.source, self.rows, self.how, self.folder, workers=self.workers)
            found.check()
            self.begin(self.how)
            _allocate(self._file(making, "pixels"), found.size)
            _allocate(self._file(making, "hashes"), 32 * len(self.rows))
            log.touch()
            what = str(found)
        else:
            journal = list(_read_log(log))
            what = f"{self.folder}: resuming with {len(self.rows):,} images"
        try:
            summary = self._fill(making, journal, what)
        except Coloured:
            for kind in ("pixels", "hashes", "log"):
                self._file(making, kind).unlink()
            raise
        hashes = self._array(making, "hashes", "r")
        content = sha256_bytes(canonical_json([self.recipe, self.how.counted]).encode() + hashes.tobytes())[:32]
        said = {"lossy": sorted(summary.lossy), "animated": sorted(summary.animated)}
        write_json(self._file(content, "json"), {**said, "counts": summary.counts.tolist(), **self.recipe})
        for kind in ("hashes", "pixels"):  # written last: all others are complete
            self._file(making, kind).replace(self._file(content, kind))
        self._point(content)
        log.unlink()
        return content

    def _fill(self, making: str, journal: list[Found], what: str) -> Summary:
        """Decode the missing rows, and log finished ones once their pixels are on disk."""
        pixels, hashes = self._array(making, "pixels", "r+"), self._array(making, "hashes", "r+")
        summary, left = Summary(np.zeros((self.how.shape[0], 256), np.int64)), dict(self.rows)
        for found in journal:
            summary.add(found)
            for row in found.rows:
                del left[row]
        tell = functools.partial(_tell, self.progress, what, len(self.rows), pixels.nbytes)
        tell(len(left))
        task = functools.partial(fill_file, self._file(making, "pixels"), how=self.how)
        todo = jobs(self.source, list(left.items()))
        with self._file(making, "log").open("a") as log, _syncing(pixels, hashes, log) as sync:
            for found in work(task, todo, self.workers, threads=False):
                hashes[found.rows] = np.frombuffer(b"".join(found.hashes), np.uint8).reshape(-1, 32)
                summary.add(found)
                for row in found.rows:
                    del left[row]
                sync(json.dumps(found._replace(hashes=[])))
                tell(len(left))
        return summary


def _read(path: Path) -> dict[str, Any]:
    """Return what a file of the cache says; nothing if it is missing or damaged."""
    with contextlib.suppress(UserError):
        said = read_json(path)
        return said if isinstance(said, dict) else {}
    return {}


def _tell(progress: Progress | None, what: str, count: int, size: int, left: int) -> None:
    if progress is not None:
        progress(what, size * (count - left) // count, size, count)


@contextlib.contextmanager
def _syncing(pixels: Any, hashes: Any, log: Any) -> Iterator[Callable[[str], None]]:
    """Take lines for a log, and write them some seconds later, after the arrays that they describe."""
    lines: list[str] = []
    last = time.monotonic()

    def write() -> None:
        if lines:
            pixels.flush()
            hashes.flush()
            log.write("".join(f"{line}\n" for line in lines))
            log.flush()
            os.fsync(log.fileno())
            lines.clear()

    def take(line: str) -> None:
        nonlocal last
        lines.append(line)
        if time.monotonic() - last > SYNCED:
            write()
            last = time.monotonic()

    try:
        yield take
    finally:
        write()


def _read_log(path: Path) -> Iterator[Found]:
    """Yield the work of an interrupted run; the last line may be incomplete."""
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, TypeError):
            yield Found(*json.loads(line))


def _allocate(path: Path, size: int) -> None:
    """Create a file with reserved disk space: writing to a mapped file on a full disk kills the process silently."""
    try:
        with path.open("wb") as file:
            file.truncate(size)
            with contextlib.suppress(AttributeError):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise explain(error, path, "write") from error
