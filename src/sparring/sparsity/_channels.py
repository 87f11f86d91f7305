"""Whole channels: which can go together, what must be silent for that, and the smaller network that is left.

A network is seen as `graph.lower` gives it. Every layer's output lives in a *space* of channels; batch normalisation,
ReLU and pooling stay in their input's space, and an addition makes its two spaces one. A channel of a space can go if
every layer that writes it is silent there: then what reads it reads zero.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import Unsupported, UserError
from ..graph import Add, Affine, AvgPool, Conv2d, Flatten, Graph, Linear, MaxPool, ReLU, lower
from ._masks import Masks, apply_, prunable
from ._select import Channels


@dataclass
class _Space:
    """Channels that are written and read together; `fixed` if none of them can go."""

    writers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    readers: dict[str, int] = field(default_factory=dict)  # module path to how many inputs a channel gives it
    fixed: bool = False

    def absorb(self, other: _Space) -> None:
        self.writers += other.writers
        self.norms += other.norms
        self.readers |= other.readers
        self.fixed |= other.fixed


def tied_channels(model: nn.Module, shape: tuple[int, ...]) -> tuple[Channels, tuple[str, ...]]:
    """Return the structure of whole channels of a model, and the names of weights that cannot lose any.

    `shape` is that of one image. The last layer keeps its outputs, which are the classes; so do layers that are used
    twice, share a weight, are grouped, recurrent or under weight_norm and the like, and what writes to them. Raise
    Unsupported for what cannot be traced, and UserError, with the reason, if no layer can lose channels.
    """
    spaces = _spaces(model, shape)
    tied = tuple(tuple(f"{path}.weight" for path in s.writers) for s in spaces if len(s.writers) > 1 and not s.fixed)
    free = {f"{path}.weight" for s in spaces if not s.fixed for path in s.writers}
    if not free:
        raise UserError(f"no layer can lose whole channels: {_what_holds(model)}; prune unstructured")
    return Channels(tied), tuple(name for name in prunable(model) if name not in free)


def silent(model: nn.Module, masks: Masks, shape: tuple[int, ...]) -> Masks:
    """Return the masks with biases and batch norms masked where a channel has lost all its weights.

    A channel whose weights are gone would still send its bias; masked too, it sends nothing, and `remove_channels` can
    take it out. A channel that other layers add to is left alone as long as one of them still writes it.
    """
    masks = dict(masks)
    for space in _spaces(model, shape):
        if space.fixed:
            continue
        alive = _alive(masks[f"{path}.weight"] for path in space.writers)
        for path in (*space.writers, *space.norms):
            for name in ("weight", "bias") if path in space.norms else ("bias",):
                full = f"{path}.{name}"
                if model.get_submodule(path)._parameters[name] is not None:
                    masks[full] = alive & masks.get(full, torch.ones_like(alive))
    return masks


def remove_channels(model: nn.Module, masks: Masks, shape: tuple[int, ...]) -> nn.Module:
    """Return a smaller copy of a model without its silent channels; it gives the logits of the masked model.

    The masks are first made `silent`. At least one channel of a layer stays. Raise Unsupported if the model cannot be
    traced, or if its forward pass has the old sizes written into it.
    """
    smaller = copy.deepcopy(model)
    masks = silent(model, masks, shape)
    apply_(smaller, masks)
    masked = lower(smaller, shape, dtype=torch.float64)
    for space in _spaces(smaller, shape):
        if space.fixed:
            continue
        kept = _alive(masks[f"{path}.weight"] for path in space.writers)
        if not bool(kept.any()):
            kept = torch.arange(len(kept)) == 0
        for path in space.writers:
            _shrink_outputs_(smaller.get_submodule(path), kept)
        for path in space.norms:
            _shrink_norm_(smaller.get_submodule(path), kept)
        for path, repeats in space.readers.items():
            _shrink_inputs_(smaller.get_submodule(path), kept.repeat_interleave(repeats))
    _check(smaller, masked, shape)
    return smaller


def _alive(masks: Iterable[Tensor]) -> Tensor:
    return torch.stack([mask.flatten(1).any(1) for mask in masks]).any(0)


def _spaces(model: nn.Module, shape: tuple[int, ...]) -> list[_Space]:
    unique = {id(space): space for space in _Spaces(lower(model, shape)).of_node}
    alone = _alone(model)
    for space in unique.values():
        space.fixed |= not alone.issuperset((*space.writers, *space.norms, *space.readers))
        # Normalisation without parameters cannot be silenced: it shifts a channel of zeros.
        space.fixed |= any(model.get_submodule(path)._parameters["bias"] is None for path in space.norms)
    return [space for space in unique.values() if space.writers]


def _what_holds(model: nn.Module) -> str:
    """Say why no layer of a model can lose channels."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in (p for p in module._parameters.values() if p is not None):
            owners.setdefault(id(parameter), []).append(f"'{path}'")
    reasons = [f"{' and '.join(paths)} share a weight" for paths in owners.values() if len(set(paths)) > 1]
    grouped = [f"'{path}'" for path, module in model.named_modules() if getattr(module, "groups", 1) != 1]
    reasons += [f"{', '.join(grouped)} {'is' if len(grouped) == 1 else 'are'} grouped"] if grouped else []
    return ", ".join([*reasons, "the last layer's outputs are the classes"])


def _alone(model: nn.Module) -> set[str]:
    """Return the paths of modules whose weight is a plain parameter that no other module has."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {
        path
        for path, module in model.named_modules()
        if "weight" in module._parameters and all(p is None or owners[id(p)] == 1 for p in module._parameters.values())
    }


class _Spaces:
    """Walk a graph once and give every node its space; `repeats` is how many features a flattened channel became."""

    def __init__(self, graph: Graph) -> None:
        self.of_node: list[_Space] = []
        self.repeats: list[int] = []
        readers: dict[int, str] = {}  # who reads a weight first, by the weight's identity
        for node in graph.nodes:
            inputs = [self.of_node[i] for i in node.inputs]
            repeats = self.repeats[node.inputs[0]] if node.inputs else 1
            match node.op:
                case Linear() | Conv2d() as op:
                    first = readers.setdefault(id(op.weight), op.name)
                    reused = first != op.name or any(first in space.writers for space in self.of_node)
                    grouped = isinstance(op, Conv2d) and op.groups > 1
                    # A linear layer over the last of several axes does not read channels.
                    fixed = reused or grouped or not op.name or (isinstance(op, Linear) and len(node.shape) > 1)
                    inputs[0].readers |= {op.name: repeats} if op.name else {}
                    inputs[0].fixed |= fixed
                    self._append(_Space(writers=[op.name] if op.name else [], fixed=fixed))
                    if reused:
                        self._fix(first)
                case Affine() as op:
                    self._affine(op, inputs[0], repeats)
                case Add():
                    self._append(self._join(*inputs), repeats)
                case Flatten():
                    before = graph.nodes[node.inputs[0]].shape
                    self._append(inputs[0], repeats * (node.shape[0] // before[0]))
                case ReLU() | MaxPool() | AvgPool():
                    self._append(inputs[0], repeats)
                case _:  # the image, and what may hold values per channel, count channels or move them
                    for space in inputs:
                        space.fixed = True
                    self._append(_Space(fixed=True))
        self.of_node[-1].fixed = True

    def _append(self, space: _Space, repeats: int = 1) -> None:
        self.of_node.append(space)
        self.repeats.append(repeats)

    def _affine(self, op: Affine, space: _Space, repeats: int) -> None:
        if op.name:
            space.fixed |= repeats > 1 or any(op.name in known.norms for known in self.of_node)
            space.norms.append(op.name)
        else:
            # A constant that is added revives a silent channel; one per channel could not be cut.
            space.fixed |= bool(op.shift.any()) or not bool((op.scale == op.scale[0]).all())
        self._append(space, repeats)

    def _join(self, left: _Space, right: _Space) -> _Space:
        if left is not right:
            left.absorb(right)
            self.of_node = [left if space is right else space for space in self.of_node]
        return left

    def _fix(self, path: str) -> None:
        for space in self.of_node:
            space.fixed |= path in space.writers or path in space.readers


def _parameter(values: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=like.requires_grad)


def _shrink_outputs_(module: nn.Module, kept: Tensor) -> None:
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    module.weight = _parameter(weight[kept], weight)
    if bias is not None:
        module.bias = _parameter(bias[kept], bias)
    setattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels", int(kept.sum()))


def _shrink_inputs_(module: nn.Module, kept: Tensor) -> None:
    weight = module.get_parameter("weight")
    module.weight = _parameter(weight[:, kept], weight)
    setattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels", int(kept.sum()))


def _shrink_norm_(module: nn.Module, kept: Tensor) -> None:
    for name in ("weight", "bias"):
        parameter = module._parameters[name]
        if parameter is not None:
            setattr(module, name, _parameter(parameter[kept], parameter))
    for name in ("running_mean", "running_var"):
        module._buffers[name] = module.get_buffer(name)[kept].clone()
    module.num_features = int(kept.sum())  # type: ignore[assignment]


def _check(model: nn.Module, masked: Graph, shape: tuple[int, ...]) -> None:
    try:
        graph = lower(model, shape, dtype=torch.float64)
    except UserError as error:
        raise Unsupported(f"channels cannot be removed: {error}; write no sizes into forward()") from error
    x = torch.rand(8, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (network(x.to(next(model.parameters()).device)) for network in (masked, graph))
    if not torch.allclose(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max())):
        raise Unsupported("channels cannot be removed: without them the network gives other logits")
