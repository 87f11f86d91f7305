"""Whatever a file claims: a sound result or a UserError that names it; no hang, nothing written, memory bounded."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparring import data
from sparring.data._places import Content, unpack
from sparring.data.formats._known_sets import read_idx
from sparring.errors import UserError
from sparring.files import load_tensors, read_json, safe_members

from .hostile import CANARY, MAKERS, SUFFIX, Hostile, corpus, fuzzed, seeds

FUZZED = 60  # of each kind
HANG = 60  # seconds; the slowest takes one or two
MOST_MEMORY = 2_000_000  # KiB

READERS: dict[str, Callable[[Path], object]] = {
    "idx": lambda path: read_idx(Content(str(path), unpack(path))),
    "gz": unpack,
    "zip": lambda path: sum(len(content) for _, content in safe_members(path, max_files=10_000)),
    "tar": lambda path: sum(len(content) for _, content in safe_members(path, max_files=10_000)),
    "images": lambda path: data.load(str(path)),
    "npz": lambda path: data.load(str(path)),
    "safetensors": lambda path: load_tensors(path, finite=True),
    "json": read_json,
}

# These may be read: what is odd about them is never used.
HARMLESS = {
    ("idx", "shape-(0, 4294967295, 4)"),
    ("zip", "declares-nothing"),
    ("zip", "count-lies"),
    ("zip", "only-end"),
    ("tar", "pax--9 x=y"),
    ("tar", "pax-99999999999999"),
    ("images", "bad-chunk"),
    ("images", "cut-62"),  # only the mark of the end is missing
    ("images", "pixel-bomb"),  # no more is unpacked than the picture has pixels
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an inner folder; afterwards nothing but the file under test may be there or around it."""
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    yield inner
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert names - {"inner", "inner/file", *(f"inner/file{suffix}" for suffix in SUFFIX.values())} == set()


@pytest.fixture
def alarm() -> Iterator[None]:
    """End the test with an error if a file makes its reader hang."""

    def cry(*_: object) -> None:
        raise TimeoutError("a reader hangs")

    before = signal.signal(signal.SIGALRM, cry)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _read(hostile: Hostile, folder: Path) -> str:
    """Return "" for a sound result, the message of a UserError, or fail with the file's name."""
    path = folder / f"file{SUFFIX[hostile.kind]}"
    path.write_bytes(hostile.data)
    signal.alarm(HANG)
    try:
        READERS[hostile.kind](path)
    except UserError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{hostile.kind} {hostile.name}: {type(error).__name__}") from error
    finally:
        signal.alarm(0)
    return ""


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        pytest.skip("this system does not count peak memory")
    yield
    assert _peak() < MOST_MEMORY


@pytest.mark.parametrize("kind", READERS)
def test_sound_files_are_read(kind: str, folder: Path, alarm: None) -> None:
    assert _read(Hostile(kind, "sound", seeds()[kind]), folder) == ""


@pytest.mark.parametrize("kind", READERS)
def test_made_by_hand(kind: str, folder: Path, alarm: None, bounded_memory: None) -> None:
    accepted = []
    for name, content in MAKERS[kind]():
        message = _read(Hostile(kind, name, content), folder)
        assert not message or "file" in message
        if not message and (kind, name) not in HARMLESS:
            accepted.append(name)
    assert accepted == [], str(accepted)
    assert not (folder / CANARY).exists()


@pytest.mark.filterwarnings("ignore::sparring.errors.DataWarning")  # an array whose name was changed is named
@pytest.mark.parametrize("kind", READERS)
def test_fuzzed(kind: str, folder: Path, alarm: None, bounded_memory: None) -> None:
    messages = [_read(hostile, folder) for hostile in fuzzed(FUZZED) if hostile.kind == kind]
    assert len(messages) == FUZZED
    assert sum(message != "" for message in messages) > FUZZED // 10


def test_there_are_many() -> None:
    assert sum(1 for _ in corpus()) + FUZZED * len(READERS) >= 500


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_file_at_all(kind: str, tmp_path: Path, alarm: None) -> None:
    path = tmp_path / f"file{SUFFIX[kind]}"
    signal.alarm(HANG)
    with pytest.raises(UserError):
        READERS[kind](path)
    os.mkfifo(path)
    with pytest.raises(UserError):
        READERS[kind](path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError):
        READERS[kind](path)
