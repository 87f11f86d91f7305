"""Tables and shards hold what the same images hold in folders, and no row is lost in silence."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparring import data
from sparring.data import ClassList, Dataset, Request, _cache
from sparring.errors import DataError, DataWarning

from ..hostile_parts import image
from ..test_request import noise

TESTED = Request("any")
NAMES = ("cat", "dog", "eel")
Rows = list[tuple[bytes, int]]
Write = Callable[[Path, str, Rows], None]

arrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


def rows(part: str, count: int) -> Rows:
    return [(noise(number + 100 * len(part), 6, 5), number % 3) for number in range(count)]


def table(found: Rows, *, names: tuple[str, ...] = NAMES, **columns: Any) -> Any:
    """Return a table as `datasets` makes it."""
    import pyarrow as pa

    images = [{"bytes": content, "path": f"{at}.png"} for at, (content, _) in enumerate(found)]
    kinds = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    held = {"image": images, "label": [label for _, label in found]} | columns
    made = pa.table({name: content for name, content in held.items() if content is not None})
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds if names else {}}})})


def write_parquet(root: Path, part: str, found: Rows) -> None:
    import pyarrow.parquet as pq

    (root / "data").mkdir(exist_ok=True)
    pq.write_table(table(found), root / "data" / f"{part}-00000-of-00001.parquet", row_group_size=4)


def write_arrow(root: Path, part: str, found: Rows) -> None:
    import pyarrow as pa

    folder = root / part
    folder.mkdir()
    half = len(found) // 2
    for number, own in enumerate((found[:half], found[half:])):
        with pa.ipc.new_stream(folder / f"data-0000{number}-of-00002.arrow", (made := table(own)).schema) as file:
            file.write_table(made, max_chunksize=3)
    (folder / "cache-123.arrow").write_bytes(b"what map() left")
    (folder / "state.json").write_text("{}")


def write_shards(root: Path, part: str, found: Rows) -> None:
    (root / "classes.txt").write_text("\n".join(NAMES))
    half = len(found) // 2
    for number, own in enumerate((found[:half], found[half:])):
        members: dict[str, bytes] = {}
        for at, (content, label) in enumerate(own):
            said = (".cls", str(label).encode()) if at % 2 else (".json", json.dumps({"label": label}).encode())
            members |= {f"{at:04}.png": content, f"{at:04}{said[0]}": said[1]}
        shard(root / f"mine-{part}-00{number}.tar", members)


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def write_csv(root: Path, part: str, found: Rows) -> None:
    (root / "pictures").mkdir(exist_ok=True)
    lines = ["file_name,width,label"]
    for at, (content, label) in enumerate(found):
        (root / "pictures" / f"{part}{at:04}.png").write_bytes(content)
        lines.append(f'"pictures/{part}{at:04}.png",5,{NAMES[label]}')
    (root / f"{part}.csv").write_text("\n".join(lines))


WRITERS = [
    pytest.param(write_parquet, marks=arrow),
    pytest.param(write_arrow, marks=arrow),
    write_shards,
    write_csv,
]


def folder_of(root: Path, parts: dict[str, Rows]) -> Path:
    """Write the same images as class folders."""
    for part, found in parts.items():
        for at, (content, label) in enumerate(found):
            path = root / "plain" / "set" / part / NAMES[label] / f"{at:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root / "plain" / "set"


def contents(dataset: Dataset) -> list[Any]:
    """Return all that does not hang on the order of images."""
    splits = (dataset.train, dataset.valid, dataset.test)
    held = [sorted((x.numpy().tobytes(), int(y)) for x, y in zip(*split, strict=True)) for split in splits]
    return [held[0] + held[1], held[2], dataset.classes, dataset.class_names]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kept", [False, True])
def test_the_same_images_as_in_folders(
    write: Write, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_cache, "SMALL", 0 if kept else 1 << 30)
    parts = {"train": rows("train", 33), "test": rows("test", 13)}
    mine = tmp_path / "set"
    mine.mkdir()
    for part, found in parts.items():
        write(mine, part, found)
    loaded = data.load(str(mine))
    assert contents(loaded) == contents(data.load(str(folder_of(tmp_path, parts))))
    assert loaded.valid.y.bincount().tolist() == [1, 1, 1]
    assert torch.equal(data.load(str(mine)).train.x, loaded.train.x)
    few = data.load(str(mine), request=Request("test", images=4))
    chosen = few.drawn
    assert chosen is not None and torch.equal(few.test.x, loaded.test.x[chosen])
    assert "13 for test (5 cat, 4 dog, 4 eel)" in few.notes[-1]


@pytest.mark.parametrize("write", WRITERS)
def test_a_single_file_is_tested(write: Write, tmp_path: Path) -> None:
    write(tmp_path, "some", rows("some", 8))
    found = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".parquet", ".arrow", ".tar", ".csv"))
    path = next(path for path in found if not path.name.startswith("cache"))
    listed = ClassList(NAMES, "the list")
    loaded = data.load(str(path), request=replace(TESTED, classes=listed))
    assert loaded.class_names == NAMES and "all its images are test images" in loaded.notes[0]
    with pytest.raises(DataError, match=r"has no images in .*train"):
        data.load(str(path))


def test_a_list_without_splits_may_name_images_in_folders_of_parts(tmp_path: Path) -> None:
    for place in ("test/cat", "Train/dog"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "0.png").write_bytes(image())
    (tmp_path / "mine.csv").write_text("path,label\ntest/cat/0.png,cat\nTrain/dog/0.png,dog")
    loaded = data.load(str(tmp_path / "mine.csv"), request=TESTED)
    assert loaded.test.y.tolist() == [0, 1] and "all its images are test images" in loaded.notes[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,0\nb.png,2", "every label from 0 to the last, but holds 0, 2; give --classes"),
        ("width,height\n1,2", "has the headings width, height; call the columns 'path'"),
        ('path,label\n"a.png,0', "not a CSV file in UTF-8"),
        ("", "has the headings"),
        ("path,label\nmissing.png,0", "cannot read"),
    ],
)
def test_a_csv_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(image())
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        data.load(str(tmp_path / "mine.csv"), request=TESTED)


def test_rows_that_are_left_out_are_counted(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(image())
    lines = [
        "path,label,split",
        "a.png,1,test",
        "b.png,0,test",
        "c.png,,test",
        "c.png,0,",
        "c.txt,0,test",
        ",0,test",
        "c.png",
    ]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    with pytest.warns(DataWarning) as told:
        loaded = data.load(str(tmp_path / "mine.csv"), request=TESTED)
    assert loaded.test.y.tolist() == [0, 1] and loaded.classes == 2
    text = " ".join(str(one.message) for one in told)
    assert all(f"{why}: {count}" in text for why, count in (
        ("without a label", 1), ("without an image path", 2), ("without a split", 1)
    ))  # fmt: skip


def test_missing_labels_are_no_class_and_signs_are_refused(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(image())
    listed = tmp_path / "mine.csv"
    listed.write_text("path,label\na.png,nan\nb.png,dog\nc.png,NaN\nd.png,cat\n")
    with pytest.warns(DataWarning, match=r"without a label: 2 \(a.png, c.png\)"):
        assert data.load(str(listed), request=TESTED).class_names == ("cat", "dog")
    listed.write_text("path,label\na.png,-1\nb.png,1\n")
    with pytest.raises(DataError, match="-1 stands for 'no label'; number the classes 0 and 1"):
        data.load(str(listed), request=TESTED)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_may_be_separated_as_spreadsheets_do(tmp_path: Path, separator: str) -> None:
    lines = [["path", "label"], ["a.png", "-1"], ["b.png", "1"], ["c.png", "0"]]
    for name, _ in lines[1:]:
        (tmp_path / name).write_bytes(image())
    (tmp_path / "mine.csv").write_text("\n".join(map(separator.join, lines)))
    with pytest.warns(DataWarning, match=r"without a label: 1 \(a.png\)"):
        assert data.load(str(tmp_path / "mine.csv"), request=TESTED).test.y.tolist() == [0, 1]


def test_a_list_of_paths_as_windows_and_others_write_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.png").write_bytes(noise(ord(name), 6, 5))
    lines = ["path,label,split", "images\\a.png,1,Training", "images\\a.png,1,Training", "images\\b.png,1,testing"]
    (tmp_path / "mine.csv").write_text("\n".join([*lines, "images\\b.png,0,Training", "images\\a.png,0,testing"]))
    with pytest.warns(DataWarning, match="listed more than once: 2"):
        loaded = data.load(str(tmp_path / "mine.csv"), request=TESTED)
    assert (len(loaded.train.y) + len(loaded.valid.y), len(loaded.test.y)) == (3, 2)
    (tmp_path / "none.csv").write_text("path,label\nimages/a,1\n")
    with pytest.raises(DataError, match=r"no images in rows of test .*, 1 rows without an image path \(none.csv#0"):
        data.load(str(tmp_path / "none.csv"), request=TESTED)


def test_a_shard_that_repeats_a_name_or_is_cut_short(tmp_path: Path) -> None:
    shard(tmp_path / "set.tar", {"a.png": image(), "a.cls": b"0"})
    whole = (tmp_path / "set.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    (tmp_path / "twice.tar").write_bytes(whole[:end] + whole)
    with pytest.warns(DataWarning, match="images whose name another has: 1"):
        assert data.load(str(tmp_path / "twice.tar"), request=TESTED).test.y.tolist() == [0]
    (tmp_path / "cut.tar").write_bytes(whole[:end] + whole[:300])
    (tmp_path / "open.tar").write_bytes(whole[:end])  # as a full disk leaves it
    for name in ("cut", "open"):
        with pytest.raises(DataError, match=rf"{name}.tar is damaged \(it is truncated\)"):
            data.load(str(tmp_path / f"{name}.tar"), request=TESTED)


def test_labels_that_are_padded_with_zeros_are_numbers(tmp_path: Path) -> None:
    for part in ("train", "test"):
        own = {f"{at}.png": noise(at + 40 * (part == "test"), 6, 5) for at in range(24)}
        shard(tmp_path / f"mine-{part}-0.tar", own | {f"{at}.cls": f"{at % 12:03}".encode() for at in range(24)})
    loaded = data.load(str(tmp_path))  # a warning, such as of classes without images, is an error here
    assert loaded.class_names == tuple(map(str, range(12))) and loaded.test.y.tolist() == [*range(12), *range(12)]


def test_numbers_that_a_spreadsheet_made_fractions_are_numbers(tmp_path: Path) -> None:
    lines = ["path,label"]
    for at in range(12):
        (tmp_path / f"{at}.png").write_bytes(noise(at, 6, 5))
        lines.append(f"{at}.png,{at}.0")
    (tmp_path / "mine.csv").write_text("\n".join([*lines, "0.png,-1.0"]))
    with pytest.warns(DataWarning) as told:
        loaded = data.load(str(tmp_path / "mine.csv"), request=TESTED)
    assert loaded.class_names == tuple(map(str, range(12))) and loaded.test.y.tolist() == list(range(12))
    assert [str(one.message).partition(": ")[2] for one in told] == ["images without a label: 1 (0.png)"]


def test_rows_of_another_length_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "mine.csv").write_text("path,label\na.png,0\na.png,cat, large\na.png\n")
    with pytest.warns(DataWarning, match=r"rows of more or fewer columns than the first: 2 \(mine.csv#1, mine.csv#2\)"):
        data.load(str(tmp_path / "mine.csv"), request=TESTED)


def test_shards_whose_members_are_odd(tmp_path: Path) -> None:
    odd = {"a.png": image(), "a.cls": b"0", "b.png": image(), "b.seg.png": image(), "c.cls": b"1", "d.txt": b"x"}
    shard(tmp_path / "set.tar", odd)
    with pytest.warns(DataWarning) as told:
        loaded = data.load(str(tmp_path / "set.tar"), request=TESTED)
    assert loaded.test.y.tolist() == [0]
    text = " ".join(str(one.message) for one in told)
    assert "without a label: 1 (b.png)" in text and "neither images nor labels: 2 (b.seg.png, d.txt)" in text
    shard(tmp_path / "bad.tar", odd | {"b.json": b"{"})
    with pytest.raises(DataError, match=r"b.json in .*bad.tar holds no label"):
        data.load(str(tmp_path / "bad.tar"), request=TESTED)


@arrow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": None}, "one column of images .*, but has none"),
        (
            {"more": [b"x"] * 6, "image": [b"y"] * 6, "img": [b"y"] * 6},
            "one column of images .*, but has image, more, img",
        ),
        ({"label": None}, r"one column of labels \(integers or text\), but has none; keep one, or call it 'label'"),
        ({"label": [0.0] * 6, "y": None}, "has label of type double"),
        ({"image": [{"bytes": None, "path": "/etc/passwd"}] * 6}, r"#\d+ in .* has no image data"),
        ({"label": [0, 1, 2, 3, 0, 1]}, "class '3' .* list of classes does not name it"),
    ],
)
def test_tables_that_are_not_clear_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    own: dict[str, Any] = {name: None if held is None else pa.array(held) for name, held in changed.items()}
    made = table(rows("test", 6), **own)
    pq.write_table(made, tmp_path / "test.parquet")
    with pytest.raises(DataError, match=message):
        data.load(str(tmp_path / "test.parquet"), request=TESTED)


@arrow
def test_labels_of_tables(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = rows("test", 6)
    pq.write_table(table(found, label=[0, 1, -1, 2, None, 0]), tmp_path / "test.parquet")
    with pytest.warns(DataWarning, match="images without a label: 2"):
        assert data.load(str(tmp_path / "test.parquet"), request=TESTED).test.y.tolist() == [0, 1, 2, 0]
    pq.write_table(table(found, names=(), label=[7, 9, 7, 9, 7, 9]), tmp_path / "test.parquet")
    listed = replace(TESTED, classes=ClassList(tuple("abcdefghij"), "the list"))
    loaded = data.load(str(tmp_path / "test.parquet"), request=listed)
    assert (loaded.classes, sorted(loaded.test.y.tolist())) == (10, [7, 7, 7, 9, 9, 9])
    pq.write_table(table(found, names=(), label=list("ababab")), tmp_path / "test.parquet")
    assert data.load(str(tmp_path / "test.parquet"), request=TESTED).class_names == ("a", "b")
    category = pa.array(list("dcdcdc")).dictionary_encode()  # as pandas writes one
    pq.write_table(table(found, names=(), label=category), tmp_path / "test.parquet")
    assert data.load(str(tmp_path / "test.parquet"), request=TESTED).class_names == ("c", "d")


@arrow
def test_one_large_text_that_is_every_label_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    every = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["a" * (1 << 20)]))
    images = pa.array([b""] * 20_000, pa.binary())
    made = pa.table({"image": images, "label": every})
    pq.write_table(made, tmp_path / "test.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "test.parquet").stat().st_size < 10_000
    with pytest.raises(DataError, match="has a label of more than 1,000 letters"):
        data.load(str(tmp_path / "test.parquet"), request=TESTED)


@arrow
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_damaged_tables_end_in_one_sentence(tmp_path: Path, ending: str) -> None:
    write = write_parquet if ending == "parquet" else write_arrow
    write(tmp_path, "test", rows("test", 12))
    path = sorted(path for path in tmp_path.rglob(f"*.{ending}") if "data-" in path.name or "test-" in path.name)[0]
    sound, dice = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(sound)
        for at in dice.integers(0, len(sound), 6):
            damaged[at] = dice.integers(256)
        path.write_bytes(bytes(damaged[: dice.integers(len(sound) // 2, len(sound) + 1)]))
        try:
            data.load(str(path), request=TESTED)
        except DataError as error:
            refused += path.name in str(error)
    assert refused > 30
