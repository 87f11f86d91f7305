"""Read checkpoints of other tools: torch files, names changed by wrappers, and reparametrised weights."""

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
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning
INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # around parts of a network
# Where training tools store the weights, the likeliest first, then the outermost level, where a mean may be stored;
# averaged weights only if there are no others.
KEPT_UNDER = ("state_dict", "model_state_dict", "model", "net", "network", "params", "weights", "")
AVERAGED = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
NOT_WEIGHTS = ("optim", "scaler", "scheduler", "callbacks", "loops", "rng")


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights, their place in the file, and the changes to their names."""

    tensors: dict[str, Tensor]
    key: str
    others: tuple[str, ...]
    notes: tuple[str, ...]


def read_checkpoint(path: str | Path, *, key: str | None = None, as_is: bool = False) -> Checkpoint:
    """Read the weights in a file of torch.save (.pt, .pth, .ckpt, .bin): plain, nested or of a whole module.

    The file is unpickled in a separate process with bounded memory and time, which imports and runs nothing that the
    file names, and returns only tensors. `key` selects one of several sets of weights by its name, such as "ema", or by
    the prefix of its names, such as "student". Names and reparametrised weights are converted as by `plain_weights`,
    except with `as_is`. Raises UserError for a file that cannot be read in this way, that names functions, has no
    tensors or tensors that safetensors cannot store, or does not have `key`.
    """
    try:
        return chosen(_groups(Path(path)), key=key, as_is=as_is)
    except LookupError as error:
        raise UserError(f"{path} {error.args[0]}") from error


def chosen(groups: Mapping[str, dict[str, Tensor]], *, key: str | None = None, as_is: bool = False) -> Checkpoint:
    """Return the likeliest of several sets of named tensors, or that under `key`, by plain names; LookupError if none.

    Weights come before averaged weights, and these before sets under names that no tool is known to use, the largest
    first.
    """
    weights = [name for name, group in groups.items() if _are_weights(name, group)]
    if key is None and not weights:
        raise LookupError("has no named weights; save model.state_dict()")
    taken = key if key is not None else min(weights, key=lambda name: _rank(name, len(groups[name])))
    found = groups[taken] if taken in groups else _beginning(groups, taken)
    if not found:
        raise LookupError(f"has no weights under '{key}'; it has {_named(groups)}")
    bad = next((name for name, value in found.items() if value.is_meta), None)
    if bad is not None:
        raise LookupError(f"holds '{bad}' sparse, quantised, complex or without data; save it as a plain float tensor")
    tensors, notes = (found, ()) if as_is else plain_weights(found)
    _refuse_unfinished({} if as_is else tensors)
    return Checkpoint(dict(tensors), taken, tuple(name for name in weights if name != taken), notes)


def _refuse_unfinished(names: Mapping[str, object]) -> None:
    """Raise LookupError if weights are computed from others in a way that their names do not show."""
    for part, cause, way_out in (
        ("lora_A", "belongs to a LoRA adapter that changes the weights", "merge it, in peft with merge_and_unload()"),
        ("_flat_param", "holds many weights of a sharded network", "collect them by FSDP's FULL_STATE_DICT"),
        ("parametrizations.", "belongs to a parametrised weight", "remove it with remove_parametrizations()"),
    ):
        if name := next((name for name in names if part in name), None):
            raise LookupError(f"holds '{name}', which {cause}; {way_out}, and save model.state_dict()")


def _beginning(groups: Mapping[str, dict[str, Tensor]], start: str) -> dict[str, Tensor]:
    """Return the tensors of the likeliest set with names that begin so, by the rest of their names."""
    for at, group in sorted(groups.items(), key=lambda item: _rank(item[0], len(item[1]))):
        full = {f"{at}.{name}".lstrip("."): value for name, value in group.items()}
        found = {name.removeprefix(f"{start}."): full[name] for name in full if name.startswith(f"{start}.")}
        if not found and at:
            found = {name.removeprefix(f"{start}."): group[name] for name in group if name.startswith(f"{start}.")}
        if found:
            return found
    return {}


def _rank(name: str, size: int) -> tuple[int, int, int]:
    """Rank sets of weights: known names first, averages after them, large sets before small ones."""
    root = name.removesuffix(".module")
    known = [*KEPT_UNDER, *AVERAGED]
    return (known.index(root) if root in known else len(known), -size, name.count("."))


def _are_weights(name: str, group: Mapping[str, Tensor]) -> bool:
    """Return whether a set belongs to a network, and not to an optimiser, and is not a handful of numbers."""
    of_training = any(part.lower().lstrip("_").startswith(NOT_WEIGHTS) for part in name.split("."))
    return not of_training and any(value.dim() for value in group.values())


def _named(groups: Mapping[str, object]) -> str:
    return ", ".join(f"'{name}'" if name else "its outermost level" for name in groups) or "none at all"


def _groups(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the sets of named tensors in a file, by their place in it, read by a child process."""
    try:
        more = 4 * path.stat().st_size + 512 * MIB
    except OSError as error:
        raise explain(error, path, "read") from error
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the file of weights in it, such as {path / 'pytorch_model.bin'}")
    if not path.is_file() or more > 4 * LARGEST:
        raise UserError(f"{path} is not a file of at most {LARGEST // MIB} MiB; choose another")
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "tensors.safetensors"
        script = Path(__file__).with_name("_unpickle.py")
        command = [sys.executable, "-P", str(script), str(path.resolve()), str(target), str(more)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise UserError(f"{path} is refused: {_reason(done)}")
        names, lost = json.loads(done.stdout.splitlines()[-1])
        tensors = load_tensors(target, limit=more)
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for name, value in [*tensors.items(), *((name, torch.empty(0, device="meta")) for name in lost)]:
        at, _, own = name.partition("/")
        groups[names[int(at)]][own] = value
    return groups


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "unpacking it takes more time or memory than a checkpoint should"
    said = done.stderr.strip().splitlines()[-1:] or ["the process that read it crashed"]
    return "".join(letter if letter.isprintable() else "?" for letter in said[0])


def plain_weights(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return weights with the names of the plain network, and a note on each change.

    Removes prefixes that every name has ("module.", "_orig_mod.", "model."), what torch.compile, FSDP and checkpointing
    put around parts of a network, and torch's count of averaged models. The
    pairs of torch.nn.utils.prune, weight_norm and spectral_norm become the weights that forward() uses.
    """
    found, notes = dict(tensors), []
    for name in [name for name in found if name.rpartition(".")[2] == "n_averaged"]:  # torch.optim.swa_utils
        del found[name]
        notes.append(f"left out '{name}', a count of averaged models")
    for prefix in _prefixes(found):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
        notes.append(f"removed the prefix '{prefix}' from every name")
    for part in INNER:
        plain = {name.replace(part, ""): value for name, value in found.items()}
        if plain.keys() != found.keys() and len(plain) == len(found):
            found = plain
            notes.append(f"removed '{part}' from names")
    steps = ((_apply_masks_, "mask"), (_apply_weight_norm_, "weight norm"), (_apply_spectral_norm_, "spectral norm"))
    for apply_, what in steps:
        made = apply_(found)
        if made:
            notes.append(f"computed from {what}: {', '.join(made[:3])}{', ...' * (len(made) > 3)}")
    return found, tuple(notes)


def _prefixes(names: Mapping[str, object]) -> list[str]:
    """Return the wrappers' prefixes of all names, the outermost first."""
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
    made = []
    for name in [name.removesuffix("_orig") for name in found if name.endswith("_orig")]:
        original, mask = found[f"{name}_orig"], found.get(f"{name}_mask")
        if mask is not None and mask.shape == original.shape and _are_floats(original):
            del found[f"{name}_mask"], found[f"{name}_orig"]
            found[name] = original * mask.to(original.dtype)
            made.append(name)
    return made


def _are_floats(*tensors: Tensor) -> bool:
    """Return whether tensors have one floating-point type that torch computes with."""
    return tensors[0].dtype in FLOATS and all(value.dtype == tensors[0].dtype for value in tensors)


def _apply_weight_norm_(found: dict[str, Tensor]) -> list[str]:
    """Replace a direction and its length by their product (Salimans and Kingma 2016), in place."""
    pairs = {
        name.removesuffix("_g"): (name, name.removesuffix("_g") + "_v")
        for name in found
        if name.endswith("_g") and "weight" in name.rpartition(".")[2]  # other parameters are called proj_g and proj_v
    }
    for name in found:
        if name.endswith(".original0"):
            stem = name.removesuffix(".original0")
            pairs[stem.replace("parametrizations.", "")] = (name, f"{stem}.original1")
    made = []
    for name, (length, direction) in pairs.items():
        if direction in found and _is_length(found[length], found[direction]):
            g, v = found.pop(length), found.pop(direction)
            axes = [axis for axis in range(v.dim()) if g.dim() == 0 or g.shape[axis] == 1]
            found[name] = v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=g.dim() > 0))
            made.append(name)
    return made


def _is_length(g: Tensor, v: Tensor) -> bool:
    """Return whether a tensor has one length for a whole direction, or one for each place along one of its axes."""
    shapes = [(), *([n if axis == at else 1 for at, n in enumerate(v.shape)] for axis in range(v.dim()))]
    return _are_floats(g, v) and list(g.shape) in map(list, shapes)


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
            w, u, v = found[original], found[left], found[right]
            norms = [torch.dot(u, matrix @ v) for matrix in _as_matrices(w, u, v)]
            if norms:
                del found[original], found[left], found[right]
                found[name] = w / max(norms)  # in the other form of a square weight, u and v are not singular vectors
                made.append(name)
    return made


def _as_matrices(w: Tensor, u: Tensor, v: Tensor) -> list[Tensor]:
    """Return the forms of a weight that take v to u: by outputs, which are the second axis of transposed ones."""
    if w.dim() < 2 or not _are_floats(w, u, v):
        return []
    forms = (w.flatten(1), w.transpose(0, 1).flatten(1))
    return [form for form in forms if u.shape == form.shape[:1] and v.shape == form.shape[1:]]
