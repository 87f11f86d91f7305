"""Networks of timm, torchvision and Hugging Face by name: "timm:resnet18", "torchvision:resnet50", "hf:FOLDER".

Each comes with the normalisation, image size and class names of its own configuration. Weights are read from the user's
cache or folder; nothing is downloaded unless requested, and pickled weights are read by `read_checkpoint`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import UnknownNameError, UserError, told
from ..files import MIB, read_bounded, save_tensors, sha256_bytes
from ._architectures import Normalise
from ._checkpoints import read_checkpoint
from ._weights import load_weights_

# Torchvision's networks whose trained weights include a second head for training.
_TWO_HEADED = ("googlenet", "inception_v3")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class HubModel:
    """A library's configuration of a network: preparation of images, and classes.

    `size` is the height and width in pixels that images are cropped to, as in training. `resize` is the length of the
    shorter side before that, or height and width if images are stretched, or None if the preparation is different.
    `labels` are the names of the classes and `ids` their WordNet ids; both are empty if unknown.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    resize: int | tuple[int, int] | None
    interpolation: str
    labels: tuple[str, ...]
    classes: int
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Hub:
    """How to describe a library's network, build it with new weights, and find its trained ones."""

    package: str
    describe: Callable[[str], HubModel]
    make: Callable[[str, tuple[int, ...], int], nn.Module]
    weights: Callable[[str, bool], Mapping[str, Tensor] | None]


def is_hub_name(name: str) -> bool:
    """Return whether a model's name belongs to a library, such as timm:resnet18."""
    return name.partition(":")[0] in HUBS and ":" in name


def describe(name: str) -> HubModel:
    """Return a network's own configuration; raise UserError if its package is missing or has none."""
    hub, own = _parted(name)
    with _told(name):
        facts = hub.describe(own)
        if len(facts.mean) != len(facts.std) or not all(value > 0 for value in facts.std):
            raise UserError(f"'{name}' has an invalid mean {facts.mean} or std {facts.std}; fix its configuration")
    return facts


def build_from_hub(name: str, *, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build a network with new weights for images of this shape, with its own normalisation of [0, 1]."""
    hub, own = _parted(name)
    facts = describe(name)
    mean, std = facts.mean, facts.std
    if shape[0] != len(mean):
        if shape[0] != 1:
            raise UserError(f"'{name}' takes images of {len(mean)} channels, these have {shape[0]}")
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    with _told(f"{name} for images {shape}"):
        return nn.Sequential(Normalise(mean, std), hub.make(own, shape, classes))


def hub_version(name: str) -> str:
    """Return a hash that changes with the version of a network's library, and with the settings in a folder."""
    hub, own = _parted(name)
    settings = (_folder(own) / "config.json").read_bytes() if hub.package == "transformers" else own.encode()
    return sha256_bytes(f"{hub.package} {version(hub.package)} ".encode() + settings)


def load_hub_weights_(model: nn.Module, name: str, *, classes: int, download: bool = False) -> None:
    """Load a library's trained weights into a model of `build_from_hub`.

    Raises UserError if they are not in the user's cache or folder and `download` is not given, if they have another
    number of `classes`, and as `load_weights_` does.
    """
    hub, own = _parted(name)
    trained = describe(name).classes
    if trained != classes:
        raise UserError(
            f"'{name}' was trained for {trained} classes, but the data have {classes}; use data of these classes, or "
            "name all of them with --classes FILE if the data have only some"
        )
    with _told(f"the weights of {name}"):
        tensors = hub.weights(own, download)
    if tensors is None:
        raise UserError(
            f"the weights of '{name}' are not on this machine; use --download to get them, or give --weights"
        )
    load_weights_(model, tensors)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn any error of a library about files and networks into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be loaded: {told(error)}") from error


def _parted(name: str) -> tuple[_Hub, str]:
    scheme, _, own = name.partition(":")
    hub = HUBS[scheme]
    with _without_torchvision_kernels():
        try:
            if importlib.util.find_spec("torchvision"):  # the others import it when they first build a network
                importlib.import_module("torchvision")
            importlib.import_module(hub.package)
        except ImportError as error:
            extra = f"pip install 'sparring[{scheme}]'"
            raise UserError(
                f"'{name}' needs the package {hub.package}, which cannot be imported ({error}): {extra}"
            ) from None
    return hub, own


@contextmanager
def _without_torchvision_kernels() -> Iterator[None]:
    """Import torchvision beside a version of torch for which its compiled operators were not built.

    Its classifiers need none of them; only their registration fails ("operator torchvision::nms does not exist").
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        yield
        return
    register = torch.library.register_fake

    def passed_over(op: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *rest, **options)

    torch.library.register_fake = passed_over
    try:
        yield
    finally:
        torch.library.register_fake = register


# -- timm -------------------------------------------------------------------------------------------------------------


def _describe_timm(own: str) -> HubModel:
    import timm

    cfg = timm.get_pretrained_cfg(own) if timm.is_model(own) else None
    if cfg is None:
        raise UnknownNameError("model of timm", own, timm.list_models())
    size = cfg.input_size[1:]
    ids, labels = _imagenet(cfg.num_classes)
    sides = tuple(math.floor(side / cfg.crop_pct) for side in size)
    resize = {"squash": sides, "border": None}.get(cfg.crop_mode, sides[0])
    return HubModel(cfg.mean, cfg.std, size, resize, cfg.interpolation, labels, cfg.num_classes, ids)


def _imagenet(classes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the WordNet ids and names of ImageNet's classes, or of its subset of this size, as in timm."""
    if importlib.util.find_spec("timm") is None:
        return (), ()
    import timm

    subset = timm.data.infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return (), ()
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.label_names()), tuple(info.label_descriptions())


def _make_timm(own: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    import timm

    options: dict[str, Any] = {"num_classes": classes, "in_chans": shape[0]}
    if timm.get_pretrained_cfg(own).fixed_input_size:
        options["img_size"] = shape[1:]
    made: nn.Module = timm.create_model(own, pretrained=False, **options)
    return made


def _timm_weights(own: str, download: bool) -> Mapping[str, Tensor] | None:
    """Load timm's weights by timm's own renaming and resizing; a pickle is first unpickled safely."""
    import timm

    file = _timm_file(timm.get_pretrained_cfg(own), download)
    if file is None:
        return None
    with tempfile.TemporaryDirectory() as place:
        if file.suffix != ".safetensors":
            file = save_tensors(Path(place) / "model.safetensors", read_checkpoint(file).tensors)
        made = timm.create_model(own, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    state: Mapping[str, Tensor] = made.state_dict()
    return state


def _timm_file(cfg: Any, download: bool) -> Path | None:
    """Return timm's file in the cache of Hugging Face's hub or, from older releases of timm, in torch's cache."""
    from huggingface_hub import hf_hub_download, list_repo_files, try_to_load_from_cache

    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for name in names if cfg.hf_hub_id else ():
        if isinstance(found := try_to_load_from_cache(cfg.hf_hub_id, name), str):
            return Path(found)
    old = cfg.url and not cfg.url.endswith(".npz") and _from_url(cfg.url, download and not cfg.hf_hub_id)
    if old or not download or not cfg.hf_hub_id:
        return old or None
    there = list_repo_files(cfg.hf_hub_id)
    return Path(hf_hub_download(cfg.hf_hub_id, next(name for name in names if name in there)))


# -- torchvision ------------------------------------------------------------------------------------------------------


def _torchvision_weights_of(own: str) -> Any:
    from torchvision import models

    if own not in models.list_models(module=models):
        raise UnknownNameError("model of torchvision", own, models.list_models(module=models))
    return models.get_model_weights(own).DEFAULT


def _describe_torchvision(own: str) -> HubModel:
    weights = _torchvision_weights_of(own)
    done = weights.transforms()
    labels = tuple(weights.meta["categories"])
    size = (done.crop_size[0], done.crop_size[0])
    mean, std = tuple(done.mean), tuple(done.std)
    ids = _imagenet(len(labels))[0] if labels[:1] == ("tench",) else ()
    return HubModel(mean, std, size, done.resize_size[0], done.interpolation.value, labels, len(labels), ids)


def _make_torchvision(own: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    from torchvision import models

    if shape[0] != 3:
        raise UserError(f"torchvision's '{own}' needs images of three channels, but these have {shape[0]}")
    options: dict[str, Any] = {"image_size": shape[1]} if own.startswith("vit_") else {}
    if own in _TWO_HEADED:  # as their trained weights expect
        options = {"init_weights": True, "transform_input": True, "aux_logits": False}
    made: nn.Module = models.get_model(own, weights=None, num_classes=classes, **options)
    return made


def _torchvision_weights(own: str, download: bool) -> Mapping[str, Tensor] | None:
    """Let torchvision itself rename and drop tensors of its file, which is unpickled safely before."""
    from torchvision import models

    weights = _torchvision_weights_of(own)
    file = _from_url(weights.url, download)
    if file is None:
        return None
    tensors = read_checkpoint(file).tensors
    with patch.object(type(weights), "get_state_dict", lambda *_, **__: tensors):
        made = models.get_model(own, weights=weights)
    return {name: value for name, value in made.state_dict().items() if not name.startswith("AuxLogits.")}


def _from_url(url: str, download: bool) -> Path | None:
    """Return the file of a URL in torch's cache; None if it is not there and downloads are off."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.exists() and download:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rpartition("-")[2], progress=True)
    return file if file.exists() else None


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def _folder(own: str) -> Path:
    """Return a folder that save_pretrained wrote, by its path or by its name in the hub's cache."""
    from huggingface_hub import snapshot_download

    if (Path(own) / "config.json").is_file():
        return Path(own)
    try:
        return Path(snapshot_download(own, local_files_only=True))
    except (ValueError, OSError):  # no such name, or not in the cache
        where = (
            "holds no config.json" if Path(own).is_dir() else "is neither a folder nor a model in Hugging Face's cache"
        )
        raise UserError(
            f"{own} {where}; hf:FOLDER takes a folder that save_pretrained wrote, or what `hf download NAME` fetched"
        ) from None


def _config(own: str) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(_folder(own), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"transformers could not read {own}/config.json: {str(error).splitlines()[0]}") from error


def _describe_hf(own: str) -> HubModel:
    config, prepared = _config(own), _folder(own) / "preprocessor_config.json"
    how = json.loads(read_bounded(prepared, limit=MIB)) if prepared.exists() else {}
    side = config.image_size if isinstance(getattr(config, "image_size", None), int) else 224
    resize, size = _prepared_by_hf(how, side)
    mean, std = (tuple(how.get(f"image_{what}", own)) for what, own in zip(("mean", "std"), IMAGENET, strict=True))
    labels = tuple(config.id2label[at] for at in sorted(config.id2label))
    named = () if all(label == f"LABEL_{at}" for at, label in enumerate(labels)) else labels
    interpolation = Image.Resampling(how.get("resample", 2)).name.lower()
    return HubModel(mean, std, size, resize, interpolation, named, len(labels))


def _prepared_by_hf(how: dict[str, Any], side: int) -> tuple[int | tuple[int, int] | None, tuple[int, int]]:
    """Return the sizes for resizing and cropping images; with `crop_pct` they are stretched from 384 pixels on."""
    wanted = how.get("size", side)
    edge = wanted.get("shortest_edge") if isinstance(wanted, dict) else None
    whole = _both(wanted, edge or side)
    if edge is None:
        resize: int | tuple[int, int] = whole
    else:
        resize = whole if "crop_pct" in how and edge >= 384 else math.floor(edge / (how.get("crop_pct") or 1))
    return resize if how.get("do_resize", True) else None, _both(how.get("crop_size") or whole, side)


def _both(size: Any, side: int) -> tuple[int, int]:
    """Return height and width from a number, a pair, or a dictionary that may lack them."""
    if isinstance(size, dict):
        return size.get("height", side), size.get("width", side)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _make_hf(own: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    import transformers

    config = _config(own)
    if len(config.id2label) != classes:
        config.num_labels = classes
    made: nn.Module = transformers.AutoModelForImageClassification.from_config(config)
    return made


def _hf_weights(own: str, _download: bool) -> Mapping[str, Tensor] | None:
    import transformers

    folder = _folder(own)
    if not list(folder.glob("model*.safetensors")):
        pickled = folder / "pytorch_model.bin"
        if pickled.exists():
            raise UserError(f"{pickled} is a pickle: sparring convert --as-is {pickled} {folder / 'model.safetensors'}")
        return None
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:  # transformers initialises it at random
        raise UserError(
            f"the weights in {own} lack '{min(info['missing_keys'])}'; finish the training of this network first"
        )
    state: Mapping[str, Tensor] = model.state_dict()
    return state


HUBS = {
    "timm": _Hub("timm", _describe_timm, _make_timm, _timm_weights),
    "torchvision": _Hub("torchvision", _describe_torchvision, _make_torchvision, _torchvision_weights),
    "hf": _Hub("transformers", _describe_hf, _make_hf, _hf_weights),
}
