"""Put weights into a model, whichever wrapper their names have come through."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import load_tensors
from ._checkpoints import FLOATS, plain_weights

OURS = "sparring/"  # what a model file holds besides weights
COUNTERS = "num_batches_tracked"  # which checkpoints before torch 0.4.1 lack, and evaluation does not read


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a network's weights from a safetensors file, also from a model file; raise UserError as `load_tensors`."""
    return {name: value for name, value in load_tensors(path).items() if not name.startswith(OURS)}


def load_weights_(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Copy named tensors into a model's parameters and buffers; return notes on what was done to their names.

    Where names differ, prefixes of wrappers and what torch.nn.utils.prune, weight_norm and spectral_norm leave are
    resolved (`plain_weights`), and weights of the network inside a wrapper, such as one that normalises images, are
    taken for that network. Raise UserError that names the first tensor that is missing, unknown, of another shape or
    kind of number, not finite, or that the model's own type would round.
    """
    own = model.state_dict()
    learned = dict(model.named_parameters())  # some buffers take the size of what they are given
    found, notes = _matched(own, learned, tensors)
    for name, value in found.items():
        _check_kind(name, value, own[name].dtype)
        if name in learned and value.shape != own[name].shape:
            raise UserError(f"'{name}' has shape {tuple(value.shape)} in the weights and {tuple(own[name].shape)} here")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(f"'{name}' holds NaN or infinite values: the weights are damaged or training diverged")
    try:
        model.load_state_dict({**own, **found})
    except RuntimeError as error:
        raise UserError(f"the weights do not fit the model: {str(error).splitlines()[-1].strip()}") from error
    return notes


def _matched(
    own: Collection[str], learned: Collection[str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return tensors by the model's names, and notes; raise UserError where no reading gives it all that it learns."""
    plain, notes = plain_weights(tensors)
    for given, said in ((dict(tensors), ()), (plain, notes)):
        for prefix, inner in _readings(own, given):
            names = {inner + name.removeprefix(prefix): value for name, value in given.items()}
            lacks = [name for name in own if name not in names and not name.endswith(COUNTERS)]
            if names.keys() <= set(own) and all(inner and not name.startswith(inner) for name in lacks):
                if any(name in learned for name in lacks):
                    continue
                more = [f"took the prefix '{prefix}' from every name"] * bool(prefix)
                more += [f"took the weights for those of '{inner.rstrip('.')}', the network inside"] * bool(inner)
                return names, (*said, *more)
    raise UserError(_mismatch(own, plain))


def _readings(own: Collection[str], given: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield a prefix to take from every given name and one to put there, the likeliest first."""
    yield "", ""
    yield from ((prefix, "") for prefix in _shared(given))
    inside = {name[: at + 1] for name in own for at, mark in enumerate(name) if mark == "."}
    yield from (("", prefix) for prefix in sorted(inside, key=len))


def _shared(names: Collection[str]) -> list[str]:
    """Return the prefixes, up to a dot, that all names share."""
    first = min(names, default="")
    ends = [first[: at + 1] for at, mark in enumerate(first) if mark == "."]
    return [prefix for prefix in ends if all(name.startswith(prefix) for name in names)]


def _mismatch(own: Collection[str], given: Collection[str]) -> str:
    """Say in which names weights and model differ, each with the nearest of the other's."""
    missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    parts = []
    for what, names, others in (("lack", missing, unknown), ("have", unknown, missing)):
        if names:
            near = difflib.get_close_matches(names[0], others, n=1)
            hint = f" (nearest: '{near[0]}')" if near else ""
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{what} '{names[0]}'{hint}{more}" + ", which the model lacks" * (what == "have"))
    return f"the weights {'; they '.join(parts)}: do model and weights belong together?"


def _check_kind(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raise UserError for numbers that a tensor of this type would change: integers as weights, or ones it rounds."""
    if value.dtype == dtype:
        return
    if value.is_floating_point() != dtype.is_floating_point or value.dtype not in FLOATS | {torch.int64}:
        raise UserError(f"'{name}' holds {value.dtype} in the weights and {dtype} here: quantised? Save it as {dtype}")
    if not torch.equal(value.to(dtype).to(value.dtype).nan_to_num(), value.nan_to_num()):
        raise UserError(
            f"'{name}' holds {value.dtype}, which {dtype} would round; save it so, or build the model in that"
        )
