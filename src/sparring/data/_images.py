"""A user's own images as a data set: splits, classes, order, and messages about them."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import DataError, DataWarning, UserError
from ..files import canonical_json
from ._cache import Decoded, any_coloured, decoded, decoders, hashes_of, known_hashes, rows_like_first
from ._pixels import PIXELS, Rows
from ._places import Progress
from ._request import EVERYTHING, SPLITS, Request
from ._types import Dataset, Split, balanced_order, counted, fixed_order, from_splits, hold_out, take, tell_shared
from ._undecoded import Undecoded
from .formats._listing import CLASSES, PARTS, Entry, Listing

Begin = Callable[[Dataset], None]
NUMBER = re.compile(r"[+-]?\d+([.]\d+)?")
ALMOST = {**PARTS, "training": "train", "testing": "test"}  # in capitals, or other words
_UNTRAINED = (
    "; a test split is enough to attack a trained network, and to prune or study one with epochs=0 (in a plan: its "
    "weights, and finetune.epochs = 0)"
)


def load_images(
    path: Path, name: str, request: Request = EVERYTHING, progress: Progress | None = None, *, listing: Listing,
    begin: Begin | None = None,
) -> Dataset:  # fmt: skip
    """Load images of one size in any format that Pillow decodes, without unpacking anything to disk.

    Classes are the folder names in sorted order, or the lines of classes.txt beside train/, which may name more classes
    than there are folders, or those of `request.classes`. Images are grey (1, H, W) if all of them are, else (3, H, W);
    they are rotated as EXIF says, transparency is dropped, and the first of several frames is read. Hidden files and
    folders are ignored; a DataWarning counts ignored files, and names classes without test images and labels whose
    order is not that of their numbers. Without valid/ (or val/, validation/), every tenth training image of a class (by
    name) is held out. Each split is in balanced order. A set with images in a lossy format has the format in its name,
    such as "jpeg". A folder of class folders alone is a test split. A limited number of test images is decoded in
    memory, a whole set of more than 16 MiB of pixels into the cache, which is mapped. `begin`: as in `load`.

    Raises DataError, naming the file, for a damaged image, one of another size, of more than 4,096 pixels a side or of
    16 bits a channel, for a requested part without images, a class without training images, and if the disk
    has no room for the cache.
    """
    try:
        parts, notes = _parts(listing, path, request)
        labels, numbers, told = _labels(parts, listing, path, request)
        order = _arranged(parts, numbers, path, request)
        kept = request.cache and (request.images is None or "train" in order)
        every_y = {part: torch.tensor([numbers[entry.label] for entry in own]) for part, own in order.items()}
        counts = counted(every_y, labels)
        drawn = None if request.images is None else fixed_order(len(order["test"]))[: request.images]
        if drawn is not None and not kept:
            order["test"] = [order["test"][at] for at in drawn.tolist()]
        every = [entry for own in order.values() for entry in own]
        tell = functools.partial(_announce, begin, name, every_y, len(labels))
        found = _pixels(listing, every, len(order.get("train", ())), path, request, kept, progress, tell)
    except UserError as error:
        raise DataError(str(error)) from error
    left_out = _tell(parts, listing, labels, path, found.animated, told=bool(told))
    y = torch.tensor([numbers[entry.label] for entry in every])
    sizes = [len(own) for own in order.values()]
    identity = _identity(listing, every, y, sizes, len(labels), found, request)
    if request.identify:
        identity = _files_hash(listing, path)
    else:
        given, names = [labels[at] for at in y.tolist()], [entry.member for entry in every]
        tell_shared(_keys(found, by_file=bool(identity)), given, sizes[-1], names, path)
    splits = dict(zip(order, map(Split, torch.split(found.x, sizes), torch.split(y, sizes)), strict=True))
    if drawn is not None and kept:
        splits["test"] = take(splits["test"], drawn)
    extra = sorted(kind for kind in found.lossy if kind not in name.lower())
    notes += [f"{path}: {note}" for note in (told, f"{request.geometry or ''}", counts) if note]
    made = from_splits(
        "-".join([name, *extra]), splits.get("train"), splits.get("valid"), splits["test"], classes=len(labels),
        class_names=labels, drawn=drawn, notes=notes, counts=found.counts, identity=identity,
    )  # fmt: skip
    return replace(made, left_out=left_out)


def _keys(found: Decoded, *, by_file: bool) -> list[Hashable]:
    """Return a key of each image, equal for equal pixels, or for equal files if there are many or none is decoded."""
    if found.hashes is not None and (by_file or isinstance(found.x, Undecoded)):
        return [row.tobytes() for row in found.hashes]
    return [hash(image.numpy().tobytes()) for image in found.x]


def _announce(begin: Begin | None, name: str, every_y: dict[str, torch.Tensor], classes: int, how: Rows) -> None:
    """Tell of a set before its images are decoded: all of them are one that is drawn at random."""
    if begin is None or not how.trained:
        return
    image = torch.randint(256, (1, *how.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(0, dtype=torch.int64)
    train, valid, test = (Split(image.expand(len(y), -1, -1, -1), y) for y in (every_y.get(p, none) for p in SPLITS))
    begin(Dataset(name, train, valid, test, classes, (0.5,) * how.shape[0], (0.25,) * how.shape[0]))


def _arranged(
    parts: dict[str, list[Entry]], numbers: dict[str, int], path: Path, request: Request
) -> dict[str, list[Entry]]:
    """Return the images of each part in balanced order, some held out for validation, no more than requested."""
    order = {part: _ordered(own, numbers) for part, own in parts.items()}
    if "train" in order and "valid" not in order:
        every = order["train"]
        labels = torch.tensor([numbers[entry.label] for entry in every])
        kept, held = hold_out(Split(torch.arange(len(every)), labels), seed=request.valid_seed)
        if len(held.y) == 0 and request.parts == "all":
            raise DataError(
                f"{path} has one image per class in train/; add more images, or add images in valid/<class>/"
            )
        order["train"], valid = ([every[at] for at in part.x.tolist()] for part in (kept, held))
        order |= {"valid": valid} if valid else {}
    limits = dict(request.limit)
    return {part: order[part][: limits.get(part)] for part in SPLITS if part in order}


def _pixels(
    listing: Listing, every: list[Entry], trained: int, path: Path, request: Request, kept: bool,
    progress: Progress | None, tell: Callable[[Rows], None],
) -> Decoded:  # fmt: skip
    """Decode images: as grey only if all images of the set are grey, including undecoded ones, by their headers."""
    how = Rows(path, (request.channels or 1, 0, 0), request.geometry, trained)
    how = rows_like_first(listing.source, every, how)
    lazy = not request.cache and request.images is None
    found = decoded(listing.source, every, how, kept=kept, progress=progress, lazy=lazy, begin=tell)
    if found.x.shape[1] == 1:
        seen = {entry.place for entry in every}
        others = [entry for entry in (*listing.entries, *listing.flat) if entry.place not in seen]
        if any_coloured(listing.source, others):
            how = replace(how, shape=(3, *how.shape[1:]))
            return decoded(listing.source, every, how, kept=kept, progress=progress, lazy=lazy)
    return found


def _identity(
    listing: Listing, every: list[Entry], y: torch.Tensor, sizes: list[int], classes: int, found: Decoded,
    request: Request,
) -> str:  # fmt: skip
    """Return the hash of a large set's files, labels and preparation; "" for a set that is identified by its pixels.

    Also of how many training images give the mean and deviation, if not all do.
    """
    if found.x.numel() <= PIXELS:
        return ""
    hashes = hashes_of(listing.source, every) if found.hashes is None else found.hashes
    measured = 0 if found.counts is None else int(found.counts[0].sum()) // math.prod(found.x.shape[2:])
    what = [classes, sizes, list(found.x.shape[1:]), str(request.geometry and replace(request.geometry, source=""))]
    what += [measured] if 0 < measured < sizes[0] else []
    digest = hashlib.sha256(canonical_json([what, decoders()]).encode())
    for array in (y.numpy(), hashes):
        digest.update(array.data)
    return digest.hexdigest()


def _files_hash(listing: Listing, path: Path) -> str:
    """Return the hash of all files of a set, with their parts and labels; none is decoded."""
    every = sorted(listing.entries or listing.flat, key=lambda entry: entry.place)
    digest = hashlib.sha256(canonical_json([[entry.part, entry.label] for entry in every]).encode())
    digest.update(known_hashes(listing.source, every, path).data)
    return digest.hexdigest()


def _parts(listing: Listing, path: Path, request: Request) -> tuple[dict[str, list[Entry]], list[str]]:
    """Return the images of each requested part, and which part replaces another; refuse ambiguous layouts."""
    if len(listing.roots) > 1:
        raise DataError(f"{path} contains several data sets ({', '.join(sorted(listing.roots))}); give one of them")
    twice = sorted(part for part in listing.named_parts if PARTS[part] == "valid")
    if len(twice) > 1:
        raise DataError(f"{path} has {'/ and '.join(twice)}/, which have the same meaning; keep one of them")
    parts = {part: [entry for entry in listing.entries if entry.part == part] for part in SPLITS}
    parts, notes = {part: own for part, own in parts.items() if own}, []
    if request.parts != "all" and not parts and not listing.folders and listing.flat:
        places = {entry.member.rpartition("/")[0].rpartition("/")[0] for entry in listing.flat}
        almost = sorted(name for place in places for name in place.split("/") if name.lower() in ALMOST)
        if almost and listing.by_folders:
            raise DataError(f"{path} has {almost[0]}/; rename it to {ALMOST[almost[0].lower()]}/")
        if len(places) > 1 and listing.by_folders:
            raise DataError(f"{path} has class folders at several depths; move them to {path}/test/")
        parts, notes = {"test": listing.flat}, [f"{path} has no splits: all its images are test images"]
        listing.outside = [name for name in listing.outside if name not in {entry.member for entry in listing.flat}]
    if request.parts != "all" and "test" not in parts and parts:
        lent = "valid" if "valid" in parts else "train"
        shown = next(iter(twice), lent) if lent == "valid" else lent
        parts["test"] = parts[lent] if lent == "train" else parts.pop(lent)
        notes.append(
            f"{path} has no test/; the images of {shown}/ are used as test images"
            + (", which a network may have been trained on" if lent == "train" else "")
        )
    for part in ("train", "test") if request.parts == "all" else ("test",):
        if part not in parts:
            few = _UNTRAINED if part == "train" else ""
            place = listing.layout.format(part=part)
            raise DataError(f"{path} has no images in {place}{_instead(listing, path)}; put some there{few}")
    return ({"test": parts["test"]} if request.parts == "test" else parts), notes


def _instead(listing: Listing, path: Path) -> str:
    """Return a sentence on what was found instead of the missing images."""
    others = sorted([*listing.outside, *listing.nested, *listing.skipped])[:3]
    told = [f"only {', '.join(others)}"] if others else []
    told += [f"{len(names)} {why} ({names[0]}, ...)" for why, names in listing.left.items()]
    inner = [one for one in path.iterdir() if any((one / part).is_dir() for part in PARTS)] if path.is_dir() else []
    told += [f"is it {one}?" for one in inner]
    return "".join(f", {one}" for one in told)


def _labels(
    parts: dict[str, list[Entry]], listing: Listing, path: Path, request: Request
) -> tuple[list[str], dict[str, int], str]:
    """Return the classes' names, the number of each label, and their source; refuse what would shift or lose one."""
    trained = {label for part, label in listing.folders if part == "train"}
    present = {label for _, label in listing.folders} or {entry.label for entry in parts["test"]}
    if request.classes is not None and not listing.numbered and not (listing.named and request.classes.fallback):
        try:
            numbers, told = request.classes.numbers(present)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        return list(request.classes.names), numbers, told
    if listing.numbered:
        return _numbered(present, path, request)
    labels = listing.named or sorted(trained or present)
    if len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise DataError(f"the list of classes in {path} names '{twice}' twice; give each class its own name")
    filled = {entry.label for entry in listing.entries if entry.part == "train"}
    for part, label in sorted(listing.folders):
        if label not in labels:
            place = "the list of classes does not name it" if listing.named else "not in train/"
            raise DataError(f"{path} has the class '{label}' in {part}/ but {place}")
        if part == "train" and label not in filled:
            raise DataError(
                f"{path} has no readable image in train/{label}/; put some there, or remove the folder (which "
                f"without {CLASSES} changes the labels of the classes after it)"
            )
    if missing := sorted(present - set(labels)):
        raise DataError(f"{path} has the class '{missing[0]}' but the list of classes does not name it")
    return labels, {label: at for at, label in enumerate(labels)}, ""


def _numbered(present: set[str], path: Path, request: Request) -> tuple[list[str], dict[str, int], str]:
    """Return the result of `_labels` if labels are numbers: of the listed classes, else from 0 to the last."""
    numbers, listed = {label: int(label) for label in present}, request.classes
    found, last = sorted(set(numbers.values())), max(numbers.values())
    whole = last == len(found) - 1
    if listed is not None and not (listed.fallback and whole):
        if last >= len(listed.names):
            raise DataError(f"{path} has the label {last}, but {listed.source} names {len(listed.names)} classes")
        return list(listed.names), numbers, f"labels are taken as the numbers of {listed.source}'s classes"
    if not whole:
        shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise DataError(f"{path} must hold every label from 0 to the last, but holds {shown}; give --classes FILE")
    return list(map(str, found)), numbers, ""


def _tell(
    parts: dict[str, list[Entry]],
    listing: Listing,
    labels: list[str],
    path: Path,
    animated: Sequence[str],
    *,
    told: bool,
) -> dict[str, tuple[str, ...]]:
    """Return ignored files, ignored frames, and classes that a split lacks, by reason, and warn of them."""
    found = {
        **listing.left,
        "listed more than once": _repeated(parts),
        "ignored because they are not images": listing.skipped,
        "images outside of train/, valid/ and test/, not read": listing.outside,
        "folders within a class's folder, not read": sorted(listing.nested),
        "of several frames only the first was read": list(animated),
    }
    listed = told or bool(listing.named)
    if not listed:
        found[f"not read as lists of classes; {CLASSES} is, and so is the file of --classes"] = listing.lists
    for part in SPLITS[1:]:
        present = {entry.label for entry in parts.get(part, ())}
        if present and not listed:
            found[f"classes without images in {part}/"] = [label for label in labels if label not in present]
    if not listed and labels != sorted(labels, key=_as_counted):
        found[
            f"classes are in the order of their names as text, with 10 before 2; {CLASSES} can give another order"
        ] = labels
    left_out = {what: tuple(sorted(names)) for what, names in found.items() if names}
    for what, every in left_out.items():
        shown = ", ".join(every[:3]) + (", ..." if len(every) > 3 else "")
        warnings.warn(f"{path}: {what}: {len(every)} ({shown})", DataWarning, stacklevel=4)
    return left_out


def _repeated(parts: dict[str, list[Entry]]) -> list[str]:
    """Return names that several images share."""
    names = list({entry.place: entry.member for own in parts.values() for entry in own}.values())
    return [] if len(set(names)) == len(names) else [name for name, count in Counter(names).items() if count > 1]


def _as_counted(label: str) -> list[str | float]:
    """Return a key that sorts "2" before "10", and numbers by their value."""
    if NUMBER.fullmatch(label):
        return ["", float(label)]
    return [float(part) if part.isdecimal() else part for part in re.split(r"(\d+)", label)]


def _ordered(entries: list[Entry], numbers: dict[str, int]) -> list[Entry]:
    """Return images in balanced order."""
    entries = sorted(entries, key=lambda entry: (entry.label, entry.member.rpartition("/")[2]))
    order, _ = balanced_order(torch.tensor([numbers[entry.label] for entry in entries]))
    return [entries[at] for at in order.tolist()]
