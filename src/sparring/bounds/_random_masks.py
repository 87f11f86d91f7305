"""The Bernoulli theorem, tested: what random masks do to Lipschitz constants, beside what they do to margins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from ..errors import UserError
from ..graph import Conv2d, Graph, Linear
from ._lipschitz import constants_over
from ._network import margin_rows, prepare
from ._region import Region, dot, region

Estimate = tuple[float, float, float]  # mean, and the ends of a confidence interval


@dataclass(frozen=True)
class MaskedPoint:
    """One drop rate alpha: estimates (mean, low, high) over draws of the masks.

    constant: the mean over images of the largest constant of a margin; change: its difference to the previous rate,
    for the same draws (the masks are nested), so that an interval above zero shows a rise; ratio: the median over
    images of the smallest margin / constant, negative for images that the masked network gets wrong. Where a draw is
    infinite (a network without any slope) the interval is all numbers.
    """

    alpha: float
    constant: Estimate
    change: Estimate
    ratio: Estimate


def margin_ratios(
    model: nn.Module, x: Tensor, y: Tensor, radius: float, *, norm: float, method: str = "product"
) -> tuple[Tensor, Tensor]:
    """Return, for each image, the largest Lipschitz constant of a margin and the smallest margin / constant: both (N,).

    Labels y are kept whatever the model says. Methods, norms and errors are those of `lipschitz`. Scaling all weights
    scales numerator and denominator alike; a network without any slope has ratio +inf or −inf.
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

    Weights are those of linear and convolutional layers; `layers` names the modules that lose some (None: all, at
    the same rate: jointly). Intervals are Student's, over draws. The theorem bounds the expectation for random masks;
    for trained masks it says nothing: compare `margin_ratios` of a pruned network. Source: Guo et al. 2018.
    Raise UserError for rates outside [0, 1], unknown layers, or fewer than two draws.
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
