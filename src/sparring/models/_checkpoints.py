"""Weights as other tools write them: torch's own files, and the names that wrappers and reparametrisations leave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import MIB, explain, load_tensors

LARGEST = 8192 * MIB
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning
# Where training tools keep the weights, the likeliest first; averaged weights only if there are no others.
KEPT_UNDER = ("", "state_dict", "model_state_dict", "model", "net", "network", "params", "weights")
AVERAGED = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
NOT_WEIGHTS = ("optim", "scaler", "scheduler", "callbacks", "loops", "rng")


@dataclass(frozen=True)
class Checkpoint:
    """Hold a network's weights, where in its file they stood, and what was done to their names."""

    tensors: dict[str, Tensor]
    key: str
    others: tuple[str, ...]
    notes: tuple[str, ...]


def read_checkpoint(path: str | Path, *, key: str | None = None) -> Checkpoint:
    """Read the weights in a file of torch.save's (.pt, .pth, .ckpt, .bin), plain, nested or of a whole module.

    The file is unpickled in a process of its own, which imports and runs nothing that the file names, has bounded
    memory and time, and returns tensors alone. `key` says which of several sets of weights to take, as "ema". Names and
    reparametrised weights are made plain as `plain_weights` does. Raises UserError for a file that cannot be read
    so, that names functions, holds no tensors, or lacks `key`.
    """
    try:
        return chosen(_groups(Path(path)), key=key)
    except LookupError as error:
        raise UserError(f"{path} {error.args[0]}") from error


def chosen(groups: Mapping[str, dict[str, Tensor]], *, key: str | None = None) -> Checkpoint:
    """Return the likeliest of several sets of named tensors, or that under `key`, by plain names; LookupError if none.

    Weights come before averaged weights, and these before sets under names that no tool is known to use.
    """
    weights = [name for name, group in groups.items() if _are_weights(name, group)]
    if key is not None and key not in groups:
        raise LookupError(f"has no weights under '{key}'; it has {_named(groups)}")
    if not weights and key is None:
        raise LookupError("holds no named weights; save model.state_dict()")
    taken = key if key is not None else min(weights, key=_rank)
    tensors, notes = plain_weights(groups[taken])
    return Checkpoint(tensors, taken, tuple(name for name in weights if name != taken), notes)


def _rank(name: str) -> tuple[int, int, int]:
    """Order the places of weights: known names first, averages after them, outer before inner."""
    root = name.removesuffix(".module")
    known = [*KEPT_UNDER, *AVERAGED]
    return (known.index(root) if root in known else len(KEPT_UNDER), name.count("."), len(name))


def _are_weights(name: str, group: Mapping[str, Tensor]) -> bool:
    """Return whether a set is a network's, and not an optimiser's or a handful of numbers."""
    of_training = any(part.lower().lstrip("_").startswith(NOT_WEIGHTS) for part in name.split("."))
    return not of_training and any(value.dim() for value in group.values())


def _named(groups: Mapping[str, object]) -> str:
    return ", ".join(f"'{name}'" if name else "its outermost level" for name in groups) or "none at all"


def _groups(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the sets of named tensors in a file, by where they stand, read by a child process."""
    try:
        more = 4 * path.stat().st_size + 512 * MIB
    except OSError as error:
        raise explain(error, path, "read") from error
    if not path.is_file() or more > 4 * LARGEST:
        raise UserError(f"{path} is no file of at most {LARGEST // MIB} MiB; choose another")
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "tensors.safetensors"
        script = Path(__file__).with_name("_unpickle.py")
        command = [sys.executable, "-P", str(script), str(path.resolve()), str(target), str(more)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise UserError(f"{path} is refused: {_reason(done)}")
        names = json.loads(done.stdout.splitlines()[-1])
        tensors = load_tensors(target, limit=more)
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, value in tensors.items():
        at, _, own = name.partition("/")
        groups[names[int(at)]][own] = value
    return {name: group for name, group in groups.items() if group}


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "unpacking it takes more time or memory than a checkpoint needs"
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the process that read it died"


def plain_weights(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return weights by the names of the plain network, and a note on each change.

    Prefixes that every name has ("module.", "_orig_mod.", "model.") go; the pairs that torch.nn.utils.prune,
    weight_norm and spectral_norm leave become the weights that forward() uses.
    """
    found, notes = dict(tensors), []
    for prefix in _prefixes(found):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
        notes.append(f"took the prefix '{prefix}' from every name")
    steps = ((_apply_masks_, "mask"), (_apply_weight_norm_, "weight norm"), (_apply_spectral_norm_, "spectral norm"))
    for apply_, what in steps:
        made = apply_(found)
        if made:
            notes.append(f"computed from {what}: {', '.join(made[:3])}{', ...' * (len(made) > 3)}")
    return found, tuple(notes)


def _prefixes(names: Mapping[str, object]) -> list[str]:
    """Return the wrappers' prefixes that every name begins with, the outermost first."""
    prefix, found = "", []
    while names:
        own = next((w for w in WRAPPERS if all(name.startswith(prefix + w) for name in names)), None)
        if own is None:
            break
        prefix += own
        found.append(own)
    return found


def _apply_masks_(found: dict[str, Tensor]) -> list[str]:
    """Replace weight_orig and weight_mask by their product (torch.nn.utils.prune), in place."""
    made = [
        n.removesuffix("_orig") for n in found if n.endswith("_orig") and n.removesuffix("_orig") + "_mask" in found
    ]
    for name in made:
        mask, original = found.pop(f"{name}_mask"), found.pop(f"{name}_orig")
        found[name] = original * mask.to(original.dtype)
    return made


def _apply_weight_norm_(found: dict[str, Tensor]) -> list[str]:
    """Replace a direction and its length by their product (Salimans and Kingma 2016), in place."""
    pairs = {name.removesuffix("_g"): (name, name.removesuffix("_g") + "_v") for name in found if name.endswith("_g")}
    for name in found:
        if name.endswith(".original0"):
            stem = name.removesuffix(".original0")
            pairs[stem.replace("parametrizations.", "")] = (name, f"{stem}.original1")
    made = []
    for name, (length, direction) in pairs.items():
        if direction in found and found[length].dim() in (0, found[direction].dim()):
            g, v = found.pop(length), found.pop(direction)
            axes = [axis for axis in range(v.dim()) if g.dim() == 0 or g.shape[axis] == 1]
            found[name] = v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=g.dim() > 0))
            made.append(name)
    return made


def _apply_spectral_norm_(found: dict[str, Tensor]) -> list[str]:
    """Divide weights by the spectral norm that u and v estimate (Miyato et al. 2018), in place."""
    triples = {
        name.removesuffix("_orig"): (name, name.removesuffix("_orig") + "_u", name.removesuffix("_orig") + "_v")
        for name in found
        if name.endswith("_orig")
    }
    for name in found:
        if name.endswith(".original"):
            stem = name.removesuffix(".original")
            triples[stem.replace("parametrizations.", "")] = (name, f"{stem}.0._u", f"{stem}.0._v")
    made = []
    for name, (original, left, right) in triples.items():
        if left in found and right in found:
            w, u, v = found.pop(original), found.pop(left), found.pop(right)
            matrix = w.flatten(1) if w.shape[0] == len(u) else w.transpose(0, 1).flatten(1)
            found[name] = w / torch.dot(u, matrix @ v)
            made.append(name)
    return made
