"""Safe file handling: atomic writes, canonical JSON, hashes, locks, untrusted archives and tensors.

Any problem with a file that a user named raises a `UserError` with the file, the cause and the way out.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import math
import mmap
import os
import secrets
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from .errors import StorageError, UserError

if TYPE_CHECKING:  # torch takes seconds to import, and `sparring --help` reads this module
    from torch import Tensor

__all__ = [
    "canonical_json",
    "check_writable",
    "conversion",
    "explain",
    "finite",
    "load_tensors",
    "lock",
    "pack_tensors",
    "read_bounded",
    "read_json",
    "remove_leftovers",
    "safe_members",
    "safe_name",
    "save_tensors",
    "sha256_bytes",
    "sha256_file",
    "write_atomic",
    "write_json",
]

MIB = 1 << 20
_LEFTOVER = ".tmp"
_WAYS_OUT = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EACCES: "permission denied; choose a folder and files that you can access",
    errno.EPERM: "operation not permitted; choose a folder and files that you can access",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "no such file or folder; check the path",
    errno.ENOTDIR: "part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "this is a folder, not a file; choose another path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EFBIG: "the file would exceed the size limit of the system; raise the limit or choose another folder",
    errno.EIO: "the disk reported an error; check it or choose another folder",
}
_FAILING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def explain(error: OSError, path: Path | str, doing: str = "use") -> UserError:
    """Return the UserError for a failed system call on `path`, with the cause and a remedy; `doing` is a verb."""
    reason = _WAYS_OUT.get(error.errno or 0, error.strerror or str(error))
    kind = StorageError if error.errno in _FAILING else UserError
    return kind(f"cannot {doing} {path}: {reason}")


def conversion(path: Path | str) -> str:
    """Describe how to convert a file of an unsupported format."""
    plain = Path(path).with_suffix(".safetensors")
    return f"type `sparring convert {path} {plain}` and give --weights {plain}"


# -- writing ----------------------------------------------------------------------------------------------------------


def write_atomic(path: Path | str, content: bytes | str) -> Path:
    """Write a file completely or not at all, make it durable, and return its path.

    Missing folders are made. The content is written to a temporary file in the same folder (".NAME.RANDOM.tmp"), synced
    and renamed to `path`; then the folder is synced. Text is UTF-8. On failure (full disk, no permission, ...) raise
    UserError, leave the old file untouched and leave no temporary file behind.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}{_LEFTOVER}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # also on an interrupt: no partial file stays
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise explain(error, path, "write") from error
    return path


def check_writable(path: Path | str, *, folder: bool = False) -> None:
    """Raise UserError unless this file (or a file in this folder) can be created; nothing is left behind."""
    path = Path(path).absolute()
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(path).st_mode) != folder:  # noqa: PTH116 - exists() hides names that are too long
                raise NotADirectoryError(errno.ENOTDIR, "") if folder else IsADirectoryError(errno.EISDIR, "")
        places = (path, *path.parents) if folder else path.parents
        with tempfile.TemporaryFile(dir=next(place for place in places if place.exists())):
            pass
    except OSError as error:
        raise explain(error, path, "write") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path | str) -> None:
    """Remove the temporary files of killed writers. Call it only while no other process writes (see `lock`)."""
    for path in Path(folder).glob(f".*{_LEFTOVER}"):
        path.unlink(missing_ok=True)


# -- JSON and hashes --------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> str:
    """Return a value as compact JSON for hashing, one text per value: sorted keys, no spaces, ASCII.

    Nonfinite floats become Infinity, -Infinity and NaN, which are not JSON, so that they have different hashes. Raise
    TypeError for a value that JSON cannot represent.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def write_json(path: Path | str, value: Any, *, limit: float = math.inf) -> Path:
    """Write a value atomically as strict JSON: sorted keys, nonfinite floats as null, a newline at the end.

    Raise UserError if it would exceed `limit` bytes, and the errors of `write_atomic`.
    """
    text = json.dumps(finite(value), sort_keys=True, indent=1, allow_nan=False) + "\n"
    if len(text) > limit:
        raise UserError(f"{path} would be larger than {limit / MIB:.0f} MiB, the limit; divide the study")
    return write_atomic(path, text)


def finite(value: Any) -> Any:
    """Return a nested value as `write_json` writes it, with None for nonfinite floats."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_json(path: Path | str, *, limit: int = 64 * MIB) -> Any:
    """Read a JSON file of at most `limit` bytes; raise UserError if it is missing, too large or not strict JSON."""
    data = read_bounded(path, limit=limit)
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); remove it or create it again") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_bounded(path: Path | str, *, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; raise UserError if it is missing, not a regular file, or larger."""
    try:
        # O_NONBLOCK: opening a named pipe without a writer would block forever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is not a regular file; choose another path")
            data = b"" if status.st_size > limit else file.read(limit + 1)
    except OSError as error:
        raise explain(error, path, "read") from error
    if max(len(data), status.st_size) > limit:
        raise UserError(f"{path} is larger than {limit / MIB:.0f} MiB, the limit; is it the right file?")
    return data


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal; raise UserError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise explain(error, path, "read") from error


# -- locks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path: Path | str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the kernel's exclusive lock on a file while the block runs; the kernel releases it if the process dies.

    `wait` is how many seconds to wait for another holder before raising UserError (math.inf: without limit). The file
    is not removed, because two processes could then lock different files of the same name.
    """
    from filelock import FileLock, Timeout  # takes 0.1 s, and most commands lock nothing

    path = Path(path)
    # Never a soft lock, which is not released when its holder dies.
    held = FileLock(path, timeout=-1 if wait == math.inf else wait, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise UserError(
            f"another process is using {path.parent} (it holds {path.name}); wait for it or end it"
        ) from None
    except OSError as error:
        raise explain(error, path, "lock") from error
    try:
        yield
    finally:
        held.release()


# -- names and archives -----------------------------------------------------------------------------------------------


def safe_name(name: str) -> str:
    """Return a name that is a single harmless file name; raise UserError for path tricks and unprintable characters."""
    harmless = 0 < len(name.encode(errors="replace")) <= 200 and name.isprintable()
    if not harmless or name.startswith(".") or set(name) & set('/\\:*?"<>|'):
        raise UserError(f"{name[:80]!r} is not a valid file name; use letters, digits, '-', '_' and inner dots")
    return name


class _Refused(Exception):
    """The reason why an archive is refused; `safe_members` adds the archive's name."""


class _Bounded(io.BufferedReader):
    """Read an archive, but never more at once than a normal one needs, whatever its headers say."""

    def __init__(self, raw: Any, most: int, left: int) -> None:
        super().__init__(raw)
        self.most, self.left = most, left

    def read(self, size: int | None = -1, /) -> bytes:
        size = -1 if size is None else size
        data = super().read(min(size, self.most + 1) if size >= 0 else self.most + 1)
        self.left -= len(data)
        if len(data) > self.most or self.left < 0:
            raise _Refused("it unpacks to more than its header says")
        return data


def safe_members(
    path: Path | str,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    max_bytes: int = 1024 * MIB,
    max_member: int = 64 * MIB,
    max_files: int = 1_000_000,
    room: Callable[[int], bytearray | mmap.mmap] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yield the name and content of the wanted regular files in a zip, tar or tar.gz, in the archive's order.

    `wanted` is also called for folders, with names that end in "/". Contents are bytes. If `room` is given, the
    contents of a zip may have any size and are stored in the space that `room` returns. Nothing is written to disk.

    Raise UserError, naming the archive, if it is damaged, encrypted or packed by an unsupported method; if it has a
    file above `max_member` bytes, or a zip has one of 512 MiB and 100 times its packed size; if it unpacks to more than
    `max_bytes` or `max_files`; or if it contains an absolute name, "..", a link, a device or a pipe.
    """
    try:
        raw: io.RawIOBase | io.BufferedIOBase = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        raise explain(error, path, "read") from error
    with raw:
        try:
            start = os.pread(raw.fileno(), 4, 0)
            if start[:2] == b"\x1f\x8b":
                raw = gzip.GzipFile(fileobj=cast(Any, raw))
            file = _Bounded(raw, most=max_member, left=max_bytes + 64 * MIB)  # plus headers
            if start[:2] == b"PK":
                yield from _zip_members(file, wanted, max_bytes, max_files, room)
            else:
                yield from _tar_members(file, wanted, max_bytes, max_files)
        except UserError:
            raise
        except _Refused as error:
            raise UserError(f"{path} is refused: {error}") from error
        except (OSError, EOFError, ValueError, RecursionError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{path} is damaged ({error}); create or download it again") from error
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}); create or download it again") from error


def _zip_members(
    file: _Bounded,
    wanted: Callable[[str], bool],
    max_bytes: int,
    max_files: int,
    room: Callable[[int], bytearray | mmap.mmap] | None,
) -> Iterator[tuple[str, Any]]:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        _check_totals(len(infos), sum(info.file_size for info in infos), max_bytes, max_files)
        for info in infos:
            _check_member(info.filename, info.file_size, file.most if room is None else max_bytes)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _Refused(f"{info.filename!r} is a link or a device")
            # bzip2 and lzma cannot limit the result of one call.
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _Refused(f"{info.filename!r} uses a compression method other than deflate")
            if info.flag_bits & 1:
                raise _Refused(f"{info.filename!r} is encrypted")
            if info.file_size > max(512 * MIB, 100 * info.compress_size):
                raise _Refused(f"{info.filename!r} unpacks to more than 100 times its size")
            if wanted(info.filename) and not info.is_dir():
                with archive.open(info) as member:
                    if room is None:
                        data: Any = member.read(info.file_size)  # read() unpacks everything, whatever was declared
                        whole = len(data) == info.file_size
                    else:
                        data = room(info.file_size)
                        whole = _fill(memoryview(data), member)
                if not whole:
                    raise EOFError(f"{info.filename!r} is truncated")
                yield info.filename, data


def _fill(room: memoryview, member: IO[bytes]) -> bool:
    """Read a member into its space, piece by piece, and return whether it filled it."""
    pieces = (room[start : start + MIB] for start in range(0, len(room), MIB))
    return all(cast(Any, member).readinto(piece) == len(piece) for piece in pieces)


def _tar_members(
    file: _Bounded, wanted: Callable[[str], bool], max_bytes: int, max_files: int
) -> Iterator[tuple[str, bytes]]:
    count = total = 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            count, total = count + 1, total + info.size
            _check_totals(count, total, max_bytes, max_files)
            _check_member(info.name, info.size, file.most)
            if not (info.isdir() or info.isreg()) or info.issparse():
                raise _Refused(f"{info.name!r} is a link or a device")
            named = f"{info.name.rstrip('/')}/" if info.isdir() else info.name
            content = archive.extractfile(info) if wanted(named) and info.isreg() else None
            if content is not None:
                data = content.read()
                if len(data) != info.size:
                    raise EOFError(f"{info.name!r} is truncated")
                yield info.name, data
        if (
            file.tell() - archive.offset != tarfile.BLOCKSIZE
        ):  # no block of zeros ends it, of which tarfile says nothing
            raise EOFError("it is truncated")


def _check_totals(count: int, total: int, max_bytes: int, max_files: int) -> None:
    if count > max_files:
        raise _Refused(f"it holds more than {max_files} files")
    if total > max_bytes:
        raise _Refused(f"it unpacks to more than {max_bytes / MIB:.0f} MiB")


def _check_member(name: str, size: int, most: int) -> None:
    parts = name.split("/")
    if parts[0] == "" or ".." in parts or set(name) & set("\\\0") or parts[0].endswith(":"):
        raise _Refused(f"{name!r} leads outside of it")
    if not 0 <= size <= most:
        raise _Refused(f"{name!r} is larger than {most / MIB:.0f} MiB")


# -- tensors ----------------------------------------------------------------------------------------------------------


def load_tensors(path: Path | str, *, finite: bool = False, limit: int = 1024 * MIB) -> dict[str, Tensor]:
    """Read a safetensors file of at most `limit` bytes into memory; nothing in it is ever executed.

    Raise UserError, naming the file, if it is missing, truncated or malformed, or if a tensor has more than 8
    dimensions. With `finite`, raise it for NaN and infinity as well.
    """
    import safetensors.torch

    data = read_bounded(path, limit=limit)
    # A header of 640 bytes begins like a pickle, one of 19,280 like a zip; JSON follows the length.
    if data[:2] in (b"PK", b"\x80\x02") and data[8:9] != b"{":
        raise UserError(
            f"{path} is a pickle, as torch.save writes, which may run code and is not read; {conversion(path)}"
        )
    header = int.from_bytes(data[:8], "little")
    if len(data) < 10 or header > min(len(data) - 8, 16 * MIB):
        raise UserError(f"{path} is not a complete safetensors file; create or download it again")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except Exception as error:  # the format's own error type, and any error of torch for an absurd header
        raise UserError(f"{path} is not a valid safetensors file ({error}); create or download it again") from error
    for name, tensor in tensors.items():
        if tensor.dim() > 8:  # torch takes minutes for one with 100,000
            raise UserError(f"tensor {name!r} in {path} has {tensor.dim()} dimensions; the limit is 8")
        if finite and tensor.dtype.is_floating_point and not tensor.isfinite().all():
            raise UserError(f"tensor {name!r} in {path} has NaN or infinite values; the run that wrote it diverged")
    return tensors


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors atomically as safetensors and return the path; equal tensors give equal bytes."""
    return write_atomic(path, pack_tensors(tensors))


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as the bytes of a safetensors file; equal tensors give equal bytes."""
    import safetensors.torch
    import torch

    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"'{name}' is a {type(value).__name__}, not a tensor, and cannot be saved. Prune and train a network "
                "before you quantise it; `state_dict()` then holds only tensors"
            )
    whole = {
        name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name in sorted(tensors)
    }
    return cast(bytes, safetensors.torch.save(whole))
