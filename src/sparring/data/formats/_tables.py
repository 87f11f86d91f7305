"""Tables with one image and label per row: Parquet and Arrow files of Hugging Face, and CSV files of paths.

`datasets.Dataset.save_to_disk` and `push_to_hub` write a column of structs {bytes, path}, and the names of classes into
the schema's metadata.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import DataError, UserError
from ...files import read_bounded
from .._decode import MOST_FILE
from ._listing import PARTS, Entry, Files, Listing, is_image, part_of, stamp

COLUMNAR = (".parquet", ".arrow")
IMAGES = ("image", "img", "images", "jpg", "png", "path", "file", "file_name", "filename")
LABELS = ("label", "labels", "class", "class_name", "cls", "target", "y")
PARTED_AS = {**PARTS, "training": "train", "testing": "test"}
PARTED = ("split", "part", "subset", "set")
SEPARATORS = (",", ";", "\t")  # as spreadsheets of various countries write; the most frequent in the first line counts
MOST_TEXT = 1 << 30  # bytes of a CSV file: ten million rows
MOST_LABEL = 1_000  # letters
ROWS = 1 << 16  # labels that are read at once


class Columns:
    """Images in a column of Parquet or Arrow files; the name of one is FILE#ROW."""

    def __init__(self, root: Path, images: Mapping[str, str]) -> None:
        self.root, self.images = root, images

    def contents(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        files: dict[str, dict[int, Entry]] = {}
        for entry in sorted(entries, key=lambda entry: entry.place):
            file, _, row = entry.member.rpartition("#")
            files.setdefault(file, {})[int(row)] = entry
        for file, wanted in files.items():
            for at, value in _values(self.root / file, self.images[file], rows=wanted):
                data = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(data, bytes) or len(data) > MOST_FILE:
                    raise DataError(
                        f"{wanted[at].member} in {self.root} has no image data, or more than 64 MiB; if the table has "
                        "paths only, save it with its images"
                    )
                yield wanted[at], data

    def stamps(self, entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
        each = {file: stamp(self.root / file) for file in self.images}
        for entry in entries:
            yield each[entry.member.rpartition("#")[0]]


def list_columns(root: Path, files: Sequence[str]) -> Listing:
    """List the rows of Parquet and Arrow files below a folder; no image is read.

    Raise DataError where pyarrow is missing, a table is damaged, or it is not clear which column is which.
    """
    images: dict[str, str] = {}
    listing = Listing(Columns(root, images), layout="a table called {part}-*.parquet")
    for file in sorted(files):
        with _opened(root / file) as table:
            schema = table.schema_arrow if _is_parquet(root / file) else table.schema
            images[file], column, names = _choice(schema, f"{file} in {root}")
        if listing.named not in ([], names):
            raise DataError(f"{root} holds tables of several sets of classes; give one set at a time")
        listing.named = names
        folders = file.split("/")[:-1]
        listing.roots.add("/".join(name for name in folders if name not in (*PARTS, "data")))
        for row, label in _values(root / file, column):
            unlabelled = label is None or label == -1  # as Hugging Face writes it
            text = "" if unlabelled else names[label] if names and 0 <= label < len(names) else str(label)
            listing.add(part_of(file), text, f"{file}#{row:09}")
    listing.settle()
    return listing


def _arrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet and Arrow files are read by pyarrow: pip install 'sparring[arrow]'") from error
    return pyarrow, pyarrow.parquet


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Add a table's name to any error of pyarrow."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, MemoryError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise DataError(f"{path} is not a valid table ({reason}); create or download it again") from error


@contextmanager
def _opened(path: Path, *labels: str) -> Iterator[Any]:
    """Open a Parquet file, or map an Arrow file of either format as a table; equal `labels` are read once."""
    arrow, parquet = _arrow()
    if not path.is_file():
        raise DataError(f"{path} is not a regular file; choose another path")
    with _sound(path):
        if _is_parquet(path):
            with parquet.ParquetFile(path, memory_map=True, pre_buffer=False, read_dictionary=labels) as file:
                yield file
            return
        with arrow.memory_map(str(path)) as source:
            opened = arrow.ipc.open_file if source.read(6) == b"ARROW1" else arrow.ipc.open_stream
            source.seek(0)
            yield opened(source).read_all()


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _values(path: Path, column: str, *, rows: Mapping[int, object] | None = None) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each row, or of some rows one by one, since they are large."""
    with _opened(path, *([column] if rows is None else [])) as table:
        start = 0
        for values in _parquet(table, column, rows) if _is_parquet(path) else _batches(table, column):
            if rows is None:
                yield from enumerate(_labels(values, path), start)
            else:
                yield from ((row, values[row - start].as_py()) for row in _within(rows, start, len(values)))
            start += len(values)


def _labels(values: Any, path: Path) -> list[Any]:
    """Return labels; raise DataError for a label that is not a class: a hostile file may repeat it a million times."""
    types = _arrow()[0].types
    each = values.dictionary if types.is_dictionary(values.type) else values
    if not types.is_integer(each.type) and any(len(label or "") > MOST_LABEL for label in each.to_pylist()):
        raise DataError(f"{path} has a label of more than {MOST_LABEL:,} letters; is this the right column?")
    return list(values.to_pylist())


def _within(rows: Mapping[int, object], start: int, count: int) -> list[int]:
    return [row for row in range(start, start + count) if row in rows]


def _batches(table: Any, column: str) -> Iterator[Any]:
    for batch in table.to_batches():
        values = batch.column(column)
        values.validate(full=True)  # values in a mapped file are not checked otherwise
        yield values


def _parquet(table: Any, column: str, rows: Mapping[int, object] | None) -> Iterator[Any]:
    """Yield a column in pieces, or only their lengths if no row is wanted."""
    start = 0
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if rows is None or _within(rows, start, count):
            # One image at a time: many rows of a hostile file may repeat one large image.
            each = table.iter_batches(ROWS if rows is None else 1, row_groups=[group], columns=[column])
            yield from (batch.column(0) for batch in each)
        else:
            yield range(count)
        start += count


def _choice(schema: Any, where: str) -> tuple[str, str, list[str]]:
    """Return the names of the columns of images and of labels, and the names of the classes, if given."""
    types = _arrow()[0].types
    encoded = [
        field.name
        for field in schema
        if types.is_binary(field.type)
        or types.is_large_binary(field.type)
        or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    classes = _class_labels(schema.metadata or {})
    named = {field.name: field.type for field in schema if field.name.lower() in LABELS}
    plain = [name for name, kind in named.items() if _is_label(types, kind)]
    odd = [f"{name} of type {kind}" for name, kind in named.items() if name not in plain]
    image = _one(encoded, IMAGES, "images (bytes, or a struct with bytes)", where)
    label = _one(
        [name for name in classes if name in schema.names and _is_label(types, schema.field(name).type)] or plain,
        LABELS,
        "labels (integers or text)",
        where,
        odd,
    )
    return image, label, classes.get(label, [])


def _is_label(types: Any, kind: Any) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind  # a category of pandas
    return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))


def _one(found: Sequence[str], preferred: Sequence[str], what: str, where: str, odd: Sequence[str] = ()) -> str:
    liked = found if len(found) == 1 else [name for name in found if name.lower() in preferred]
    if len(liked) != 1:
        shown = ", ".join(found or odd) or "none"
        raise DataError(
            f"{where} must have one column of {what}, but has {shown}; keep one, or call it '{preferred[0]}'"
        )
    return liked[0]


def _class_labels(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of the classes of each column that Hugging Face's metadata calls a ClassLabel."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        found = {
            name: [str(one) for one in said["names"]]
            for name, said in features.items()
            if isinstance(said, dict) and said.get("_type") == "ClassLabel"
        }
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        return {}
    return found


def list_csv(root: Path, files: Sequence[str], named: Sequence[str] = ()) -> Listing:
    """List images by CSV files below a folder: a column of paths, relative to the file, and one of labels.

    A column "split" may name the part. Without headings the first of two columns is the path. `named` are the classes
    that numbers stand for.
    """
    listing = Listing(Files(root), named=list(named), layout="rows of {part} (a column 'split', or a file {part}.csv)")
    for file in sorted(files):
        data = read_bounded(root / file, limit=MOST_TEXT)
        try:
            text = data.decode("utf-8-sig")
            separator = max(SEPARATORS, key=text.partition("\n")[0].count)
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
            _list_rows(rows, file, listing, root)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{root / file} is not a CSV file in UTF-8 ({error}); save it as UTF-8") from error
    listing.settle()
    return listing


def _list_rows(rows: Iterator[list[str]], file: str, listing: Listing, root: Path) -> None:
    first = next(rows, [])
    heads = [head.strip().lower() for head in first]
    at = [next((heads.index(one) for one in known if one in heads), None) for known in (IMAGES, LABELS, PARTED)]
    path, label, part = at
    if path is None or label is None:
        if len(first) != 2 or not is_image(first[0]):
            raise DataError(
                f"{root / file} has the headings {', '.join(first)[:200] or '(none)'}; call the columns 'path' and "
                "'label', and one that says train, valid or test 'split'"
            )
        path, label, part, rows = 0, 1, None, itertools.chain([first], rows)
    folder, own = file.rpartition("/")[0], part_of(file)
    for number, row in enumerate(rows):
        name = row[path].strip().replace("\\", "/") if len(row) == len(first) else ""  # as Windows writes them
        if is_image(name) and "\0" not in name:
            said = own if part is None else PARTED_AS.get(row[part].strip().lower(), "")
            listing.add(said, row[label].strip(), f"{folder}/{name}" if folder else name)
        elif row:
            odd = (
                "rows without an image path"
                if len(row) == len(first)
                else "rows of more or fewer columns than the first"
            )
            listing.leave(odd, f"{file}#{number}")
