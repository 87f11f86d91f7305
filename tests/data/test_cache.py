"""A large set is decoded once: what is mapped is what was decoded, whatever came between."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparring import data
from sparring.data import Dataset, Request, Split, _cache, _images, _pixels, as_float
from sparring.data._images import load_images
from sparring.data._pixels import available_workers
from sparring.data._undecoded import Decoder, Undecoded
from sparring.data.formats._listing import Entry, Listing
from sparring.errors import DataError, UserError
from sparring.study import Plan, forecast
from sparring.train import Recipe, fit, predict

from .hostile_parts import image, zipped
from .test_request import noise

Load = Callable[..., Dataset]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of 200 images of three classes; every set counts as large, and chunks as small."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_cache, "SMALL", 0)
    monkeypatch.setattr(_pixels, "CHUNK", 16)
    for part, count in (("train", 150), ("test", 50)):
        for number in range(count):
            path = tmp_path / "set" / part / "abc"[number % 3] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(noise(number + 1000 * (part == "test"), 9, 7))
    return tmp_path / "set"


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder.parent / "cache" / "sparring" / "images").iterdir())


def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(_pixels, "decode", refuse)


def eager(dataset: Dataset) -> Dataset:
    """Return a data set whose images are decoded now."""
    train, valid, test = (Split(x.clone(), y) for x, y in (dataset.train, dataset.valid, dataset.test))
    return replace(dataset, train=train, valid=valid, test=test)


def same(one: Dataset, other: Dataset) -> bool:
    pairs = zip((one.train, one.valid, one.test), (other.train, other.valid, other.test), strict=True)
    equal = all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in pairs)
    return equal and (one.mean, one.std, one.name, one.classes) == (other.mean, other.std, other.name, other.classes)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_mapped_is_what_was_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    if packed:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}
        (folder.parent / "set.zip").write_bytes(zipped(files))
        folder = folder.parent / "set.zip"
    plain, told = eager(data.load(str(folder), request=Request(cache=False))), []
    made = data.load(str(folder), progress=lambda *what: told.append(what))
    assert same(made, plain) and data.content_hash(made) == data.content_hash(plain)
    assert "200 images decoded once" in told[0][0] and told[-1][1:] == (200 * 3 * 9 * 7, 200 * 3 * 9 * 7, 200)
    undecoded(monkeypatch)
    assert same(data.load(str(folder)), plain)


def test_a_set_that_is_copied_or_touched_is_not_decoded_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = data.load(str(folder))
    pixels = cached(folder)
    undecoded(monkeypatch)
    shutil.copytree(folder, folder.parent / "elsewhere" / "set", copy_function=shutil.copyfile)
    assert same(data.load(str(folder.parent / "elsewhere" / "set")), made) and cached(folder) == pixels
    for path in folder.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    assert same(data.load(str(folder)), made) and cached(folder) == pixels


def test_a_file_that_changed_is_decoded_anew(folder: Path) -> None:
    made = data.load(str(folder))
    path = folder / "test" / "a" / "000.png"
    size, fresh = path.stat().st_size, 7777
    while len(noise(fresh, 9, 7)) != size:
        fresh += 1
    path.write_bytes(noise(fresh, 9, 7))
    assert not torch.equal(data.load(str(folder)).test.x[0], made.test.x[0])


def test_a_run_cut_short_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = data.load(str(folder), request=Request(cache=False)), []
    with pytest.raises(KeyboardInterrupt):
        data.load(str(folder), progress=stop_after(60 * 189))
    assert any(name.endswith(".log") for name in cached(folder))
    log = next((folder.parent / "cache").rglob("*.log"))
    log.write_bytes(log.read_bytes() + b"[[1, 2")  # the line at which it was cut
    went_on = data.load(str(folder), progress=lambda what, done, *_: seen.append((what, done)))
    assert same(went_on, plain) and "resuming" in seen[0][0] and seen[0][1] > 60 * 189
    assert not any(name.endswith(".log") or "-" in name for name in cached(folder))


def test_grey_until_the_last_image(folder: Path) -> None:
    for path in sorted(folder.rglob("*.png"))[:-1]:
        path.write_bytes(image(mode="L", size=(7, 9)))
    assert data.load(str(folder)).test.x.shape[1] == 3
    sorted(folder.rglob("*.png"))[-1].write_bytes(image(mode="L", size=(7, 9)))
    assert data.load(str(folder)).test.x.shape[1] == 1


def test_a_damaged_image_is_named(folder: Path) -> None:
    (folder / "train" / "b" / "100.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"train/b/100.png in .*set is not an image"):
        data.load(str(folder))


def test_a_large_set_is_named_by_its_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = data.content_hash(data.load(str(folder)))
    monkeypatch.setattr(_images, "PIXELS", 1000)
    large, direct = data.load(str(folder)), data.load(str(folder), request=Request(cache=False))
    assert len({small, data.content_hash(large), data.content_hash(direct)}) == 2
    assert data.content_hash(large) == data.content_hash(direct)
    limited = data.load(str(folder), request=Request(limit={"train": 30}))
    assert limited.train.y.bincount().tolist() == [10, 10, 10]
    assert data.content_hash(limited) != data.content_hash(large)
    (folder / "test" / "a" / "000.png").write_bytes((folder / "train" / "a" / "000.png").read_bytes())
    with pytest.warns(match="1 of 50 test images are also training"):
        assert data.content_hash(data.load(str(folder))) != data.content_hash(large)


@pytest.mark.parametrize("kind", ["pixels", "hashes", "json"])
def test_a_damaged_cache_is_made_again(folder: Path, kind: str) -> None:
    first = eager(data.load(str(folder)))
    for path in (folder.parent / "cache" / "sparring" / "images").glob(f"*.{kind}"):
        path.write_bytes(path.read_bytes()[:20])
    assert same(eager(data.load(str(folder))), first)


def test_a_cache_that_cannot_be_written_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError("the file system is read-only")

    monkeypatch.setattr(_cache, "lock", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(
        DataError, match=r"cannot be written.*; set XDG_CACHE_HOME to another folder, or add --no-cache"
    ):
        data.load(str(folder))
    monkeypatch.undo()
    monkeypatch.setattr(_cache, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    first = eager(data.load(str(folder)))
    monkeypatch.setattr(_cache, "lock", refuse)
    monkeypatch.setattr(_cache, "write_json", refuse)
    (folder / "test" / "a" / "000.png").touch()
    assert same(eager(data.load(str(folder))), first)


def moments(x: torch.Tensor) -> list[float]:
    """Return the mean and the deviation of each channel of images."""
    values = x.double() / 255
    return [*values.mean((0, 2, 3)).tolist(), *values.std((0, 2, 3), correction=0).tolist()]


def ways(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    """Yield one data set as it is read from files and archives, in chunks, by workers, cut short, cached and not."""
    packed = folder.parent / "packed.zip"
    packed.write_bytes(zipped({str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.png"))}))
    yield data.load(str(folder))
    for path, cache in ((folder, False), (packed, False), (packed, True)):
        yield data.load(str(path), request=Request(cache=cache))
    for chunk, workers in ((7, 1), (40, 3)):
        monkeypatch.setattr(_pixels, "CHUNK", chunk)
        monkeypatch.setattr(_cache, "available_workers", lambda workers=workers: workers)
        shutil.rmtree(folder.parent / "cache")
        with pytest.raises(KeyboardInterrupt):
            data.load(str(folder), progress=stop_after(60 * 189))
        yield data.load(str(folder))


def stop_after(size: int) -> Callable[[str, int, int | None, int], None]:
    """Return progress that ends a run after so many bytes."""

    def stop(_: str, done: int, total: int | None, images: int) -> None:
        if done > size:
            raise KeyboardInterrupt

    return stop


def test_mean_and_std_are_those_of_all_training_images_however_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pixels, "MEASURED", 189)
    first, *others = ways(folder, monkeypatch)
    assert [*first.mean, *first.std] == pytest.approx(moments(first.train.x), rel=1e-12)
    for other in others:
        assert (other.mean, other.std) == (first.mean, first.std)
        assert data.content_hash(other) == data.content_hash(first)


def test_a_large_set_is_measured_by_its_first_images_and_named_by_how_many(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_images, "PIXELS", 1000)
    whole = data.load(str(folder))
    monkeypatch.setattr(_pixels, "PIXELS", 1000)
    monkeypatch.setattr(_pixels, "MEASURED", 30 * 9 * 7)
    first, *others = ways(folder, monkeypatch)
    assert [*first.mean, *first.std] == pytest.approx(moments(first.train.x[:30]), rel=1e-12)
    assert whole.mean != first.mean and data.content_hash(whole) != data.content_hash(first)
    assert all((other.mean, other.std) == (first.mean, first.std) for other in others)
    assert {data.content_hash(other) for other in others[:1] + others[3:]} == {data.content_hash(first)}
    assert data.content_hash(others[1]) == data.content_hash(others[2])
    assert data.load(str(folder), request=Request("test")).identity  # a set without training images has none


def test_a_disk_without_room_is_refused_with_the_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match=r"200 images decoded once, 0.0 MB in .*images.*: 0.0 MB are free .* --limit"):
        data.load(str(folder))
    assert not any(name.endswith("pixels") for name in cached(folder))


def test_validation_images_are_drawn_by_a_seed(folder: Path) -> None:
    plain, one, two, again = (data.load(str(folder), request=Request(valid_seed=seed)) for seed in (None, 1, 2, 1))
    assert {len(found.valid.y) for found in (plain, one, two)} == {15} and same(one, again)
    assert all(found.valid.y.bincount().tolist() == [5, 5, 5] for found in (plain, one, two))
    assert not torch.equal(one.valid.x, two.valid.x) and not torch.equal(one.valid.x, plain.valid.x)
    drawn, taken = (torch.cat([found.train.x, found.valid.x]).sum((1, 2, 3)).sort() for found in (plain, one))
    assert torch.equal(drawn.values, taken.values)


def test_files_are_hashed_once_and_not_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Request("test", images=3, identify=True)
    first = data.load(str(folder), request=asked)
    monkeypatch.setattr(_cache, "hashes_of", lambda *_: pytest.fail("they were hashed anew"))
    assert len(first.test.y) == 3 and data.load(str(folder), request=asked).identity == first.identity
    monkeypatch.undo()
    (folder / "train" / "a" / "000.png").write_bytes(b"not even an image")
    assert data.load(str(folder), request=asked).identity != first.identity


class MadeUp:
    """Say of every image that it lies there, and that it is one and the same picture."""

    picture = image("JPEG", (224, 224))

    def contents(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        yield from ((entry, self.picture) for entry in entries)

    def stamps(self, entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
        yield from ((len(self.picture), 0) for _ in entries)


@pytest.mark.parametrize("free", [1, 10**15])
def test_a_set_of_any_size_is_refused_or_begun_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    monkeypatch.setattr(
        _cache, "_allocate", lambda path, size: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), size)
    )
    listing = Listing(MadeUp())
    for number in range(20_000):
        listing.wants(f"{'train' if number % 20 else 'test'}/{number % 19:03}/{number}.jpg")

    def stop(what: str, *_: object) -> None:
        raise DataError(f"begun: {what}")

    foreseen: list[Dataset] = []
    with pytest.raises(DataError, match=r"20,000 images decoded once, 3.0 GB in .*, about \d+ ") as told:
        load_images(tmp_path, "made-up", progress=stop, listing=listing, begin=foreseen.append)
    assert ("are free there" if free == 1 else "begun: ") in str(told.value)
    sizes = [(len(one.train.x), len(one.valid.x), len(one.test.x), one.classes) for one in foreseen]
    assert sizes == ([] if free == 1 else [(17_100, 1_900, 1_000, 19)])
    if foreseen:
        short = {
            "name": "p",
            "data": "d",
            "model": {"name": "mlp", "widths": [8]},
            "seeds": 1,
            "sparsities": [0.5],
            "pruning": [{}],
        }
        assert "on 4,617,000 images" in forecast(
            Plan.from_table(short | {"recipe": {"epochs": 90, "batch_size": 2}}), foreseen[0], workers=2
        )


def test_images_that_are_not_kept_are_decoded_when_they_are_looked_at(folder: Path) -> None:
    kept, lazy = data.load(str(folder)), data.load(str(folder), request=Request(cache=False))
    x, whole = lazy.train.x, kept.train.x
    assert isinstance(x, Undecoded) and isinstance(x[3:9], Undecoded) and x.dtype == torch.uint8
    for look in (
        lambda x: x[torch.tensor([5, 1, 5, 0])],
        lambda x: x[3:50:2],
        lambda x: x[-1],
        lambda x: x[torch.arange(len(x)) % 3 == 0],
        lambda x: torch.split(x, 40)[1].float().div_(255),
        lambda x: as_float(x[:7]),
        lambda x: x[:0],
        lambda x: x.clone(),
        lambda x: pickle.loads(pickle.dumps(x))[2:4],
    ):
        assert torch.equal(look(x) + 0, look(whole) + 0)
    assert isinstance(x.decode, Decoder) and (available_workers() == 1 or x.decode.workers is not None)
    assert same(lazy, kept) and data.content_hash(lazy) == data.content_hash(kept)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(189, 3))
    assert torch.equal(predict(model, x, batch_size=50), predict(model, whole, batch_size=50))
    recipe, weights = Recipe(epochs=1, batch_size=16, lr=0.1), []
    for own in (x, whole):
        weights.append(copy.deepcopy(model))
        fit(weights[-1], own, kept.train.y, recipe)
    one, other = (net.state_dict()["1.weight"] for net in weights)
    assert torch.equal(one, other)
