"""Open what a command names: data, with a progress bar while something is downloaded, and models."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from .. import data, deploy
from ..data import Dataset
from ..errors import UnknownNameError, UserError
from ..files import check_writable, conversion
from ..models import (
    MODELS,
    Blueprint,
    describe,
    is_hub_name,
    load_hub_weights_,
    load_model,
    load_weights_,
    read_weights,
    takes_moments,
)
from ..study import check_fit
from ._app import DataSource, ModelSource

# How files end that hold a whole model: saved by us for further work, or packed for shipping.
SAVED, PACKED = (".safetensors", ".sparring"), ".sparring"


def check_out(path: Path, *endings: str) -> None:
    """Raise UserError, before any work, for a file that could not be written or, by its ending, not be read later."""
    if path.suffix not in endings:
        raise UserError(f"{path} must end in {' or '.join(endings)}")
    check_writable(path)


def open_data(source: DataSource) -> Dataset:
    """Load a data set; raise as `data.load` does."""
    if not source.download:
        return data.load(source.data, source.data_dir)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        rows = {}

        def show(file: str, here: int, total: int | None) -> None:
            if file not in rows:
                rows[file] = bar.add_task(file)
            bar.update(rows[file], completed=here, total=total)

        return data.load(source.data, source.data_dir, download=True, progress=show)


def open_both(model: ModelSource, source: DataSource, *, plain: bool = False) -> tuple[nn.Module, Dataset]:
    """Return a model in eval mode and its data; raise UserError, before data are read, for a model that cannot be.

    `plain`: in a form that can be looked into.
    """
    check_named(model)
    dataset = open_data(source)
    network = open_model(model, dataset, download=source.download)[0].eval()
    return plain_form(network) if plain else network, dataset


def plain_form(model: nn.Module) -> nn.Module:
    """Return a model that can be looked into: of an artefact the same network, as rounded, in torch's own modules."""
    return model.equivalent if isinstance(model, deploy.PackedModule) else model


def open_model(source: ModelSource, dataset: Dataset, *, download: bool = False) -> tuple[nn.Module, Blueprint]:
    """Return a model and its blueprint; a user's factory may have frozen parts of it, which stay in eval mode.

    An artefact is attacked as it is shipped, on its kernels. A library's network has its trained weights, which are
    fetched with `download`. Raise UserError if the model does not accept the data's images or has another number of
    classes.
    """
    name, weights = source.named()
    model: nn.Module
    if name.endswith(PACKED):
        model, blueprint = deploy.PackedModule(deploy.load(name)), blueprint_for(source, dataset)
    elif name.endswith(SAVED):
        model, blueprint, _ = load_model(name)
    else:
        blueprint = blueprint_for(source, dataset)
        model = blueprint.build()
        for note in _put_weights_(model, blueprint, weights, download):
            print(f"{weights or name}: {note}", file=sys.stderr)
    check_fit(model, dataset)
    if is_code(name):
        _say_what_is_assumed(source, model, blueprint)
    return model, blueprint


def _put_weights_(model: nn.Module, blueprint: Blueprint, weights: Path | None, download: bool) -> tuple[str, ...]:
    if weights is not None:
        return load_weights_(model, read_weights(weights))
    if is_hub_name(blueprint.name):
        load_hub_weights_(model, blueprint.name, classes=blueprint.classes, download=download)
    return ()


def _say_what_is_assumed(source: ModelSource, model: nn.Module, blueprint: Blueprint) -> None:
    """Warn of a user's network with random weights, and of trained weights behind the moments of other images."""
    name, weights = source.named()
    if weights is None and _is_untrained(model, blueprint):
        what = "draws its weights at random: this is about an untrained network, unless you give --weights"
        print(f"warning: '{name}' {what}", file=sys.stderr)
    elif weights is not None and source.mean is None and takes_moments(name):
        what = f"is given the mean and std of {blueprint.data}; if it was trained with others, give --mean and --std"
        print(f"warning: '{name}' {what}", file=sys.stderr)


def file_of(source: ModelSource) -> Path | None:
    """Return the file that holds a model's weights, if there is one."""
    name, weights = source.named()
    return Path(name) if name.endswith(SAVED) else weights


def check_named(source: ModelSource) -> None:
    """Raise UserError, before data are read, for a model that cannot be opened: no such name or file, or no weights."""
    (name, weights), file = source.named(), file_of(source)
    if name.endswith(SAVED) and weights is not None:
        raise UserError("a model file holds its weights; give either a model file or --weights")
    if file is not None and not file.is_file():
        raise UserError(f"there is no file {file}; check the path")
    if (source.mean is None) != (source.std is None):
        raise UserError("--mean and --std go together; give both")
    if source.mean is not None and not (is_code(name) and takes_moments(name)):
        raise UserError(f"'{name}' has its own normalisation; --mean and --std are for a factory that takes them")
    if is_hub_name(name):
        describe(name)
    if name.endswith(SAVED) or ":" in name:
        return
    if Path(name).is_file():
        raise UserError(f"{name} is no model file of sparring's ({', '.join(SAVED)}); {conversion(name)}")
    if name not in MODELS:
        raise UnknownNameError("model", name, MODELS)
    if weights is None:
        raise UserError(f"'{name}' names an architecture without weights; give --weights FILE or a model file")


def is_code(name: str) -> bool:
    """Return whether a model's name is that of a user's factory."""
    return ":" in name and not is_hub_name(name)


def _is_untrained(model: nn.Module, blueprint: Blueprint) -> bool:
    """Return whether another seed gives other parameters: nothing trained is in them."""
    other = dict(blueprint.build(seed=1).named_parameters())
    return any(not torch.equal(value, other.get(name, value)) for name, value in model.named_parameters())


def blueprint_for(source: ModelSource, dataset: Dataset) -> Blueprint:
    """Return the blueprint of a named model for a data set; its factory is given the data's moments, unless others."""
    shape = tuple(dataset.train.x.shape[1:])
    mean, std = (
        own if text is None else parse_moments(text, len(own))
        for text, own in ((source.mean, dataset.mean), (source.std, dataset.std))
    )
    return Blueprint(source.named()[0], shape, dataset.classes, mean, std, data=dataset.name)


def parse_moments(text: str, channels: int) -> tuple[float, ...]:
    """Return a mean or standard deviation by channel from "0.5,0.5,0.5"; raise UserError where it is not one."""
    try:
        moments = tuple(float(part) for part in text.split(","))
    except ValueError:
        moments = ()
    if len(moments) != channels or not all(0 <= value < 1 for value in moments):
        raise UserError(f"--mean and --std take {channels} numbers in [0, 1), separated by commas, not '{text}'")
    return moments
