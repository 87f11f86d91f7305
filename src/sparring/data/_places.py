"""Where data files are looked for and downloaded from, and how they are read.

Each root, in order, is searched: the caller's, $SPARRING_DATA, the user's cache folder, known system folders.
Interrupted downloads from the public mirrors are resumed, and checked before the file gets its name.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import http.client
import io
import math
import mmap
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import DataError, UserError
from ..files import explain, lock, read_bounded, safe_members, sha256_bytes, sha256_file

# Unlike Path's methods, these also return False for a name that is too long or a folder without permission.
is_file, is_folder = os.path.isfile, os.path.isdir
SYSTEM_ROOTS = (Path("/usr/share/datasets"),)
ATTEMPTS = 5  # per mirror; each resumes where the last one stopped
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 18
MOST = 256 << 20  # bytes of one file or archive, packed and unpacked: 1.5 times the largest known


class File(NamedTuple):
    """An unpacked file of a data set, and the SHA-256 of its content ("" if unknown)."""

    name: str
    sha256: str = ""


@dataclass(frozen=True)
class Source:
    """The files of a data set, the folders below a root in which they may be, and where to download them.

    Files are together in one of `folders`, each plain or as NAME.gz; or all of them are in `archive` (a tar.gz).
    `mirrors` are base addresses of the packed files; `hint` is a sentence on other ways to get them.
    """

    name: str
    files: tuple[File, ...]
    folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    archive: File | None = None
    hint: str = ""


class Content(NamedTuple):
    """A file's unpacked content and its origin, for error messages."""

    where: str
    data: bytes


Find = Callable[[Source], list[Content]]
"""Return the unpacked content of each of a source's files, in order; loaders call it for their files."""

# A name, the bytes that are done, those of the whole if known, and the images of the whole (0 if they are not counted)
Progress = Callable[[str, int, int | None, int], None]
"""Receive a file's name, the bytes downloaded so far, and its size in bytes (None: unknown)."""


def roots(root: Path | str | None) -> list[Path]:
    """Return the folders to search, in order; raise DataError if the one the caller named does not exist."""
    found = []
    for named, by in ((root, "the data folder"), (os.environ.get("SPARRING_DATA"), "$SPARRING_DATA")):
        if named:
            if not is_folder(expand(named)):
                raise DataError(f"{by}, {named}, is not a folder; correct the path or make the folder")
            found.append(expand(named))
    return list(dict.fromkeys([*found, cache_root(), *SYSTEM_ROOTS]))


def cache_root() -> Path:
    """Return the folder for files that can be recreated, in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else expand("~/.cache")) / "sparring"


def space(size: int) -> bytearray | mmap.mmap:
    """Return space for a number of bytes: in memory up to 256 MiB, else in an unnamed file in the cache folder.

    Raise UserError if the disk has no room.
    """
    if size <= MOST:
        return bytearray(size)
    folder = cache_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if size > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, "")
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk kills the process silently
                os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise explain(error, f"{size / 1e9:,.1f} GB into {folder}", "write") from error


def expand(path: Path | str) -> Path:
    """Return a path with "~" replaced by the home folder, if there is one."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 -- Path's raises where a container's user has no home


def locate(source: Source, places: list[Path]) -> list[Path] | None:
    """Return the paths of a source's files, or of its one archive, in the first folder that has them all, or None."""
    for place in places:
        for folder in source.folders:
            paths = [_plain_or_packed(place / folder / file.name) for file in source.files]
            found = [path for path in paths if path is not None]
            if len(found) == len(paths):
                return found
            if source.archive and is_file(place / folder / source.archive.name):
                return [place / folder / source.archive.name]
    return None


def _plain_or_packed(path: Path) -> Path | None:
    return next(filter(is_file, (path, path.with_name(path.name + ".gz"))), None)


def missing(source: Source, places: list[Path]) -> DataError:
    """Return the error that lists exactly which files go in which folder."""
    names = ", ".join(file.name for file in source.files)
    packed = f", or {source.archive.name}" if source.archive else " (each may be packed as .gz)"
    folders = "\n".join(f"  {place / source.folders[0]}" for place in places)
    return DataError(
        f"the data set '{source.name}' was not found. Put these files: {names}{packed}\ninto one of these folders:\n"
        f"{folders}\nor download them with --download.{' ' + source.hint if source.hint else ''}"
    )


def read(source: Source, paths: list[Path]) -> list[Content]:
    """Read the files that `locate` found; raise DataError, naming the file, if one is damaged or missing."""
    if source.archive and [path.name for path in paths] == [source.archive.name]:
        return _from_archive(source, paths[0])
    return [Content(str(path), unpack(path)) for path in paths]


def unpack(path: Path) -> bytes:
    """Return a file's content, unpacked if it is gzip; raise DataError if it is damaged or larger than 256 MiB."""
    try:
        data = read_bounded(path, limit=MOST)
        if data[:2] != b"\x1f\x8b":
            return data
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            plain = file.read(MOST + 1)
    except UserError as error:
        raise DataError(str(error)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); download it again") from error
    if len(plain) > MOST:
        raise DataError(f"{path} unpacks to more than 256 MiB; download it again")
    return plain


def _from_archive(source: Source, path: Path) -> list[Content]:
    names = {file.name for file in source.files}
    try:
        members = safe_members(path, wanted=lambda name: PurePosixPath(name).name in names, max_bytes=MOST)
        found = {PurePosixPath(name).name: data for name, data in members}
    except UserError as error:
        raise DataError(str(error)) from error
    for file in source.files:
        if file.name not in found:
            raise DataError(f"{path} does not contain {file.name}; download it again")
    return [Content(f"{file.name} in {path}", found[file.name]) for file in source.files]


class _Failed(Exception):
    """The reason why a mirror failed."""


def download(source: Source, folder: Path, progress: Progress | None = None) -> None:
    """Fetch a source's files, packed as the mirrors have them, into a folder.

    An interrupted download keeps a hidden name (".NAME.MIRROR.part"), and the next call resumes it. A file gets its
    name only when its content has the known SHA-256. Raises DataError if no mirror has it, UserError if the folder
    cannot be written.
    """
    wanted = [source.archive] if source.archive else [File(f"{file.name}.gz", file.sha256) for file in source.files]
    with lock(folder / ".lock", wait=math.inf):
        for file in wanted:
            if not (folder / file.name).is_file():
                _from_any_mirror(source, file, folder, progress)


def _from_any_mirror(source: Source, file: File, folder: Path, progress: Progress | None) -> None:
    failures = []
    for mirror in source.mirrors:
        url = mirror + file.name
        part = folder / f".{file.name}.{sha256_bytes(url.encode())[:8]}.part"
        try:
            _fetch(url, part, file.name, progress)
            _check(source, file, part)
            _keep(part, folder / file.name)
            return
        except _Failed as failure:
            failures.append(f"  {url}: {failure}")
    raise DataError(
        "\n".join([f"could not download {file.name} of '{source.name}':", *failures])
        + f"\nCheck the network and rerun the command to resume, or put the file into {folder} yourself."
    )


def _fetch(url: str, part: Path, name: str, progress: Progress | None) -> None:
    reason = ""
    for _ in range(ATTEMPTS):
        here = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={here}-"} if here else {})
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
                if _receive(response, part, here, name, progress):
                    return
                reason = "the connection was interrupted"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise _Failed(f"HTTP {error.code} {error.reason}") from error
            part.unlink()  # the server has nothing after our part, which is incomplete: start again
            reason = "the partial file does not match"
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
    raise _Failed(reason)


def _receive(response: http.client.HTTPResponse, part: Path, here: int, name: str, progress: Progress | None) -> bool:
    """Append a response's content to the part, and return whether the file is complete now."""
    resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
    if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {here}-"):
        raise _Failed("the server sent a different range than was requested")
    here = here if resumed else 0
    length = response.headers.get("Content-Length") or ""
    total = here + int(length) if length.isdecimal() else None
    try:
        file = part.open("ab" if resumed else "wb")
    except OSError as error:
        raise explain(error, part, "write") from error
    with file:
        while chunk := response.read(CHUNK):
            here += len(chunk)
            if here > MOST:
                raise _Failed("it is larger than 256 MiB")
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.close()  # now, since closing tries to write once more
                raise explain(error, part, "write") from error
            if progress:
                progress(name, here, total, 0)
    return total is None or here == total


def _check(source: Source, file: File, part: Path) -> None:
    try:
        # The known sums are those of unpacked files, except for an archive.
        found = sha256_file(part) if file is source.archive else sha256_bytes(unpack(part))
    except UserError as error:
        part.unlink()
        raise _Failed(f"the received data are damaged ({error})") from error
    if file.sha256 and found != file.sha256:
        part.unlink()
        raise _Failed(f"its content has the SHA-256 {found}, not {file.sha256}")


def _keep(part: Path, path: Path) -> None:
    try:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise explain(error, path, "write") from error
