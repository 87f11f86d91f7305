"""List a user's images before decoding: entries, splits, labels, and what is ignored.

A folder, zip or tar has train/<class>/*, test/<class>/* and valid/<class>/*, or some of them. The part
of tables and shards is in the name of the file or of its folder.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from ...errors import DataError
from ...files import explain, read_bounded, safe_members
from .._decode import MOST_FILE, endings

PARTS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
CLASSES = "classes.txt"
# What other tools call a list of classes.
LISTS = re.compile(r".*(class|label|category|categories|synset)[^.]*[.](txt|json|csv|tsv|ya?ml)")
LAYOUT = "{part}/<class>/"
FRACTION = re.compile("[.]0$")  # of a number in a column with gaps, as pandas writes it
UNLABELLED = "images without a label"
IGNORED = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r")
# Members are decoded one by one, each bounded; a whole archive is limited only by the disk.
MOST_BYTES, MOST_MEMBERS = 1 << 50, 100_000_000


class Entry(NamedTuple):
    """An image of a part ("" if not given); `place` is its position in the order in which a set is read."""

    place: int
    part: str
    label: str
    member: str


class Source(Protocol):
    """Where images are stored."""

    def contents(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        """Yield some images in the order in which they are read: each as bytes, or as the name of its file."""
        ...

    def stamps(self, entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
        """Yield the size of each image's file, and its modification time in nanoseconds."""
        ...


@dataclass
class Listing:
    """The content of a set: images, class folders, ignored files and folders, and information on classes.

    `flat` are images without a split; `named` are classes in their order, `lists` files that may name them too;
    `numbered` labels are their numbers. `layout` describes where images of a split belong.
    """

    source: Source
    entries: list[Entry] = field(default_factory=list)
    flat: list[Entry] = field(default_factory=list)
    count: int = 0
    folders: set[tuple[str, str]] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)
    nested: set[str] = field(default_factory=set)
    outside: list[str] = field(default_factory=list)
    named_parts: set[str] = field(default_factory=set)
    roots: set[str] = field(default_factory=set)
    named: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    numbered: bool = False
    layout: str = LAYOUT
    left: dict[str, list[str]] = field(default_factory=dict)

    @property
    def by_folders(self) -> bool:
        """Whether an image's folder names its class."""
        return self.layout == LAYOUT

    def add(self, part: str, label: str, member: str, place: int | None = None) -> None:
        """Add an image of a table or shard; `part` may be "". Leave out an image without a label."""
        if not label or label.lower() == "nan":  # as a float that is missing is written
            self.leave(UNLABELLED, member)
            return
        self.count, label = self.count + (place is None), one_form(label)
        entry = Entry(self.count if place is None else place, part, label, member)
        (self.entries if part else self.flat).append(entry)
        if part:
            self.folders.add((part, label))
            self.named_parts.add(part)

    def leave(self, why: str, member: str) -> None:
        """Record an ignored file."""
        self.left.setdefault(why, []).append(member)

    def settle(self) -> None:
        """Decide what labels mean once all are known: names, numbers of the named classes, or plain numbers.

        Raise DataError for a number that no class has.
        """
        if self.entries:
            for entry in self.flat:
                self.leave("images without a split", entry.member)
            self.flat.clear()
        labels = {entry.label for entry in (*self.entries, *self.flat)}
        whole = {label: FRACTION.sub("", label) for label in labels}
        if not labels <= set(self.named) and all(label.removeprefix("-").isdecimal() for label in whole.values()):
            self._relabel(whole)
            labels = set(whole.values())
        if labels == {"-1", "1"}:
            raise DataError("the labels are -1 and 1, but -1 stands for 'no label'; number the classes 0 and 1")
        if "-1" in labels and all(label.isdecimal() for label in labels - {"-1"}):
            self._drop("-1")
            labels.discard("-1")
        numbers = all(label.isascii() and label.isdecimal() and len(label) < 19 for label in labels)
        self.numbered = numbers and not self.named
        if self.numbered:
            self._relabel({label: str(int(label)) for label in labels})  # "007" is class 7
        if numbers and not labels <= set(self.named) and self.named:
            for entry in (*self.entries, *self.flat):
                if int(entry.label) >= len(self.named):
                    raise DataError(
                        f"{entry.member} has the label {entry.label}, but {len(self.named)} classes are named"
                    )
            self._relabel({label: self.named[int(label)] for label in labels})

    def _relabel(self, names: Mapping[str, str]) -> None:
        """Give every label the name that it stands for."""
        self.entries, self.flat = (
            [entry._replace(label=names[entry.label]) for entry in own] for own in (self.entries, self.flat)
        )
        self.folders = {(part, names[label]) for part, label in self.folders}

    def _drop(self, label: str) -> None:
        """Leave out images whose label says that they have none."""
        for entry in (*self.entries, *self.flat):
            if entry.label == label:
                self.leave(UNLABELLED, entry.member)
        self.entries, self.flat = (
            [entry for entry in own if entry.label != label] for own in (self.entries, self.flat)
        )
        self.folders = {(part, one) for part, one in self.folders if one != label}

    def wants(self, member: str) -> bool:
        """Return whether a file is a list of classes, and record any other file; the name of a folder ends in "/"."""
        self.count += 1
        member = member.removeprefix("./")  # as `tar -C folder .` writes it
        *folders, name = member.rstrip("/").split("/")
        if any(part.startswith(".") or part in IGNORED for part in (*folders, name)):
            return False  # a notebook's copies, and the hidden file that macOS packs with every file
        *within, _ = member.split("/")
        depth = next((at for at, folder in enumerate(within) if folder in PARTS), len(within)) + 3
        part, image = (folders[-2] if len(folders) >= 2 else ""), is_image(name)
        if len(within) >= depth and within[-2] not in PARTS:
            self.nested.add("/".join(within[:depth]))
        elif member.endswith("/"):
            self.folders |= {(PARTS[folders[-1]], one_form(name))} if folders and folders[-1] in PARTS else set()
        elif part in PARTS:
            label = one_form(folders[-1])
            self.folders.add((PARTS[part], label))
            self.named_parts.add(part)
            self.roots.add("/".join(folders[:-2]))
            if image:
                self.entries.append(Entry(self.count, PARTS[part], label, member))
            else:
                self.skipped.append(member)
        elif set(folders) & set(PARTS):
            self.leave("images in no class's folder, not read", member) if image else self.skipped.append(member)
        elif image:
            self.outside.append(member)
            if folders:
                self.flat.append(Entry(self.count, "", one_form(folders[-1]), member))
        if set(folders) & set(PARTS) or not LISTS.fullmatch(name.lower()):
            return False
        if name.lower() != CLASSES and not member.endswith("/"):
            self.lists.append(member)
        return name.lower() == CLASSES


def one_form(label: str) -> str:
    """Return a class's name in one form of Unicode: macOS writes an accent as a letter of its own.

    Raise DataError for a name that is not text.
    """
    if label.isascii():
        return label
    try:
        label.encode()
    except UnicodeEncodeError:
        raise DataError(f"the folder {label!a} has no name in UTF-8; rename it") from None
    return unicodedata.normalize("NFC", label)


def is_image(name: str) -> bool:
    """Return whether a file is an image, by its extension."""
    return os.path.splitext(name)[1].lower() in endings()  # noqa: PTH122 -- Path takes ten times as long


class Files:
    """Images in their own files, below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def contents(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        for entry in entries:
            yield entry, os.path.join(self.root, entry.member)  # noqa: PTH118 -- a fifth of Path's time

    def stamps(self, entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
        for entry in entries:
            yield stamp(os.path.join(self.root, entry.member))  # noqa: PTH118


class Packed:
    """Images in zips or tars, read from front to back; the name of an archive, if any, goes before its members'."""

    def __init__(self, archives: Mapping[str, Path]) -> None:
        self.archives = archives

    def members(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """Yield the wanted members of all archives, each read completely."""
        for name, archive in self.archives.items():
            before = f"{name}#" if name else ""
            found = safe_members(
                archive,
                wanted=lambda member, before=before: wanted(before + member),  # type: ignore[misc]
                max_bytes=MOST_BYTES,
                max_files=MOST_MEMBERS,
            )
            yield from ((before + member, data) for member, data in found)

    def contents(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
        by_place = {entry.place: entry for entry in entries}
        found: list[Entry] = []
        count = 0

        def wanted(_: str) -> bool:
            nonlocal count
            count += 1
            entry = by_place.get(count)
            found.extend([] if entry is None else [entry])
            return entry is not None

        for _, data in self.members(wanted):
            yield found[-1], data

    def stamps(self, entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
        own = {name: stamp(archive) for name, archive in self.archives.items()}
        for entry in entries:
            yield own[entry.member.partition("#")[0]] if "" not in own else own[""]


def stamp(path: Path | str) -> tuple[int, int]:
    """Return a file's size in bytes and its modification time in nanoseconds."""
    try:
        status = os.stat(path)  # noqa: PTH116 -- a third of Path's time, of a million files
    except OSError as error:
        raise explain(error, path, "read") from error
    return status.st_size, status.st_mtime_ns


def part_of(file: str) -> str:
    """Return the part in a file's folder or name, such as train-00000-of-00002.parquet, else ""."""
    *folders, name = file.lower().split("/")
    words = [word for word in folders if word in PARTS] or re.split(r"[^a-z]+", name)
    parts = {PARTS[word] for word in words if word in PARTS}
    return parts.pop() if len(parts) == 1 else ""


def list_folder(path: Path) -> Listing:
    """List a folder, zip or tar of images by class folders; only lists of classes are read."""
    source = Files(path) if path.is_dir() else Packed({"": path})
    listing = Listing(source)
    for member, data in _members(path, source, listing.wants):
        listing.named = _lines(data, f"{member} in {path}")
    return listing


def _lines(data: bytes, where: str) -> list[str]:
    """Return the non-empty lines of a list of classes."""
    try:
        return [one_form(line.strip()) for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text; save it as UTF-8") from error


def _members(path: Path, source: Files | Packed, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the wanted files of a folder or archive, always in the same order."""
    if isinstance(source, Packed):
        yield from source.members(wanted)
        return
    for member in sorted(walk(path, "", 3)):
        if wanted(member) and not member.endswith("/"):
            yield member, read_bounded(path / member, limit=MOST_FILE)


def walk(folder: Path | str, prefix: str, depth: int) -> Iterator[str]:
    """Yield the names below a folder, down to a depth; names of folders end in "/"."""
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError as error:
        raise explain(error, folder, "read") from error
    for entry in entries:
        try:
            folder_too = entry.is_dir()
        except OSError:  # a link to itself, which is refused when it is read
            folder_too = False
        if folder_too:
            yield f"{prefix}{entry.name}/"
            if depth > 1:
                yield from walk(entry.path, f"{prefix}{entry.name}/", depth - 1)
        else:
            yield prefix + entry.name
