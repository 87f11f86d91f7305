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
from ..files import CONVERT, check_writable, load_tensors
from ..models import MODELS, Blueprint, load_model, load_weights_
from ..study import check_fit
from ._options import DataSource, ModelSource

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
    network = open_model(model, dataset)[0].eval()
    return plain_form(network) if plain else network, dataset


def plain_form(model: nn.Module) -> nn.Module:
    """Return a model that can be looked into: of an artefact the same network, as rounded, in torch's own modules."""
    return model.equivalent if isinstance(model, deploy.PackedModule) else model


def open_model(source: ModelSource, dataset: Dataset) -> tuple[nn.Module, Blueprint]:
    """Return a model and its blueprint; a user's factory may have frozen parts of it, which stay in eval mode.

    An artefact is attacked as it is shipped, on its kernels. Raise UserError if the model does not accept the data's
    images or has another number of classes.
    """
    model: nn.Module
    if source.model.endswith(PACKED):
        model, blueprint = deploy.PackedModule(deploy.load(source.model)), blueprint_for(source.model, dataset)
    elif source.model.endswith(SAVED):
        model, blueprint, _ = load_model(source.model)
    else:
        blueprint = blueprint_for(source.model, dataset)
        model = blueprint.build()
        if source.weights is not None:
            tensors = load_tensors(source.weights)
            load_weights_(model, {name: value for name, value in tensors.items() if not name.startswith("sparring/")})
    check_fit(model, dataset)
    if ":" in source.model and source.weights is None and _is_untrained(model, blueprint):
        what = "draws its weights at random: this is about an untrained network, unless you give --weights"
        print(f"warning: '{source.model}' {what}", file=sys.stderr)
    return model, blueprint


def file_of(source: ModelSource) -> Path | None:
    """Return the file that holds a model's weights, if there is one."""
    return Path(source.model) if source.model.endswith(SAVED) else source.weights


def check_named(source: ModelSource) -> None:
    """Raise UserError, before data are read, for a model that cannot be opened: no such name or file, or no weights."""
    name, weights, file = source.model, source.weights, file_of(source)
    if name.endswith(SAVED) and weights is not None:
        raise UserError("a model file holds its weights; give either a model file or --weights")
    if file is not None and not file.is_file():
        raise UserError(f"there is no file {file}; check the path")
    if name.endswith(SAVED) or ":" in name:
        return
    if Path(name).is_file():
        raise UserError(f"{name} is no model file of sparring's ({', '.join(SAVED)}); {CONVERT}")
    if name not in MODELS:
        raise UnknownNameError("model", name, MODELS)
    if weights is None:
        raise UserError(f"'{name}' names an architecture without weights; give --weights FILE or a model file")


def _is_untrained(model: nn.Module, blueprint: Blueprint) -> bool:
    """Return whether another seed gives other parameters: nothing trained is in them."""
    other = dict(blueprint.build(seed=1).named_parameters())
    return any(not torch.equal(value, other.get(name, value)) for name, value in model.named_parameters())


def blueprint_for(name: str, dataset: Dataset) -> Blueprint:
    """Return the blueprint of a named model for a data set."""
    shape = tuple(dataset.train.x.shape[1:])
    return Blueprint(name, shape, dataset.classes, dataset.mean, dataset.std, data=dataset.name)
