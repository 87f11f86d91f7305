"""Load weights into a model, with names from any wrapper."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import load_tensors
from ._checkpoints import FLOATS, plain_weights

OURS = "sparring/"  # what a model file contains besides weights
REPARAMETRISED = ("_orig", "_mask", "_g")  # suffixes of torch.nn.utils.prune, spectral_norm and weight_norm
LONGEST = 1000  # letters in a name
COUNTERS = "num_batches_tracked"  # missing in checkpoints before torch 0.4.1, and not used in evaluation


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a network's weights from a safetensors file, also from a model file; raise UserError as `load_tensors`."""
    found = {name: value for name, value in load_tensors(path).items() if not name.startswith(OURS)}
    strange = next((name for name in found if len(name) > LONGEST or not name.isprintable()), None)
    if strange is not None:
        raise UserError(
            f"{path} holds the name {strange[:80]!r}, which is not a tensor's name; create or download it again"
        )
    return found


def load_weights_(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Copy named tensors into a model's parameters and buffers; return notes on changed names.

    If names differ, prefixes of wrappers and the parameters of torch.nn.utils.prune, weight_norm and spectral_norm are
    resolved (`plain_weights`). Weights of a network inside a wrapper, such as one that normalises images, are assigned
    to that network. Raises UserError that names the first tensor that is missing, unknown, of another shape or number
    type, no dense tensor, not finite, or that the model's own type would round.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise UserError(f"'{name}' in the weights is not a dense tensor with values but {_described(value)}")
    own = model.state_dict()
    learned = dict(model.named_parameters())  # some buffers take the size of the loaded tensor
    found, notes = _matched(own, learned, tensors)
    for name, value in found.items():
        _check_kind(name, value, own[name].dtype)
        if name in learned and value.shape != own[name].shape:
            rows = value.shape[1:] == own[name].shape[1:]
            way = "; if its rows are classes, name all of the network's with --classes FILE" if rows else ""
            way += ", and give the size of its images with --resize and --crop" if rows else ""
            raise UserError(
                f"'{name}' has shape {tuple(value.shape)} in the weights and {tuple(own[name].shape)} here{way}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"'{name}' holds NaN or infinite values: the weights are damaged or training diverged")
    _check_ties(own, found)
    try:
        model.load_state_dict({**own, **found})
    except RuntimeError as error:
        raise UserError(f"the weights do not fit the model: {str(error).splitlines()[-1].strip()}") from error
    return notes


def _described(value: object) -> str:
    return f"a {type(value).__name__}" + (f" on {value.device}, {value.layout}" if isinstance(value, Tensor) else "")


def _matched(
    own: Mapping[str, Tensor], learned: Collection[str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return tensors by the model's names, and notes; raise UserError if no reading gives all trained tensors."""
    plain, notes = plain_weights(tensors)
    for given, said in ((dict(tensors), ()), (plain, notes)):
        for prefix, inner in _readings(own, given):
            names = _read_as(own, learned, given, prefix, inner)
            if names is not None:
                return names, (*said, *_notes(prefix, inner))
    for given, said in ((dict(tensors), ()), (plain, notes)):
        parts = _parts(own, learned, given)
        if len(parts) > 1:
            several = ", ".join(f"'{prefix}'" for prefix in sorted(parts))
            raise UserError(
                f"the weights hold several such networks: {several}; select one with `sparring convert --key`"
            )
        for prefix, (names, inner) in parts.items():
            left = [name for name in given if not name.startswith(prefix)]
            several = f" and {len(left) - 1} more" * (len(left) > 1)
            more = [f"left out '{name}'{several}, which is not under '{prefix}'" for name in left[:1]]
            return names, (*said, *_notes(prefix, inner), *more)
    raise UserError(_mismatch(own, plain))


def _notes(prefix: str, inner: str) -> list[str]:
    return [f"removed the prefix '{prefix}' from every name"] * bool(prefix) + [
        f"used the weights for '{inner.rstrip('.')}', the network inside"
    ] * bool(inner)


def _read_as(
    own: Mapping[str, Tensor], learned: Collection[str], given: Mapping[str, Tensor], prefix: str, inner: str
) -> dict[str, Tensor] | None:
    """Return the tensors under a prefix by the names inside a part of the model, if they are all that it learns."""
    names = {inner + name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    if not all(name in own for name in names):
        return None
    here = {_place(own[name]) for name in names}
    lacks = [
        name for name in own if name not in names and not name.endswith(COUNTERS) and _place(own[name]) not in here
    ]
    fits = all(inner and not name.startswith(inner) and name not in learned for name in lacks)
    return names if fits else None


def _place(value: Tensor) -> tuple[object, ...]:
    """Return a key that is equal only for tied weights."""
    return (value.data_ptr(), value.shape, value.stride()) if value.numel() else (id(value),)


def _parts(
    own: Mapping[str, Tensor], learned: Collection[str], given: Mapping[str, Tensor]
) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Return, by prefix, the readings of only the tensors under it, with the part of the model for each."""
    under: dict[str, dict[str, Tensor]] = {}
    for name, value in given.items():
        for prefix in _starts([name], 2):
            under.setdefault(prefix, {})[name] = value
    for name in own:
        for prefix in _starts([name], 2):  # its siblings then correspond to the model's own parts
            under.pop(prefix, None)
    parts: dict[str, tuple[dict[str, Tensor], str]] = {}
    for prefix in sorted(under, key=len):
        for inner in ("", *_starts(own, 2)):
            names = _read_as(own, learned, under[prefix], prefix, inner)
            if names is not None and not prefix.startswith(tuple(parts)):
                parts[prefix] = names, inner
    return parts


def _readings(own: Collection[str], given: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield a prefix to remove from every given name and one to add, the likeliest first."""
    yield "", ""
    yield from ((prefix, "") for prefix in _starts(given) if all(name.startswith(prefix) for name in given))
    yield from (("", prefix) for prefix in _starts(own))


def _starts(names: Collection[str], depth: int = 32) -> list[str]:
    """Return the prefixes of names, up to a dot, the shortest first."""
    found = {
        ".".join(parts[:at]) + "."
        for name in names
        for parts in [name.split(".")]
        for at in range(1, len(parts))[:depth]
    }
    return sorted(found, key=lambda start: (len(start), start))


def _mismatch(own: Collection[str], given: Collection[str]) -> str:
    """Describe in which names weights and model differ, each with the nearest name of the other."""
    missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    parts = []
    for what, names, others in (("lack", missing, unknown), ("have", unknown, missing)):
        if names:
            near = difflib.get_close_matches(names[0], others, n=1)
            hint = f" (nearest: '{near[0]}')" if near else ""
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{what} '{names[0]}'{hint}{more}" + ", which the model does not have" * (what == "have"))
    own_norms = any("parametrizations." in name or name.endswith(REPARAMETRISED) for name in missing)
    way = "; if the network masks or normalises its weights itself, convert them with --as-is" * own_norms
    return f"the weights {'; they '.join(parts)}; do model and weights belong together?{way}"


def _check_ties(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise UserError for two different tensors if the model ties these weights."""
    first: dict[object, str] = {}
    for name, value in found.items():
        other = first.setdefault(_place(own[name]), name)
        if other != name and not torch.equal(value.double(), found[other].double()):
            raise UserError(f"'{other}' and '{name}' are tied in the model but differ in the weights; untie them")


def _check_kind(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raise UserError for numbers that a tensor of this type would change: integers as weights, or rounded ones."""
    if value.dtype == dtype:
        return
    if value.is_floating_point() != dtype.is_floating_point or value.dtype not in FLOATS | {torch.int64}:
        raise UserError(
            f"'{name}' holds {value.dtype} in the weights and {dtype} here; if it is quantised, save it as {dtype}"
        )
    if not torch.equal(value.to(dtype).to(value.dtype).nan_to_num(), value.nan_to_num()):
        raise UserError(
            f"'{name}' holds {value.dtype}, which {dtype} would round; save it as {dtype}, "
            f"or build the model in {value.dtype}"
        )
