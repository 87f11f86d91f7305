"""WebDataset shards: tar files of KEY.jpg with KEY.cls or KEY.json."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import DataError
from ...files import safe_members
from ._listing import MOST_BYTES, MOST_MEMBERS, Listing, Packed, is_image, part_of

TARS = (".tar", ".tar.gz", ".tgz")
SAID = (".cls", ".json")  # extensions of images; the first one found counts
KEYS = ("label", "cls", "class")
LOOKED = 100  # members after which a tar without labels is not a shard


def is_shard(path: Path) -> bool:
    """Return whether a tar has labels beside its images, by its first members."""
    count = itertools.count()
    first = safe_members(
        path,
        wanted=lambda name: name.lower().endswith(SAID) or (next(count) > LOOKED and not name.endswith("/")),
        max_bytes=MOST_BYTES,
        max_files=MOST_MEMBERS,
    )
    return next(first, ("", b""))[0].lower().endswith(SAID)


def list_shards(archives: Mapping[str, Path], where: Path, named: Sequence[str] = ()) -> Listing:
    """List the images of some shards, by name, with the label beside each; no image is read.

    `named` are the classes that numbers stand for. Raise DataError for an invalid label.
    """
    if odd := [name for name in archives if "#" in name]:
        raise DataError(f"{odd[0]} in {where} has a '#' in its name; rename it")
    source = Packed(archives)
    listing = Listing(source, named=list(named), layout="shards called {part}-*.tar")
    images: dict[str, tuple[int, str]] = {}
    labels: dict[str, tuple[int, str]] = {}

    def wanted(member: str) -> bool:
        listing.count += 1
        key, ending = _parts(member)
        if is_image(member) and "." not in ending[1:]:
            if key in images:
                listing.leave("images whose name another has", member)
            images.setdefault(key, (listing.count, member))
        elif not (member.endswith("/") or ending in SAID):
            listing.leave("members that are neither images nor labels", member)
        return ending in SAID

    for member, data in source.members(wanted):
        key, ending = _parts(member)
        rank = SAID.index(ending)
        if key not in labels or rank < labels[key][0]:
            labels[key] = rank, _label(data, ending, f"{member} in {where}")
    for key, (place, member) in images.items():
        part = part_of(member.partition("#")[0]) if "#" in member else part_of(where.name)
        listing.add(part, labels.get(key, (0, ""))[1], member, place)
    listing.settle()
    return listing


def _parts(member: str) -> tuple[str, str]:
    """Return the key that an image and its label share, and the extension: all from the first dot of the name."""
    name = re.split("[/#]", member)[-1]
    ending = name[len(name.partition(".")[0]) :]
    return member[: len(member) - len(ending)], ending.lower()


def _label(data: bytes, ending: str, where: str) -> str:
    try:
        text = data.decode()
        if ending == ".json":
            said = json.loads(text)
            found = [said[key] for key in KEYS if key in said] if isinstance(said, dict) else [said]
            text = str(found[0]) if found and isinstance(found[0], int | str) else ""
        return text.strip()
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} holds no label ({str(error)[:100]}); a .cls is a number or a name in UTF-8"
        ) from error
