"""What files promise: whole or not at all, one text per value, one holder per lock, nothing hostile gets through."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring import files
from sparring.errors import UserError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def test_write_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    assert files.write_atomic(path, "one") == path
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["b.txt"]


def test_written_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = files.write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("fsync", errno.ENOSPC, "disk is full"),
        ("fsync", errno.EIO, "the disk reported an error"),
        ("replace", errno.EROFS, "read-only"),
        ("replace", errno.EACCES, "permission denied"),
    ],
)
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, words: str
) -> None:
    path = files.write_atomic(tmp_path / "a", "old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path if call == "replace" else os, call, fail)
    with pytest.raises(UserError, match=words) as caught:
        files.write_atomic(path, "new")
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


@contextlib.contextmanager
def child(code: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run code that prints a line when it is ready in another process; sys.argv[1] is the path."""
    code = "import sys, resource, signal\nfrom sparring import files\n" + code
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


BEYOND_LIMIT = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    files.write_atomic(sys.argv[1], b"x" * 100_000)
except files.UserError as error:
    sys.exit(0 if "size limit" in str(error) else 2)
sys.exit(1)
"""


def test_real_write_that_runs_out_of_room_leaves_nothing(tmp_path: Path) -> None:
    with child(BEYOND_LIMIT, tmp_path / "a") as writer:
        assert writer.wait(60) == 0
    assert names(tmp_path) == []


def test_killed_writer_leaves_the_old_or_the_new_file_whole(tmp_path: Path) -> None:
    path = files.write_atomic(tmp_path / "a", b"0" * 300_000)
    code = "print(flush=True)\nwhile True:\n for digit in '123': files.write_atomic(sys.argv[1], digit * 300_000)"
    for number in range(6):
        with child(code, path):
            time.sleep(0.003 * number)
        data = path.read_bytes()
        assert len(data) == 300_000
        assert len(set(data)) == 1
        files.remove_leftovers(tmp_path)
        assert names(tmp_path) == ["a"]


def test_folder_in_the_way_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder"):
        files.write_atomic(tmp_path / "folder", "x")
    with pytest.raises(UserError):
        files.write_atomic(tmp_path / "file" / "x", "x")
    assert names(tmp_path) == ["file", "folder"]


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.json.0123456789abcdef.tmp").write_text("half")
    (tmp_path / "kept.tmp").write_text("whole")
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["kept.tmp"]


@settings(deadline=None, max_examples=40)
@given(value=values)
def test_json_round_trip_is_strict_and_stable(folder: Path, value: object) -> None:
    path = files.write_json(folder / "value.json", value)
    text = path.read_text()
    assert text.endswith("\n")
    files.write_json(path, files.read_json(path))
    assert path.read_text() == text


def test_nonfinite_numbers_are_written_as_null(tmp_path: Path) -> None:
    path = files.write_json(tmp_path / "a.json", {"b": [math.inf, math.nan], "a": 0.1})
    assert files.read_json(path) == {"a": 0.1, "b": [None, None]}


def test_canonical_json_ignores_order_and_tells_nonfinite_apart() -> None:
    assert files.canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    special = [math.inf, -math.inf, math.nan, None, "Infinity"]
    assert len({files.canonical_json(value) for value in special}) == len(special)
    with pytest.raises(TypeError):
        files.canonical_json(object())


@pytest.mark.parametrize("text", ["", "{", "[NaN]", "\xff", "[" * 200_000, "9" * 5000, '{"a":1}x'])
def test_bad_json_is_a_user_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.json"):
        files.read_json(path)


def test_reading_is_bounded_and_never_waits(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b" " * 101)
    with pytest.raises(UserError, match="larger"):
        files.read_json(tmp_path / "big", limit=100)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(UserError):
            files.read_json(tmp_path / name)
    with pytest.raises(UserError):
        files.read_bounded("/dev/zero", limit=100)


def test_hashes(tmp_path: Path) -> None:
    path = files.write_atomic(tmp_path / "a", "abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_bytes(b"abc") == known == files.sha256_file(path)
    with pytest.raises(UserError, match="missing"):
        files.sha256_file(tmp_path / "missing")


def test_lock_refuses_a_second_holder_and_frees_itself(tmp_path: Path) -> None:
    path = tmp_path / "out" / ".lock"
    with files.lock(path):
        for wait in (0.0, 0.1):
            with pytest.raises(UserError, match="another process"), files.lock(path, wait=wait):
                pass
    with files.lock(path):
        pass


def refused(path: Path) -> None:
    """Require that the lock is held by another process."""
    with pytest.raises(UserError, match="another process"), files.lock(path):
        pass


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with child("with files.lock(sys.argv[1]): print(flush=True); signal.pause()", path):
        refused(path)
    with files.lock(path, wait=5):
        pass


@pytest.mark.parametrize("name", ["a", "lenet-5", "x.safetensors", "größe", "a b", "-"])
def test_harmless_names_pass(name: str) -> None:
    assert files.safe_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "/etc", "C:x", "a\0b", "a\nb", ".hidden", "x" * 201, "é" * 150, "*"]
)
def test_path_tricks_are_refused(name: str) -> None:
    with pytest.raises(UserError):
        files.safe_name(name)


@settings(deadline=None)
@given(st.text())
def test_a_safe_name_stays_in_its_folder(name: str) -> None:
    try:
        files.safe_name(name)
    except UserError:
        return
    assert (Path("/folder") / name).resolve().parent == Path("/folder")


def test_tensors_round_trip_with_equal_bytes(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"w": base.t(), "view": base[0], "mask": base > 4, "none": torch.empty(0), "y": torch.tensor([1, 2])}
    first = files.save_tensors(tmp_path / "a", tensors)
    second = files.save_tensors(tmp_path / "b", {name: tensors[name].clone() for name in reversed(tensors)})
    assert first.read_bytes() == second.read_bytes()
    loaded = files.load_tensors(first, finite=True)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_nonfinite_tensors_are_named(tmp_path: Path) -> None:
    path = files.save_tensors(tmp_path / "a", {"fine": torch.ones(2), "sick": torch.tensor([1.0, math.nan])})
    assert files.load_tensors(path)["sick"].isnan().any()
    with pytest.raises(UserError, match="'sick'"):
        files.load_tensors(path, finite=True)


@pytest.mark.parametrize("magic", [b"\x80\x02", b"PK"])
def test_a_header_as_long_as_a_pickle_begins_is_read(magic: bytes, tmp_path: Path) -> None:
    length = int.from_bytes(magic, "little")
    paths = (
        files.save_tensors(tmp_path / f"{rest}.safetensors", {"w" * (length - rest): torch.ones(1)})
        for rest in range(96)
    )
    path = next(path for path in paths if path.read_bytes()[:2] == magic)
    (value,) = files.load_tensors(path).values()
    assert torch.equal(value, torch.ones(1))
