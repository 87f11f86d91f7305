"""The dependency graph of channel removal, derived from the nodes of `graph.lower`.

Every value of an image at every node has the number of its *unit*. The values of one output channel of a layer form a
unit. Values that are added or multiplied share a unit, and so do inputs and outputs of a group of a depthwise or
grouped convolution. Operations that move values are run on the numbers themselves. Unit 0 stays: images, classes, and
values that are mixed without weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ...graph import (
    ELEMENTWISE,
    RESAMPLED,
    Add,
    Affine,
    AvgPool,
    Call,
    Constant,
    Conv2d,
    Flatten,
    Graph,
    Linear,
    MaxPool,
    Node,
    ReLU,
    Reshape,
    evaluate,
)

__all__ = ["Coupling", "coupling", "joined"]

# Operations that only move or repeat values.
_MOVES = frozenset(
    """permute transpose movedim select slice narrow flip index_select cat stack roll expand repeat unfold
    channel_shuffle pixel_shuffle pixel_unshuffle""".split()  # noqa: SIM905
)
# Operations on each channel of a map separately.
_WITHIN_CHANNELS = RESAMPLED | frozenset(
    """avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d upsample_bicubic2d
    _upsample_bicubic2d_aa""".split()  # noqa: SIM905
)
_ALONG = frozenset(["mean", "amax", "amin"])  # of values of one unit


@dataclass(frozen=True, eq=False)
class Coupling:
    """The unit of every output (`rows`) and input (`columns`) of a layer, by its module's path; int64, 0 stays.

    `norms` are the paths of normalisation layers, whose parameters are vectors of `rows`.
    """

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    norms: frozenset[str]

    def without(self, units: Tensor) -> Coupling:
        """Return a coupling in which some units stay; units: their numbers."""
        rows, columns = (
            {path: u.masked_fill(torch.isin(u, units), 0) for path, u in t.items()} for t in (self.rows, self.columns)
        )
        return Coupling(rows, columns, self.norms)

    @property
    def writers(self) -> dict[str, Tensor]:
        """The rows of layers with weight matrices."""
        return {path: units for path, units in self.rows.items() if path not in self.norms}


def coupling(model: nn.Module, graph: Graph, prunable: Iterable[str]) -> Coupling:
    """Return which channels of a model are removed together; prunable: the weights that can lose rows."""
    walk = _Walk(graph, _layers(model, set(prunable)))
    for node in graph.nodes:
        walk.units.append(_compact(walk.of(node)))
    walk.fix(walk.units[-1])
    for parts in _parted(graph):
        for other in parts[1:]:
            walk.join(walk.units[parts[0]], walk.units[other])
    return walk.found()


def _parted(graph: Graph) -> list[list[int]]:
    """Return the nodes that are equal parts of one value, such as those of chunk(): they stay equal."""
    parts: dict[tuple[int, int, int], list[int]] = {}
    for place, node in enumerate(graph.nodes):
        if isinstance(node.op, Call) and node.op.name == "narrow":
            key = node.inputs[0], node.op.options["dim"], node.op.options["length"]
            parts.setdefault(key, []).append(place)
    whole = {key: graph.nodes[key[0]].shape[key[1] - 1] for key in parts}
    return [places for key, places in parts.items() if len(places) * key[2] == whole[key]]


def _layers(model: nn.Module, prunable: set[str]) -> dict[str, nn.Module]:
    """Return the modules that can be cut: torch's layers whose weights are plain, unshared parameters."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {
        path: module
        for path, module in model.named_modules()
        if all(p is None or owners[id(p)] == 1 for p in module._parameters.values())
        and (
            isinstance(module, _NormBase)
            or (isinstance(module, nn.Linear | nn.Conv2d) and f"{path}.weight".lstrip(".") in prunable)
        )
    }


@dataclass
class _Walk:
    """Assign units to every node; `pairs` are numbers of the same unit."""

    graph: Graph
    layers: dict[str, nn.Module]
    units: list[Tensor] = field(default_factory=list)
    pairs: list[Tensor] = field(default_factory=list)
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    count: int = 1

    def of(self, node: Node) -> Tensor:
        """Return the units of a node, float64 of its shape; operations without a rule keep all units."""
        inputs = [self.units[i] for i in node.inputs]
        match node.op:
            case Linear() | Conv2d() as op if op.name in self.layers:
                return self._layer(op, inputs[0], node.shape)
            case Affine(name="") as op:
                # One constant per channel cannot be cut.
                uniform = bool((op.scale == op.scale[0]).all() and (op.shift == op.shift[0]).all())
                return inputs[0] if uniform else self.fix(*inputs, shape=node.shape)
            case Affine() as op if op.name in self.layers and _varies(inputs[0]) <= {0}:
                self._read(self.rows, op.name, inputs[0].reshape(len(inputs[0]), -1)[:, 0])
                return inputs[0]
            case ReLU():
                return inputs[0]
            case MaxPool() | AvgPool():
                return self._within(inputs[0], node.shape)
            case Flatten() | Reshape():
                return evaluate(node.op, *(u[None] for u in inputs))[0]
            case Add():
                return self._together(node, "add")
            case Call() as op:
                return self._call(node, op, inputs)
        return self.fix(*inputs, shape=node.shape)

    def _call(self, node: Node, op: Call, inputs: list[Tensor]) -> Tensor:
        shape = node.shape
        if op.name in ELEMENTWISE or op.name in ("add", "mul", "div", "sub"):
            return self._together(node, op.name)
        if op.name in _MOVES:
            return evaluate(op, *(u[None] for u in inputs))[0]
        if op.name in _WITHIN_CHANNELS:
            return self._within(inputs[0], shape)
        if op.name in _ALONG and not _varies(inputs[0]) & _axes(op, inputs[0]):
            return evaluate(op, inputs[0][None])[0]
        if op.name in ("softmax", "_softmax") and not _varies(inputs[0]) & _axes(op, inputs[0]):
            return inputs[0]
        if op.name in ("pad", "constant_pad_nd"):
            return self._padded(op, inputs[0], shape)
        return self.fix(*inputs, shape=shape)

    def fix(self, *units: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Keep units; return units that stay, for a shape."""
        for some in units:
            self.join(some, torch.zeros(()))
        return torch.zeros(()).double().expand(shape)

    def join(self, left: Tensor, right: Tensor) -> None:
        """Merge the units at each position."""
        left, right = _once(left), _once(right)
        pairs = torch.stack([left + 0 * right, right + 0 * left]).flatten(1)
        self.pairs.append(torch.unique(pairs, dim=1))

    def _new(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count, dtype=torch.float64)

    def _layer(self, op: Linear | Conv2d, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A layer reads units along the axis that it sums over, and writes new ones; one per group, if it has groups.

        A layer that is used twice reads and writes the same both times.
        """
        axis = 0 if isinstance(op, Conv2d) else len(shape) - 1
        if not _varies(x) <= {axis}:
            self.fix(x)
        read = x.movedim(axis, 0).reshape(x.shape[axis], -1)[:, 0]
        groups = op.groups if isinstance(op, Conv2d) else 1
        rows = self.rows.get(op.name)
        if rows is None:
            rows = self._new(groups).repeat_interleave(shape[axis] // groups) if groups > 1 else self._new(shape[axis])
            self.rows[op.name] = rows
        if groups > 1:
            self.join(read.view(groups, -1), rows.view(groups, -1)[:, :1])
        else:
            self._read(self.columns, op.name, read)
        sides = [1] * len(shape)
        sides[axis] = -1
        return rows.view(sides).expand(shape)

    def _read(self, table: dict[str, Tensor], path: str, units: Tensor) -> None:
        self.join(table.setdefault(path, units), units)

    def _within(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not _varies(x) <= {0} or x.shape[0] != shape[0]:
            return self.fix(x, shape=shape)
        return x[(slice(None), *[slice(1)] * (x.dim() - 1))].expand(shape)

    def _together(self, node: Node, name: str) -> Tensor:
        """Elementwise operations; a factor shared by all channels must stay, and other shared values keep all units."""
        inputs, shape = [self.units[i] for i in node.inputs], node.shape
        varied = set[int]().union(*(_varies(u) for u in inputs))
        same = [any(u.shape[axis] == 1 for axis in varied) for u in inputs]  # for all channels
        known = [isinstance(self.graph.nodes[i].op, Constant) for i in node.inputs]
        shared = [u for u, is_same, is_known in zip(inputs, same, known, strict=True) if is_same and not is_known]
        own = [u for u, is_same in zip(inputs, same, strict=True) if not is_same]
        self.fix(*shared, *([] if name == "mul" else own if shared else []))
        for other in own[1:]:
            self.join(own[0], other)
        return (own or shared)[0].expand(shape)

    def _padded(self, op: Call, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Zeros around a map stay in their channel; whole channels of zeros stay."""
        if x.shape[0] == shape[0] and x.dim() > 1:
            return self._within(x, shape)
        return nn.functional.pad(x, list(op.options["pad"]))

    def found(self) -> Coupling:
        """Return the groups with new numbers."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        left, right = torch.cat(self.pairs, 1).long().numpy() if self.pairs else torch.zeros(2, 0).long().numpy()
        ties = coo_array((left == left, (left, right)), (self.count, self.count))
        number = torch.from_numpy(connected_components(ties, directed=False)[1]).long()
        number = torch.where(number == number[0], 0, number + 1)

        def numbered(table: dict[str, Tensor]) -> dict[str, Tensor]:
            return {path: number[units.long()] for path, units in table.items()}

        norms = frozenset(path for path in self.rows if isinstance(self.layers[path], _NormBase))
        return Coupling(numbered(self.rows), numbered(self.columns), norms)


def joined(tables: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names in groups that share units."""
    groups: list[tuple[set[int], list[str]]] = []
    for name, units in tables.items():
        own, names = set(units[units > 0].tolist()), [name]
        for group in [group for group in groups if group[0] & own]:
            groups.remove(group)
            own, names = own | group[0], group[1] + names
        groups.append((own, names))
    return [names for _, names in groups]


def _axes(op: Call, x: Tensor) -> set[int]:
    """Return the axes of one image over which an operation goes."""
    given = op.options.get("dim")
    axes = range(1, x.dim() + 1) if given is None else [given] if isinstance(given, int) else given
    return {axis % (x.dim() + 1) - 1 for axis in axes}


def _compact(units: Tensor) -> Tensor:
    """Return equal units in which axes of equal units are stored once."""
    shape = units.shape
    for axis in range(units.dim()):
        first = units.narrow(axis, 0, 1)
        if units.shape[axis] > 1 and (units.stride(axis) == 0 or bool((units == first).all())):
            units = first
    return units.expand(shape)


def _varies(units: Tensor) -> set[int]:
    """Return the axes along which units differ."""
    return {axis for axis, size in enumerate(units.shape) if size > 1 and units.stride(axis)}


def _once(units: Tensor) -> Tensor:
    """Return units without the axes that only repeat them."""
    return units[tuple(slice(None) if stride else slice(1) for stride in units.stride())]
