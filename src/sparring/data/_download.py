"""Downloads from the public mirrors: resumed where they were cut, checked before they get their name."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from ..errors import DataError, UserError
from ..files import explain, lock, sha256_bytes, sha256_file
from ._places import MOST, File, Source, unpack

Progress = Callable[[str, int, int | None], None]
"""Be told a file's name, the bytes that are here and the bytes of the whole (None: unknown)."""

ATTEMPTS = 5  # per mirror; each goes on where the last was cut
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 18


class _Failed(Exception):
    """Say why a mirror gave nothing usable."""


def download(source: Source, folder: Path, progress: Progress | None = None) -> None:
    """Fetch a source's files, packed as the mirrors have them, into a folder.

    A cut download stays under a hidden name (".NAME.MIRROR.part"), and the next call goes on from there. A file gets
    its name only when its content has the known SHA-256. Raises DataError if no mirror has it, UserError if the folder
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
        + f"\nCheck the network and try again (it goes on where it was cut), or put the file into {folder} yourself."
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
                reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise _Failed(f"HTTP {error.code} {error.reason}") from error
            part.unlink()  # there is nothing after what we have, and it was not whole: begin again
            reason = "the part that was here does not fit"
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
    raise _Failed(reason)


def _receive(response: http.client.HTTPResponse, part: Path, here: int, name: str, progress: Progress | None) -> bool:
    """Append what a response brings to the part, and return whether the file is whole now."""
    resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
    if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {here}-"):
        raise _Failed("the mirror sent another range than was asked for")
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
                    file.close()  # now, since it tries to write once more
                raise explain(error, part, "write") from error
            if progress:
                progress(name, here, total)
    return total is None or here == total


def _check(source: Source, file: File, part: Path) -> None:
    try:
        # The known sums are those of unpacked files, except for an archive.
        found = sha256_file(part) if file is source.archive else sha256_bytes(unpack(part))
    except UserError as error:
        part.unlink()
        raise _Failed(f"what it sent is damaged ({error})") from error
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
