"""Decode many images into the rows of one array, with threads or processes and limits per image."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from ..children import end_with
from ..errors import DataError
from ._decode import Picture, Pixels, decode, header, read, strict
from ._places import space
from ._request import Geometry
from .formats._listing import Entry, Source

CHUNK = 64  # images
FEW = 16  # images that are decoded in this thread
PIXELS = 512 << 20  # bytes of pixels up to which a set is identified by its pixels; a larger one by its files
MEASURED = 50_000_000  # pixels whose values are counted of more training images: it takes a quarter of decoding's time
AHEAD = 3  # chunks queued for each worker: images from an archive wait in memory
Result = TypeVar("Result")


class Coloured(Exception):
    """Raised if images that were assumed to be grey are not all grey."""


@dataclass(frozen=True)
class Rows:
    """The rows of an array: images at `path`, each of `shape` (C, H, W); the first `trained` are for training.

    `turned`: EXIF data turn the image whose shape is that of all.
    """

    path: Path
    shape: tuple[int, int, int]
    geometry: Geometry | None = None
    trained: int = 0
    turned: bool = False

    @property
    def counted(self) -> int:
        """Return how many of the first rows have their values counted: all, unless that would take too long."""
        if self.trained * math.prod(self.shape) <= PIXELS:
            return self.trained
        return min(self.trained, -(-MEASURED // math.prod(self.shape[1:])))

    def name(self, entry: Entry) -> str:
        """Name an image in messages."""
        return f"{entry.member} in {self.path}"

    def planes(self, picture: Picture, entry: Entry) -> Pixels:
        """Return an image as a row; raise DataError for one of another size, Coloured for one that is not grey."""
        channels, *size = self.shape
        if picture.size != tuple(size):
            (height, width), (h, w) = picture.size, size
            exif = " as shown (EXIF orientation is applied)" if picture.turned or self.turned else ""
            raise DataError(
                f"{self.name(entry)} is {width}×{height}{exif}, others are {w}×{h}; resize them, or use --resize and "
                "--crop"
            )
        if picture.channels > channels:
            raise Coloured
        return picture.planes()  # a grey image is copied to all three channels, if there are three


class Found(NamedTuple):
    """Facts about decoded rows: SHA-256 of their files, lossy formats, images of several frames, counts of values."""

    rows: list[int]
    hashes: list[bytes]
    lossy: list[str]
    animated: list[str]
    counts: list[list[int]]


Job = list[tuple[int, Entry, bytes | str]]


def fill(put: Callable[[int, Pixels], None], job: Job, how: Rows) -> Found:
    """Decode images and write each to its row."""
    hashes, lossy, animated = [], set[str](), []
    counts = np.zeros((how.shape[0], 256), np.int64)
    with strict():
        for row, entry, content in job:
            data = read(content)
            picture = decode(data, how.name(entry), how.geometry)
            put(row, how.planes(picture, entry))
            hashes.append(hashlib.sha256(data).digest())
            lossy |= {picture.lossy} - {""}
            animated += [entry.member] if picture.animated else []
            if row < how.counted:
                counts += np.fromiter(picture.image.histogram(), np.int64).reshape(-1, 256)
    return Found([row for row, _, _ in job], hashes, sorted(lossy), animated, counts.tolist())


def fill_array(out: Pixels, job: Job, how: Rows) -> Found:
    """Decode images into their rows of an array (N, C, H, W)."""
    return fill(out.__setitem__, job, how)


def fill_file(file: Path | int, job: Job, how: Rows) -> Found:
    """Decode images into their rows of the array in a file, given by name or open."""
    row = np.empty(how.shape, np.uint8)
    with open(file, "r+b", buffering=0, closefd=not isinstance(file, int)) as held:

        def put(at: int, planes: Pixels) -> None:
            if planes.shape != row.shape:  # a grey image among others
                row[...] = planes
                planes = row
            os.pwrite(held.fileno(), planes.data, at * row.nbytes)  # pages of a mapped file cost more

        return fill(put, job, how)


def look(job: Job, how: Rows) -> Found:
    """Describe images by their headers, as decoding would; raise Coloured as it would."""
    hashes, lossy, animated = [], set[str](), []
    for _, entry, content in job:
        data = read(content)
        found = header(data)
        if found.coloured and how.shape[0] == 1:
            raise Coloured
        hashes.append(hashlib.sha256(data).digest())
        lossy |= {found.lossy} - {""}
        animated += [entry.member] if found.animated else []
    return Found([row for row, _, _ in job], hashes, sorted(lossy), animated, [[0]] * how.shape[0])


def count(job: Job, how: Rows) -> Found:
    """Decode images for the counts of their values alone."""
    return fill(lambda _, __: None, job, how)


def in_memory(source: Source, rows: Sequence[tuple[int, Entry]], how: Rows) -> tuple[Pixels, Summary]:
    """Return decoded images (N, C, H, W), in an unnamed mapped file if they are many, and their description."""
    out = np.frombuffer(space(len(rows) * math.prod(how.shape)), np.uint8).reshape(len(rows), *how.shape)
    found = Summary(np.zeros((how.shape[0], 256), np.int64))
    chunk = min(CHUNK, -(-len(rows) // available_workers()))
    workers = available_workers() if len(rows) > FEW else 1
    for one in work(functools.partial(fill_array, out, how=how), jobs(source, rows, chunk), workers, threads=True):
        found.add(one)
    return out, found


def hash_files(job: Job) -> list[bytes]:
    """Return the SHA-256 of some images' files."""
    return [hashlib.sha256(read(content)).digest() for _, _, content in job]


def jobs(source: Source, rows: Sequence[tuple[int, Entry]], chunk: int | None = None) -> Iterator[Job]:
    """Yield rows with their files' content, in chunks, in the order in which the set is read."""
    numbers = {entry.place: row for row, entry in rows}
    found = source.contents([entry for _, entry in sorted(rows, key=lambda row: row[1].place)])
    each = ((numbers[entry.place], entry, content) for entry, content in found)
    while job := list(itertools.islice(each, chunk or CHUNK)):
        yield job


def work(task: Callable[[Job], Result], todo: Iterable[Job], workers: int, *, threads: bool) -> Iterator[Result]:
    """Yield a task's result for each job as they finish: in this thread, on several threads or in several processes.

    An exception in a task ends all. Raise DataError if a process dies, for example because memory runs out.
    """
    if workers <= 1:
        yield from map(task, todo)
        return
    with ThreadPoolExecutor(workers) if threads else processes(workers) as pool:
        yield from shared(task, todo, pool, workers)


def processes(workers: int) -> ProcessPoolExecutor:
    """Return worker processes, forked: other methods import torch again, which takes longer than a thousand images."""
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(workers, context, initializer=end_with, initargs=(os.getpid(),))


def shared(task: Callable[[Job], Result], todo: Iterable[Job], pool: Executor, workers: int) -> Iterator[Result]:
    """Yield a task's result for each job in a pool, as they finish; see `work`."""
    under_way: set[Future[Result]] = set()
    try:
        for job in todo:
            under_way.add(pool.submit(task, job))
            if len(under_way) >= AHEAD * workers:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                yield from (one.result() for one in done)
        while under_way:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from (one.result() for one in done)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decodes images died: out of memory? close other programs, or use fewer cores (taskset -c 0)"
        ) from error
    finally:
        for one in under_way:
            one.cancel()


def available_workers() -> int:
    """Return how many images may be decoded at a time: one per core, or one in a worker process."""
    if multiprocessing.current_process().daemon:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Summary:
    """Sums over all rows."""

    counts: Pixels
    lossy: set[str] = field(default_factory=set)
    animated: list[str] = field(default_factory=list)

    def add(self, found: Found) -> None:
        self.counts = self.counts + np.array(found.counts)
        self.lossy |= set(found.lossy)
        self.animated += found.animated
