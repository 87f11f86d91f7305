"""Downloads against a server on this machine: whole, cut and resumed, wrong, missing, unreachable."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sparring.data import _places as mirrors
from sparring.data._places import File, Source, locate, read
from sparring.errors import DataError, UserError

PLAIN = bytes(range(256)) * 4_000
PACKED = gzip.compress(PLAIN, mtime=0)


@dataclass
class Mirror:
    """A server's content and behaviour: it cuts the connection after so many bytes, as often as told."""

    content: dict[str, bytes]
    cut_after: int = 0
    cuts: int = 0
    ranges: bool = True
    asked: list[str] = field(default_factory=list)
    address: str = ""


def _handler(mirror: Mirror) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            mirror.asked.append(self.headers.get("Range", ""))
            data = mirror.content.get(self.path.rsplit("/", 1)[-1])
            if data is None:
                return self.send_error(404)
            start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if mirror.ranges else 0
            if start and start >= len(data):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if mirror.cuts > 0:
                mirror.cuts -= 1
                self.wfile.write(data[start : start + mirror.cut_after])
                return self.connection.close()
            self.wfile.write(data[start:])
            return None

    return Handler


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("no_proxy", "*")
    served = Mirror({"numbers.gz": PACKED})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.address = f"http://127.0.0.1:{server.server_port}/"
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def _source(*addresses: str, sha256: str = hashlib.sha256(PLAIN).hexdigest()) -> Source:
    return Source("numbers", (File("numbers", sha256),), ("numbers",), addresses)


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_download_is_found_and_progress_is_told(mirror: Mirror, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None, int]] = []
    source = _source(mirror.address)
    mirrors.download(source, tmp_path / "numbers", lambda *now: told.append(now))
    assert told[-1] == ("numbers.gz", len(PACKED), len(PACKED), 0)
    assert [here for _, here, *_ in told] == sorted(here for _, here, *_ in told)
    paths = locate(source, [tmp_path])
    assert paths is not None
    assert read(source, paths)[0].data == PLAIN
    mirrors.download(source, tmp_path / "numbers")
    assert len(mirror.asked) == 1


def test_cut_connection_is_resumed_where_it_was_cut(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after, mirror.cuts = 1_000, 3
    mirrors.download(_source(mirror.address), tmp_path)
    assert mirror.asked == ["", "bytes=1000-", "bytes=2000-", "bytes=3000-"]
    assert _left(tmp_path) == ["numbers.gz"]


def test_download_that_gave_up_goes_on_at_the_next_call(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after, mirror.cuts = 100, mirrors.ATTEMPTS
    with pytest.raises(DataError, match="rerun the command to resume"):
        mirrors.download(_source(mirror.address), tmp_path)
    assert not (tmp_path / "numbers.gz").exists()
    mirrors.download(_source(mirror.address), tmp_path)
    assert mirror.asked[-1] == f"bytes={100 * mirrors.ATTEMPTS}-"
    assert _left(tmp_path) == ["numbers.gz"]


def test_mirror_without_ranges_starts_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after, mirror.cuts, mirror.ranges = 1_000, 1, False
    mirrors.download(_source(mirror.address), tmp_path)
    assert _left(tmp_path) == ["numbers.gz"]


def test_part_longer_than_the_file_is_thrown_away(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cut_after, mirror.cuts = 500, mirrors.ATTEMPTS
    with pytest.raises(DataError):
        mirrors.download(_source(mirror.address), tmp_path)
    (part,) = tmp_path.glob(".*.part")
    part.write_bytes(b"x" * (len(PACKED) + 1))
    mirrors.download(_source(mirror.address), tmp_path)
    assert _left(tmp_path) == ["numbers.gz"]


def test_wrong_content_is_not_kept_and_the_next_mirror_is_asked(mirror: Mirror, tmp_path: Path) -> None:
    wrong = _source(mirror.address, sha256="0" * 64)
    with pytest.raises(DataError, match="SHA-256"):
        mirrors.download(wrong, tmp_path)
    assert _left(tmp_path) == []
    mirrors.download(_source(mirror.address + "nowhere-", mirror.address), tmp_path)
    assert _left(tmp_path) == ["numbers.gz"]


@pytest.mark.parametrize("damage", [PACKED[:-9], b"\x1f\x8b" + b"junk" * 50, PLAIN[:-1]])
def test_damaged_content_is_not_kept(mirror: Mirror, tmp_path: Path, damage: bytes) -> None:
    mirror.content["numbers.gz"] = damage
    with pytest.raises(DataError, match=r"numbers\.gz"):
        mirrors.download(_source(mirror.address), tmp_path)
    assert _left(tmp_path) == []


def test_missing_file_names_the_address(mirror: Mirror, tmp_path: Path) -> None:
    mirror.content.clear()
    with pytest.raises(DataError, match="HTTP 404") as caught:
        mirrors.download(_source(mirror.address), tmp_path)
    assert mirror.address in str(caught.value)
    assert len(mirror.asked) == 1


def test_no_network_is_one_clear_error(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Check the network"):
        mirrors.download(_source("http://127.0.0.1:9/"), tmp_path)


def test_folder_that_cannot_be_made_is_a_user_error(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        mirrors.download(_source(mirror.address), tmp_path / "file")


def test_full_disk_is_told_from_a_bad_network(mirror: Mirror, tmp_path: Path) -> None:
    url = f"{mirror.address}numbers.gz"
    (tmp_path / f".numbers.gz.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="disk is full"):
        mirrors.download(_source(mirror.address), tmp_path)
    assert len(mirror.asked) == 1


def test_archive_is_checked_as_it_is(mirror: Mirror, tmp_path: Path) -> None:
    mirror.content["all.tar.gz"] = PACKED
    archive = File("all.tar.gz", hashlib.sha256(PACKED).hexdigest())
    mirrors.download(Source("all", (File("a"),), ("",), (mirror.address,), archive), tmp_path)
    assert _left(tmp_path) == ["all.tar.gz"]
