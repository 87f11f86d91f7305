"""Local Lipschitz constants of margin differences: lower estimates and sound upper bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from ..errors import UnknownNameError, UserError
from ..graph import Add, Affine, AvgPool, Conv2d, Flatten, Graph, Linear, MaxPool, ReLU, SparseActivation, evaluate
from ..threat import L2, LINF, dual, norm_name, random_point
from ..waiting import courteous
from ._network import LinearOp, adjoint, mapped, margin_rows, prepare
from ._region import Region, dot, region
from .certify._crown import bound_nodes
from .certify._relaxations import Interval, WindowLines, in_windows, kink_of, relax

_ROUNDING = 1 + 1e-10  # how far a backward-stable decomposition in float64 may fall below the true value
Constants = Callable[[Graph, Region, Tensor, torch.Generator], Tensor]


@courteous()
def lipschitz(
    model: nn.Module, x: Tensor, radius: float | Tensor, *, norm: float, method: str = "jacobian", seed: int = 0
) -> Tensor:
    """Estimate or bound the Lipschitz constants of the margins g_ŷ − g_k around each image: (N, classes − 1).

    ŷ is the model's label of x. The constants are for perturbations in `norm` (2 or infinity), so gradients are
    measured in the dual norm. radius is a number or (N,); the ball is intersected with [0, 1]. Methods are the names in
    LIPSCHITZ (see `facts`); `seed` is used by "sampled" and "clever". Raises Unsupported for discontinuous layers,
    which have no finite constant.
    """
    graph = prepare(model, tuple(x.shape[1:]), images=x)
    reach = region(x, norm, radius)
    return constants_over(graph, reach, graph(reach.x).argmax(1), method, seed)


def constants_over(graph: Graph, reach: Region, y: Tensor, method: str, seed: int = 0) -> Tensor:
    """Do what `lipschitz` does for a lowered float64 network, a region and given labels."""
    if method not in LIPSCHITZ:
        raise UnknownNameError("Lipschitz method", method, LIPSCHITZ)
    if reach.norm not in (L2, LINF):
        raise UserError(f"Lipschitz constants support only l2 and linf, not {norm_name(reach.norm)}")
    for node in graph.nodes:
        if isinstance(node.op, SparseActivation):
            kink_of(node.op)
    return LIPSCHITZ[method](graph, reach, margin_rows(graph, y), torch.Generator().manual_seed(seed))


_BATCHES, _SAMPLES = 40, 25


def _sampled(graph: Graph, reach: Region, rows: Tensor, generator: torch.Generator) -> Tensor:
    return _sampled_gradients(graph, reach, rows, generator).amax(0)


def _sampled_gradients(graph: Graph, reach: Region, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return the largest gradient norm of each of many batches of points: (batches, N, classes − 1)."""
    count, many = rows.shape[:2]
    size = reach.eps.view(-1, *[1] * (reach.x.dim() - 1)).repeat_interleave(_SAMPLES, 0)
    centres, low, high = (v.repeat_interleave(_SAMPLES, 0) for v in (reach.x, reach.lower, reach.upper))
    found = []
    for _ in range(_BATCHES):
        step = random_point(centres, reach.norm, 1.0, generator) * size
        points = torch.minimum(torch.maximum(centres + step, low), high).requires_grad_()
        margins = dot(rows.repeat_interleave(_SAMPLES, 0), graph(points))
        norms = []
        for k in range(many):
            (slope,) = torch.autograd.grad(margins[:, k].sum(), points, retain_graph=k < many - 1)
            norms.append(torch.linalg.vector_norm(slope.flatten(1), ord=dual(reach.norm), dim=1))
        found.append(torch.stack(norms, 1).view(count, _SAMPLES, many).amax(1))
    return torch.stack(found)


def _clever(graph: Graph, reach: Region, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return the location of a reverse Weibull fitted to batch maxima (Weng et al. 2018, theorem 4.1)."""
    from scipy.stats import weibull_max  # here, as importing it takes a second or two

    largest = _sampled_gradients(graph, reach, rows, generator)
    best = largest.amax(0)
    result = best.clone()
    for i in range(best.shape[0]):
        for k in range(best.shape[1]):
            sample = largest[:, i, k]
            spread = float(sample.max() - sample.min())
            if spread > 1e-9 * float(sample.max()):
                unit = ((sample - sample.min()) / spread).numpy()  # the fit is ill-conditioned in other units
                _, location, _ = weibull_max.fit(unit, loc=1.01, scale=0.5)
                # A location ten spreads beyond the largest sample is a fit that has run away.
                result[i, k] = float(sample.min()) + spread * max(1.0, min(location, 10.0))
    return result


@torch.no_grad()
def _product(graph: Graph, reach: Region, rows: Tensor, _: torch.Generator) -> Tensor:
    """Multiply the norms of all layers; every unit counts."""
    ones = [torch.ones(len(rows), *node.shape, dtype=torch.float64) for node in graph.nodes]
    return _multiplied(graph, reach.norm, rows, ones, ones)


@torch.no_grad()
def _active(graph: Graph, reach: Region, rows: Tensor, _: torch.Generator) -> Tensor:
    """Multiply the norms of the submatrices of units that can be active somewhere in the region."""
    bounds = bound_nodes(graph, reach, backward=True)[0]
    outputs = [torch.ones_like(b.lower) for b in bounds]
    inputs = [torch.ones_like(b.lower) for b in bounds]
    inputs[0] = (reach.upper > reach.lower).double()
    for index, node in enumerate(graph.nodes):
        if isinstance(node.op, ReLU | SparseActivation):
            inputs[index] = (bounds[node.inputs[0]].upper > _kink(node.op)).double()
        elif isinstance(node.op, Flatten):
            inputs[index] = inputs[node.inputs[0]].flatten(1)
        elif isinstance(node.op, Affine):
            inputs[index] = inputs[node.inputs[0]]
    for index in range(len(graph.nodes)):  # a row counts unless only units that stay at zero read it
        read = [i for i, node in enumerate(graph.nodes) if index in node.inputs]
        if read and all(isinstance(graph.nodes[i].op, ReLU | SparseActivation) for i in read):
            outputs[index] = torch.stack([inputs[i] for i in read]).amax(0)
    return _multiplied(graph, reach.norm, rows, inputs, outputs)


def _kink(op: ReLU | SparseActivation) -> float:
    return kink_of(op) if isinstance(op, SparseActivation) else 0.0


def _multiplied(graph: Graph, norm: float, rows: Tensor, inputs: list[Tensor], outputs: list[Tensor]) -> Tensor:
    constants = [torch.ones(len(rows), dtype=torch.float64)]
    nodes = graph.nodes
    last = nodes[-1].op
    for index, node in enumerate(nodes[1:-1] if isinstance(last, Linear) else nodes[1:], start=1):
        source = node.inputs[0]
        before = constants[source]
        match node.op:
            case Linear() | Conv2d() | Affine() | AvgPool() | Flatten():
                size = operator_norm(node.op, nodes[source].shape, norm, inputs[source], outputs[index])
                constants.append(size * before)
            case Add():
                constants.append(before + constants[node.inputs[1]])
            case MaxPool():
                constants.append(max_pool_norm(node.op, norm) * before)
            case _:
                constants.append(before)  # ReLU and similar continuous functions
    source = nodes[-1].inputs[0] if isinstance(last, Linear) else len(nodes) - 1
    if isinstance(last, Linear):
        rows = (rows @ last.weight) * inputs[source][:, None]
    sizes: Tensor = torch.linalg.vector_norm(rows, ord=dual(norm), dim=2)
    return sizes * constants[source][:, None]


@torch.no_grad()
def _jacobian(graph: Graph, reach: Region, rows: Tensor, _: torch.Generator) -> Tensor:
    """Propagate intervals of the margins' Jacobian backwards (as RecurJac does, Zhang et al. 2019)."""
    bounds = bound_nodes(graph, reach, backward=True)[0]
    waiting = {len(graph.nodes) - 1: Interval(rows, rows)}
    for index in range(len(graph.nodes) - 1, 0, -1):
        if index not in waiting:
            continue
        node, slopes = graph.nodes[index], waiting.pop(index)
        if isinstance(node.op, LinearOp):
            slopes = _through_linear(node.op, slopes, graph.nodes[node.inputs[0]].shape)
        elif isinstance(node.op, ReLU | SparseActivation):
            box, kink = bounds[node.inputs[0]], _kink(node.op)
            slopes = _gated(slopes, (box.lower >= kink)[:, None], (box.upper > kink)[:, None])
        elif isinstance(node.op, MaxPool):
            slopes = _through_windows(node.op, slopes, bounds[node.inputs[0]])
        for source in node.inputs:
            old = waiting.get(source)
            waiting[source] = Interval(old.lower + slopes.lower, old.upper + slopes.upper) if old else slopes
    largest = torch.maximum(-waiting[0].lower, waiting[0].upper).flatten(2)
    moves = (reach.upper > reach.lower).flatten(1)[:, None]  # pixels that cannot move do not count
    result: Tensor = torch.linalg.vector_norm(largest * moves, ord=dual(reach.norm), dim=2)
    return result


def _through_linear(op: LinearOp, slopes: Interval, shape: tuple[int, ...]) -> Interval:
    centre, half = ((slopes.upper + slopes.lower) / 2).flatten(0, 1), ((slopes.upper - slopes.lower) / 2).flatten(0, 1)
    size = (*slopes.lower.shape[:2], *shape)
    centre, half = adjoint(op, centre, shape).view(size), adjoint(mapped(op, torch.abs), half, shape).view(size)
    return Interval(centre - half, centre + half)


def _gated(slopes: Interval, always: Tensor, sometimes: Tensor) -> Interval:
    """Multiply by a gate that is 1, 0, or anything between."""
    lower = torch.where(always, slopes.lower, torch.where(sometimes, slopes.lower.clamp_max(0), 0))
    upper = torch.where(always, slopes.upper, torch.where(sometimes, slopes.upper.clamp_min(0), 0))
    return Interval(lower, upper)


def _through_windows(op: MaxPool, slopes: Interval, box: Interval) -> Interval:
    lines = relax(op, box)
    assert isinstance(lines, WindowLines)
    low, high = (in_windows(value, lines.index) for value in box)
    can_win = high >= low.amax(2, keepdim=True)
    alone = can_win & (can_win.sum(2, keepdim=True) == 1)
    spread = Interval(*(value.flatten(2)[..., None] for value in slopes))
    return Interval(*map(lines.added_up, _gated(spread, alone[:, None], can_win[:, None])))


def operator_norm(op: LinearOp, shape: tuple[int, ...], norm: float, columns: Tensor, rows: Tensor) -> Tensor:
    """Bound ‖D W D'‖ for p = 2 or infinity and each image: (N,), float64.

    Power iteration approaches a spectral norm from below, so none is used: matrices go through a full singular value
    decomposition, convolutions through the torus that contains them, and the Schur test holds for everything.
    columns (N, *shape) and rows (N, *out) are 0/1 masks of the inputs and outputs that count.
    """
    if isinstance(op, Flatten):
        return columns.new_ones(len(columns))
    positive = mapped(op, torch.abs)
    forward = evaluate(positive, columns) * rows
    largest_row: Tensor = forward.flatten(1).amax(1)
    if norm == LINF:
        return largest_row
    backward = adjoint(positive, rows, shape) * columns
    schur = (largest_row * backward.flatten(1).amax(1)).sqrt()
    match op:
        case Linear():
            return torch.minimum(schur, _spectral(op.weight, columns, rows)) * _ROUNDING
        case Conv2d():
            return schur.clamp_max(_on_a_torus(op, shape)) * _ROUNDING
    return schur * _ROUNDING


def _spectral(weight: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Return the largest singular value of each image's submatrix, computed once for images that share their masks."""
    if columns.dim() != 2:
        return torch.full((len(columns),), float(torch.linalg.matrix_norm(weight, 2)), dtype=weight.dtype)
    masks, which = torch.unique(torch.cat([columns, rows], 1), dim=0, return_inverse=True)
    values = []
    for mask in masks > 0:
        part = weight[mask[columns.shape[1] :]][:, mask[: columns.shape[1]]]
        values.append(torch.linalg.matrix_norm(part, 2) if part.numel() else weight.new_zeros(()))
    return torch.stack(values)[which]


def _on_a_torus(op: Conv2d, shape: tuple[int, ...]) -> float:
    """Bound a zero-padded convolution by the circular one on a torus that is large enough never to wrap around.

    The circular one is block-diagonal in the Fourier basis (Sedghi et al. 2019); padding and stride only leave out
    rows and columns.
    """
    extent = [(k - 1) * d + 1 for k, d in zip(op.weight.shape[2:], op.dilation, strict=True)]
    size = [n + e - 1 for n, e in zip(shape[1:], extent, strict=True)]
    kernel = op.weight.new_zeros(*op.weight.shape[:2], *extent)
    kernel[:, :, :: op.dilation[0], :: op.dilation[1]] = op.weight
    spectrum = torch.fft.rfft2(kernel, s=size).flatten(2)
    outputs = op.weight.shape[0] // op.groups
    blocks = spectrum.view(op.groups, outputs, op.weight.shape[1], -1).permute(0, 3, 1, 2)
    return float(torch.linalg.matrix_norm(blocks, 2).max())


def max_pool_norm(op: MaxPool, norm: float) -> float:
    """Return the Lipschitz constant of max pooling: the root of how many windows share a pixel for p = 2, else 1."""
    if norm == LINF:
        return 1.0
    shared = 1
    for k, s, d in zip(op.kernel, op.stride, op.dilation, strict=True):
        shared *= min(k, math.ceil(((k - 1) * d + 1) / s))
    return math.sqrt(shared)


LIPSCHITZ: dict[str, Constants] = {
    "sampled": _sampled,
    "clever": _clever,
    "product": _product,
    "active": _active,
    "jacobian": _jacobian,
}


Estimate = tuple[float, float, float]  # mean, and the ends of a confidence interval


@dataclass(frozen=True)
class MaskedPoint:
    """Results at one drop rate alpha: estimates (mean, low, high) over draws of the masks.

    constant: the mean over images of the largest constant of a margin; change: its difference to the previous rate, for
    the same draws (the masks are nested), so an interval above zero shows an increase; ratio: the median over images of
    the smallest margin / constant, negative for images that the masked network misclassifies. If a draw is infinite (a
    network with zero slope), the interval contains all numbers.
    """

    alpha: float
    constant: Estimate
    change: Estimate
    ratio: Estimate


def margin_ratios(
    model: nn.Module, x: Tensor, y: Tensor, radius: float, *, norm: float, method: str = "product"
) -> tuple[Tensor, Tensor]:
    """Return the largest Lipschitz constant of a margin and the smallest margin / constant of each image: both (N,).

    Margins are those of the labels y. Methods, norms and errors are those of `lipschitz`. Scaling all weights scales
    numerator and denominator equally. A network with zero slope has the ratio +inf or −inf.
    """
    return _ratios(prepare(model, tuple(x.shape[1:]), images=x), region(x, norm, radius), y, method)


def _ratios(graph: Graph, reach: Region, y: Tensor, method: str) -> tuple[Tensor, Tensor]:
    constants = constants_over(graph, reach, y, method)
    margins = dot(margin_rows(graph, y), graph(reach.x))
    return constants.amax(1), (margins / constants).nan_to_num(nan=-math.inf, posinf=math.inf).amin(1)


def random_mask_bounds(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    alphas: Sequence[float],
    *,
    norm: float,
    radius: float,
    method: str = "product",
    layers: Sequence[str] | None = None,
    draws: int = 20,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[MaskedPoint]:
    """Drop weights independently at each rate of `alphas` and estimate the expected constant and margin / constant.

    Weights are those of linear and convolutional layers; `layers` names the modules that lose weights (None: all of
    them jointly at the same rate). Intervals are Student's, over draws. The theorem bounds the expectation for random
    masks only; for trained masks, use `margin_ratios` on a pruned network. Source: Guo et al. 2018. Raises UserError
    for rates outside [0, 1], unknown layers, or fewer than two draws.
    """
    graph, reach = prepare(model, tuple(x.shape[1:]), images=x), region(x, norm, radius)
    chosen = {
        index: node.op
        for index, node in enumerate(graph.nodes)
        if isinstance(node.op, Linear | Conv2d) and (layers is None or node.op.name in layers)
    }
    if layers is not None and len(chosen) != len(set(layers)):
        raise UserError(f"layers {list(layers)} do not all name modules with weights")
    if draws < 2 or not chosen or not all(0 <= alpha <= 1 for alpha in alphas):
        raise UserError("masks need two draws or more, weights to drop, and rates in [0, 1]")
    generator = torch.Generator().manual_seed(seed)
    constants, ratios = torch.zeros(draws, len(alphas)), torch.zeros(draws, len(alphas))
    for draw in range(draws):
        uniform = {i: torch.rand(op.weight.shape, generator=generator) for i, op in chosen.items()}
        for column, alpha in enumerate(alphas):
            nodes = list(graph.nodes)
            for i, op in chosen.items():
                nodes[i] = replace(nodes[i], op=replace(op, weight=op.weight * (uniform[i] >= alpha)))
            constant, ratio = _ratios(Graph(tuple(nodes)), reach, y, method)
            constants[draw, column], ratios[draw, column] = constant.mean(), ratio.median()
    return [
        MaskedPoint(
            alpha,
            _estimate(constants[:, i], confidence),
            _estimate(constants[:, i] - constants[:, max(i - 1, 0)], confidence),
            _estimate(ratios[:, i], confidence),
        )
        for i, alpha in enumerate(alphas)
    ]


def _estimate(values: Tensor, confidence: float) -> Estimate:
    values = values.double()
    mean = float(values.mean())
    if not math.isfinite(mean):
        return mean, -math.inf, math.inf
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * float(values.std()) / math.sqrt(len(values))
    return mean, mean - half, mean + half
