"""The table of data sets, and the function that loads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import DataError, UnknownNameError, UserError, told
from ..files import safe_name
from ..plugins import import_object
from ._images import Begin, load_images
from ._places import Content, Find, Progress, Source, expand, is_file, is_folder, locate, missing, read, roots
from ._places import download as fetch
from ._request import EVERYTHING, Request
from ._types import Dataset, limited, tell_shared
from .formats._known_sets import CIFAR10, FASHION_MNIST, MNIST, cifar10, digits, fashion_mnist, mnist, mnist_5k
from .formats._listing import PARTS, Listing, list_folder, part_of, walk
from .formats._npz import load_arrays
from .formats._shards import TARS, is_shard, list_shards
from .formats._tables import COLUMNAR, list_columns, list_csv

DATASETS: dict[str, Callable[[Find], Dataset]] = {
    "cifar10": cifar10,
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "mnist-5k": mnist_5k,
}

SOURCES = (CIFAR10, FASHION_MNIST, MNIST)
PACKED = (".zip", *TARS, ".npz", *COLUMNAR, ".csv")  # forms of a user's own data, besides a folder


class Available(NamedTuple):
    """A data set on this machine, and its place ("" if it is part of a package)."""

    name: str
    where: str


def kind_of(name: str, root: Path | str | None = None) -> Literal["known", "function", "arrays", "images"]:
    """Return how `load` interprets a name; raise as it does if there is no such data set."""
    if name in DATASETS:
        return "known"
    if ":" in name and not expand(name).exists():
        return "function"
    return "arrays" if _locate_users(name, roots(root)).suffix.lower() == ".npz" else "images"


def load(
    name: str, root: Path | str | None = None, *, request: Request = EVERYTHING, download: bool = False,
    progress: Progress | None = None, begin: Begin | None = None,
) -> Dataset:  # fmt: skip
    """Load a data set by its name in `DATASETS`, by a path, or from a user's function "package.module:function".

    A path is a folder, zip or tar of images, of Parquet or Arrow files or of tar shards, a CSV of paths, or an .npz.

    Files and names are searched in `root`, $SPARRING_DATA, the user's cache folder and known system folders, in that
    order. With `download`, missing files are downloaded from public servers into the first of these. `progress` reports
    downloads, and images that are decoded into the cache. `request` says what is read of a user's files, and how.
    `begin` is called with a stand-in, in which all images are one and the same, before a large set with training images
    is decoded, and may refuse it. A user's file never gets the name of a built-in set; "-user" is added.

    Raises DataError if files are missing (with a list of names and places), damaged, mislabelled or of a wrong shape,
    and UnknownNameError if there is no such data set.
    """
    places = roots(root)

    def find(source: Source) -> list[Content]:
        paths = locate(source, places)
        if paths is None and download:
            fetch(source, places[0] / source.folders[0], progress)
            paths = locate(source, places)
        if paths is None:
            raise missing(source, places)
        return read(source, paths)

    kind = kind_of(name, root)
    if request.geometry is not None and kind != "images":
        raise DataError(f"'{name}' contains arrays, not images; only images can be resized and cropped")
    if request.classes is not None and kind in ("known", "function"):
        raise DataError(f"'{name}' has its own classes; a list of classes applies only to image and array files")
    if request.valid_seed is not None and kind in ("known", "function"):
        raise DataError(f"'{name}' has its own validation images; omit valid_seed")
    if kind in ("known", "function"):
        dataset = DATASETS[name](find) if kind == "known" else _from_function(name)
        return limited(dataset, request.limit) if request.limit else dataset
    path = _locate_users(name, places)
    if kind == "arrays":
        dataset = load_arrays(path, _label(path), request)
        dataset = limited(dataset, request.limit) if request.limit else dataset
        _tell_shared(dataset, path)
        return dataset
    return load_images(path, _label(path), request, progress, listing=_listed(path), begin=begin)


def _listed(path: Path) -> Listing:
    """List a user's images, in any supported form."""
    try:
        name = path.name.lower()
        if name.endswith(COLUMNAR):
            return list_columns(path.parent, [path.name])
        if name.endswith(".csv"):
            return list_csv(path.parent, [path.name])
        if name.endswith(TARS) and is_shard(path):
            return list_shards({"": path}, path)
        listing = list_folder(path)
        return listing if listing.entries or not path.is_dir() else _listed_files(path, listing)
    except DataError:
        raise
    except UserError as error:
        raise DataError(str(error)) from error


def _listed_files(path: Path, listing: Listing) -> Listing:
    """List the tables or shards of a folder, if it has any; else its class folders."""
    files = [name for name in walk(path, "", 3) if not name.rpartition("/")[2].startswith((".", "cache-", "tmp"))]
    tables, shards = ([name for name in files if name.lower().endswith(ends)] for ends in (COLUMNAR, TARS))
    lists = [name for name in files if name.lower().endswith(".csv")]
    texts = [name for name in lists if part_of(name)]
    if lists and not (texts or tables or shards):
        found = "folders of images" if listing.flat else "no folders of classes in train/ or test/"
        raise DataError(
            f"{path} has {found}, and {lists[0]}: give {path / lists[0]} if that has the images' labels, or move "
            f"folders that are classes into {path}/test/"
        )
    if tables and shards:
        raise DataError(f"{path} holds tables ({tables[0]}, ...) and shards ({shards[0]}, ...); give one set at a time")
    if tables:
        return list_columns(path, tables)
    if shards and not listing.flat:
        return list_shards({name: path / name for name in sorted(shards)}, path, listing.named)
    return list_csv(path, texts, listing.named) if texts else listing


def _tell_shared(dataset: Dataset, path: Path) -> None:
    parts = (("training", dataset.train), ("validation", dataset.valid), ("test", dataset.test))
    keys = [hash(image.numpy().tobytes()) for _, split in parts for image in split.x]
    names = dataset.class_names or list(map(str, range(dataset.classes)))
    labels = [names[at] for _, split in parts for at in split.y.tolist()]
    tell_shared(keys, labels, len(dataset.test.y), [f"a {part} image" for part, split in parts for _ in split.y], path)


def _from_function(name: str) -> Dataset:
    function = import_object(name)
    try:
        dataset = function()
    except UserError:
        raise
    except Exception as error:  # a user's own code may raise anything
        raise DataError(f"the function '{name}' fails: {told(error)}") from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"'{name}' returned {type(dataset).__name__}, not a Dataset; make one with data.from_splits")
    return dataset


def _locate_users(name: str, places: list[Path]) -> Path:
    candidates = [expand(name), *(place / (name + end) for place in places for end in ("", *PACKED))]
    for path in candidates:
        if name and (is_folder(path) or (is_file(path) and path.name.lower().endswith(PACKED))):
            return path
    if name and is_file(candidates[0]):
        raise DataError(f"{name} is not one of {', '.join(PACKED)}; pack images as a zip, or arrays by numpy.savez")
    if "/" in name or name.lower().endswith(PACKED):
        raise DataError(f"there is no folder or {', '.join(PACKED)} file called {name[:200]}; check the path")
    raise UnknownNameError("data set", name, DATASETS)


def _label(path: Path) -> str:
    name = path.resolve().name
    for end in PACKED:
        name = name[: -len(end)] if name.lower().endswith(end) else name
    return safe_name(f"{name}-user" if name.lower() in DATASETS else name)


def available(root: Path | str | None = None) -> list[Available]:
    """Return the data sets that can be loaded without a download, and their places, without reading them."""
    places = roots(root)
    paths = {source.name: locate(source, places) for source in SOURCES}
    found = [Available(name, "") for name in DATASETS if name not in paths]
    found += [Available(name, str(files[0].parent)) for name, files in paths.items() if files]
    for path in (path for place in places for path in sorted(place.glob("*"))):
        if any(is_folder(path / part) for part in PARTS) or (is_file(path) and path.name.endswith((".zip", ".npz"))):
            with contextlib.suppress(UserError):  # its name could not be a file's name in an output folder
                found.append(Available(_label(path), str(path)))
    return found
