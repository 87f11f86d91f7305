"""Open the data and models that a command names; downloads show a progress bar."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import data, deploy
from ..data import EVERYTHING, SPLITS, Dataset, Geometry, Preparation, Request, as_float
from ..devices import Place, place_of
from ..errors import UnknownNameError, UserError
from ..files import check_writable, conversion
from ..graph import GraphModule, from_onnx
from ..memory import Need, check_room, free_memory
from ..models import (
    MODELS,
    Blueprint,
    HubModel,
    describe,
    is_hub_name,
    load_hub_weights_,
    load_model,
    load_weights_,
    read_blueprint,
    read_weights,
    takes_moments,
)
from ..study import check_fit, is_untrained
from ._app import DataSource, ModelSource, StudySource, Where
from ._progress import shown_bytes, shown_images

# Extensions of files that contain a whole model: saved for further work, packed for deployment, or from elsewhere.
PACKED, ONNX = ".sparring", ".onnx"
_STEPS = 4  # of opening a model: build it, read its weights, try it, and see whether it is trained
COPIES = 5  # of all images, that an attack holds at a time beside its results
SAVED = (".safetensors", PACKED, ONNX)


def check_out(path: Path, *endings: str) -> None:
    """Raise UserError, before any work, for a file that cannot be written or has another extension."""
    if path.suffix not in endings:
        raise UserError(f"{path} must end in {' or '.join(endings)}")
    check_writable(path)


def open_data(
    source: DataSource, request: Request = EVERYTHING, *, begin: Callable[[Dataset], str] | None = None
) -> Dataset:
    """Load a data set and print how it was prepared; raise as `data.load` does.

    What `begin` says of a large set, before its images are decoded, is printed.
    """
    dataset = _loaded(source, request, begin)
    for note in dataset.notes:
        print(note, file=sys.stderr)
    for why, names in dataset.left_out.items() if source.verbose else ():
        print(f"{why}:", *names, sep="\n  ", file=sys.stderr)
    if request.parts == "all" and not len(dataset.train.x):
        raise UserError(
            f"'{dataset.name}' has no training images, so it can be used to attack a network but not to train one"
        )
    if request.parts == "all":
        data.check_classes(dataset)
    return dataset


def _loaded(source: DataSource, request: Request, begin: Callable[[Dataset], str] | None) -> Dataset:
    def tell(dataset: Dataset) -> None:
        if begin is not None and (said := begin(dataset)):
            print(said, file=sys.stderr, flush=True)

    with shown_bytes() as progress:
        return data.load(
            source.data, source.data_dir, request=request, download=source.download, progress=progress, begin=tell
        )


def request_for(
    models: Sequence[ModelSource], source: DataSource, *, training: bool = False, images: int | None = None
) -> Request:
    """Return what to read of a data set for some models: as the options say, else by the defaults of their libraries.

    With `images` only so many test images are read, and others only if a model needs their mean and std. Raise
    UserError if two models prepare images in different ways.
    """
    kind, prepared = data.kind_of(source.data, source.data_dir), Preparation(**preparation(source))
    known = {model.model: facts for model in models if (facts := _configuration(model)) is not None}
    listed = None if source.classes is None else data.read_classes(source.classes)
    if listed is None and kind in ("images", "arrays"):
        named = ((name, facts) for name, facts in known.items() if facts.labels)
        own = (data.ClassList(facts.labels, f"'{name}'", facts.ids, fallback=True) for name, facts in named)
        listed = next(own, None)
    if listed is None and kind == "images":
        for name in known:
            print(f"'{name}' does not name its classes; labels follow the order of the folders", file=sys.stderr)
    parts: Literal["all", "any", "test"] = "all" if training else "any"
    if images is not None and not any(map(_needs_moments, models)):
        parts = "test"
    colour = any(len(facts.mean) == 3 for facts in known.values())
    geometry = _geometry(prepared, known if kind == "images" else {})
    channels, limits = 3 if colour else None, prepared.limits()
    return Request(parts, images, geometry, listed, channels, not source.no_cache, limits)


def _configuration(model: ModelSource) -> HubModel | None:
    """Return a library's configuration of a network with its own weights, or with those that were pruned from them."""
    name, weights = model.named()
    if name.endswith(".safetensors"):
        blueprint = read_blueprint(name)
        if not is_hub_name(blueprint.name):
            return None
        facts = describe(blueprint.name)
        return facts if (blueprint.shape[1:], blueprint.classes) == (facts.size, facts.classes) else None
    return describe(name) if is_hub_name(name) and weights is None else None


def _geometry(prepared: Preparation, known: Mapping[str, HubModel]) -> Geometry | None:
    made, (side, crop), said = {}, prepared.sizes(), prepared.interpolation
    for name, facts in known.items():
        if facts.resize is None and side is None:
            raise UserError(f"'{name}' does not say how it prepares images; give --resize and --crop")
        own = None if side or crop or said else f"'{name}'"
        made[Geometry(side or facts.resize, crop or facts.size, said or facts.interpolation, own or "")] = name
    if len(made) > 1:
        names = " and ".join(map(repr, made.values()))
        raise UserError(f"{names} prepare images differently; give --resize, --crop, --interpolation")
    return next(iter(made)) if made else prepared.request().geometry


def preparation(source: DataSource | StudySource) -> dict[str, Any]:
    """Return a command's options for images as the table of a plan."""
    limits: dict[str, int] = {}
    for text in source.limit or ():
        split, _, count = text.rpartition("=")
        if not count.isdecimal():
            raise UserError(f"--limit takes N or SPLIT=N, such as train=2000, not '{text}'")
        limits |= dict.fromkeys([split] if split else SPLITS, int(count))
    classes = None if source.classes is None else str(source.classes)
    said = {"resize": source.resize, "crop": source.crop, "interpolation": source.interpolation, "classes": classes}
    return {name: value for name, value in {**said, "limit": limits}.items() if value}


def _needs_moments(model: ModelSource) -> bool:
    """Return whether a network is built with the mean and std of its data."""
    name, _ = model.named()
    if is_code(name):
        return model.mean is None and takes_moments(name)
    return not (name.endswith(SAVED) or is_hub_name(name))


def open_both(
    model: ModelSource,
    source: DataSource,
    *,
    plain: bool = False,
    images: int | None = None,
    beside: ModelSource | None = None,
    identify: bool = False,
) -> tuple[nn.Module, Dataset]:
    """Return a model in eval mode and its data; raise UserError, before reading data, if the model cannot be opened.

    `plain`: in a form that can be analysed. `images`: read only so many test images of a folder. `beside`: a
    model that gets the same data. `identify`: as in `Request`.
    """
    models = [model] if beside is None else [model, beside]
    for one in models:
        check_named(one)
    dataset = open_data(source, replace(request_for(models, source, images=images), identify=identify))
    network = open_model(model, dataset, download=source.download)[0].eval()
    say_few(dataset, images)
    return plain_form(network) if plain else network, dataset


def say_few(dataset: Dataset, asked: int | None) -> None:
    """Print that a command takes fewer images than it was asked to, if the data have no more."""
    found = len(dataset.test.x)
    if asked is not None and found < asked:
        print(f"{dataset.name} has {found:,} test images, fewer than {asked:,}: all are used", file=sys.stderr)


def place_for(where: Where, source: ModelSource) -> Place:
    """Return where a model runs; raise UserError, before anything is read, if it cannot run there."""
    if not source.model.endswith(PACKED):
        return place_of(where.device, where.dtype)
    if where.device not in ("auto", "cpu") or where.dtype is not None:
        raise UserError(
            f"{source.model} runs on the CPU, in the number format that it was packed in; drop --device and --dtype"
        )
    return Place()


def plain_form(model: nn.Module) -> nn.Module:
    """Return a model that can be analysed: for an artefact the same rounded network in torch's own modules."""
    if not isinstance(model, deploy.PackedModule):
        return model
    if model.packed.program.rounding:
        raise UserError(
            "this artefact rounds activations, which only its own kernels do; give the network that it was exported "
            "from, or export that with --activations fp32"
        )
    return model.equivalent


def open_model(source: ModelSource, dataset: Dataset, *, download: bool = False) -> tuple[nn.Module, Blueprint]:
    """Return a model and its blueprint; a user's factory may have frozen parts of it, which stay in eval mode.

    An artefact is attacked as it is shipped, on its kernels. A library's network has its trained weights, which are
    fetched with `download`. Raise UserError if the model does not accept the data's images or has another number of
    classes.
    """
    with shown_images("steps", name := "opening the model") as tell:
        model, blueprint, notes = _opened(source, dataset, download, functools.partial(tell, name))
    for note in notes:
        print(note, file=sys.stderr)
    return model, blueprint


def _opened(
    source: ModelSource, dataset: Dataset, download: bool, tell: Callable[[int, int], None]
) -> tuple[nn.Module, Blueprint, list[str]]:
    name, weights = source.named()
    model: nn.Module
    notes = list[str]()
    if name.endswith(PACKED):
        model, blueprint = deploy.PackedModule(deploy.load(name)), blueprint_for(source, dataset)
    elif name.endswith(ONNX):
        model, blueprint = GraphModule(from_onnx(name)), blueprint_for(source, dataset)
    elif name.endswith(SAVED):
        model, blueprint, _ = load_model(name)
    else:
        blueprint = blueprint_for(source, dataset)
        copies = 2 if is_code(name) and weights is None else 1  # two are compared to see whether it is trained
        check_room(blueprint.build, copies, f"'{name}'")
        model = blueprint.build()
        tell(1, _STEPS)
        notes += [f"{weights or name}: {note}" for note in _put_weights_(model, blueprint, weights, download)]
    tell(2, _STEPS)
    check_fit(model, dataset)
    tell(3, _STEPS)
    return model, blueprint, [*notes, *_assumed(source, model, blueprint)] if is_code(name) else notes


def _put_weights_(model: nn.Module, blueprint: Blueprint, weights: Path | None, download: bool) -> tuple[str, ...]:
    if weights is not None:
        return load_weights_(model, read_weights(weights))
    if is_hub_name(blueprint.name):
        load_hub_weights_(model, blueprint.name, classes=blueprint.classes, download=download)
    return ()


def _assumed(source: ModelSource, model: nn.Module, blueprint: Blueprint) -> Iterator[str]:
    """Yield warnings: of random weights, and of trained ones with the mean and std of other images."""
    name, weights = source.named()
    if weights is None and is_untrained(model, blueprint.build(seed=1)):
        what = "has random weights, so these results are of an untrained network; give --weights to load trained ones"
        yield f"warning: '{name}' {what}"
    elif weights is not None and source.mean is None and takes_moments(name):
        what = f"uses the mean and std of {blueprint.data}; if it was trained with others, give --mean and --std"
        yield f"warning: '{name}' {what}"


def say_fresh(name: str, weights: str | None = None) -> None:
    """Warn if training starts from scratch although the network's name may suggest that it is trained."""
    if is_hub_name(name) and weights is None:
        print(f"warning: '{name}' starts from random weights, not from its library's trained ones", file=sys.stderr)


def float_images(x: Tensor, *, results: int) -> Tensor:
    """Return uint8 images as floats; raise UserError where they and the images of so many results do not fit."""
    held = Need(0, (COPIES + results) * x[:1].numel() * torch.float32.itemsize)
    held.check(len(x), free_memory(), "keeping images and what attacks make of them")
    return as_float(x)


def file_of(source: ModelSource) -> Path | None:
    """Return the file that holds a model's weights, if there is one."""
    name, weights = source.named()
    return Path(name) if name.endswith(SAVED) else weights


def check_named(source: ModelSource) -> None:
    """Raise UserError, before data are read, for a model that cannot be opened: no such name or file, or no weights."""
    (name, weights), file = source.named(), file_of(source)
    if name.endswith(SAVED) and weights is not None:
        raise UserError("a model file contains its weights; give either a model file or --weights")
    if file is not None and not file.is_file():
        raise UserError(f"{file} {'is a folder, not a file' if file.is_dir() else 'does not exist'}; check the path")
    if (source.mean is None) != (source.std is None):
        raise UserError("--mean and --std must be given together")
    if source.mean is not None and not (is_code(name) and takes_moments(name)):
        raise UserError(f"'{name}' has its own normalisation; --mean and --std need a factory that takes them")
    if is_hub_name(name):
        describe(name)
    if name.endswith(SAVED) or ":" in name:
        return
    if Path(name).is_file():
        raise UserError(f"{name} is not a sparring model file ({', '.join(SAVED)}); {conversion(name)}")
    if name not in MODELS and ("/" in name or Path(name).suffix):
        raise UserError(f"{name} {'is a folder, not a model file' if Path(name).is_dir() else 'does not exist'}")
    if name not in MODELS:
        raise UnknownNameError("model", name, MODELS)
    if weights is None:
        raise UserError(f"'{name}' names an architecture without weights; give --weights FILE or a model file")


def check_seconds(seconds: float) -> None:
    """Raise UserError for a time budget in which nothing can be done."""
    if not seconds > 0:
        raise UserError(f"--seconds must be above 0, not {seconds:g}")


def is_code(name: str) -> bool:
    """Return whether a model's name is that of a user's factory."""
    return ":" in name and not is_hub_name(name)


def blueprint_for(source: ModelSource, dataset: Dataset) -> Blueprint:
    """Return the blueprint of a named model for a data set; its factory gets the data's mean and std or its own."""
    shape = tuple(dataset.test.x.shape[1:])
    if not dataset.mean and _needs_moments(source):
        way = "give --mean and --std" if is_code(source.named()[0]) else "use the model file that sparring train wrote"
        raise UserError(
            f"'{source.model}' needs the mean and std of its training images, which {dataset.name} does not have; {way}"
        )
    mean, std = (
        own or (neutral,) * shape[0] if text is None else parse_moments(text, shape[0], least=least)
        for text, own, neutral, least in ((source.mean, dataset.mean, 0.0, 0.0), (source.std, dataset.std, 1.0, 1e-4))
    )
    return Blueprint(source.named()[0], shape, dataset.classes, mean, std, data=dataset.name)


def parse_moments(text: str, channels: int, *, least: float) -> tuple[float, ...]:
    """Return a mean or standard deviation by channel from "0.5,0.5,0.5"; raise UserError for anything else."""
    try:
        moments = tuple(float(part) for part in text.split(","))
    except ValueError:
        moments = ()
    if len(moments) != channels or not all(least <= value <= 1 for value in moments):
        raise UserError(
            f"--mean and --std take {channels} numbers in [{least:g}, 1], separated by commas, not '{text}'"
        )
    return moments
