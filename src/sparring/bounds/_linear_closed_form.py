"""Linear classifiers in closed form: the theorem that links ℓ∞ robustness to ‖w‖₁ and ℓ2 robustness to ‖w‖₂.

Every quantity has two forms, both exact: unboxed (the theorem's: perturbed pixels may leave [0, 1]) and boxed (they may
not, as in every attack). With more than two classes the distance is the smallest over the other classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import Unsupported, UserError
from ..graph import Affine, AvgPool, Conv2d, Flatten, Input, Linear
from ..threat import L0, L1, L2, LINF, dual, norm_name
from ._network import adjoint, others, prepare
from ._region import dot


class LinearMap(NamedTuple):
    """A model that is linear in its input, multiplied out: weight (classes, pixels), bias (classes,), float64.

    Functions of linear models accept it instead of a model, and then do not read the model again.
    """

    weight: Tensor
    bias: Tensor


def weights_of(model: nn.Module, shape: tuple[int, ...], *, images: Tensor | None = None) -> LinearMap:
    """Return the linear map of a model that is linear in its input, for images of `shape`.

    Normalisation and convolutions are multiplied out. Raises Unsupported if any operation is not linear.
    """
    graph = prepare(model, shape, images=images)
    (classes,) = graph.nodes[-1].shape
    rows = torch.eye(classes, dtype=torch.float64)
    for node in reversed(graph.nodes[1:]):
        if not isinstance(node.op, Linear | Conv2d | Affine | AvgPool | Flatten):
            raise Unsupported(f"the model is not linear: it has the {node.title}")
        rows = adjoint(node.op, rows, graph.nodes[node.inputs[0]].shape)
    assert isinstance(graph.nodes[0].op, Input)
    bias = graph(torch.zeros(1, *graph.nodes[0].shape, dtype=torch.float64))[0]
    return LinearMap(rows.flatten(1), bias)


def _read(model: nn.Module | LinearMap, x: Tensor) -> LinearMap:
    return model if isinstance(model, LinearMap) else weights_of(model, tuple(x.shape[1:]), images=x)


def _margins(model: nn.Module | LinearMap, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margins (N, classes − 1) and the weights behind them (N, classes − 1, pixels), float64."""
    weight, bias = _read(model, x)
    rivals = others(y, len(weight))
    slopes = weight[y][:, None] - weight[rivals]
    margins = dot(slopes, x.double().flatten(1))
    return margins + (bias[y][:, None] - bias[rivals]), slopes


def linear_distance(model: nn.Module | LinearMap, x: Tensor, y: Tensor, norm: float, *, boxed: bool = True) -> Tensor:
    """Return the exact distance of images x (N, ...) to the decision boundary of a linear model: (N,), float64.

    Zero if the model is wrong, infinite if no perturbation inside the box suffices. Without the box: margin / ‖w‖_q
    with 1/p + 1/q = 1, and 1 for l0. With the box, room_i is the distance of pixel i to the box in the harmful
    direction. For linf and l2 it moves by min(t·s_i, room_i), where s_i is 1 (linf) or |w_i| (l2), and t is the level
    at which the margin vanishes. For l1 pixels use up their room in the order of |w_i|, and the last one moves as far
    as necessary; for l0 in the order of |w_i|·room_i. Raises Unsupported for a model that is not linear.
    """
    return linear_distances(model, x, y, [(norm, boxed)])[0]


def linear_distances(
    model: nn.Module | LinearMap, x: Tensor, y: Tensor, kinds: Sequence[tuple[float, bool]]
) -> list[Tensor]:
    """Return `linear_distance` for several pairs of norm and boxed, computing the margins only once."""
    for norm, _ in kinds:
        norm_name(norm)
    margin, w = _margins(model, x, y)
    used = (w != 0).any(1).any(0)  # the other pixels have no effect
    used[0] = True  # a constant classifier uses none
    w = w[:, :, used]
    room = _room(x.flatten(1)[:, used], w)
    right = (margin > 0).all(1)
    found = (_boxed(margin, w, room, norm) if boxed else _unboxed(margin, w, norm) for norm, boxed in kinds)
    return [torch.where(right, distances.amin(1), 0.0) for distances in found]


def linear_fooled(model: nn.Module | LinearMap, x: Tensor, y: Tensor) -> Tensor:
    """Return whether a linear model misclassifies or ties each image x (N, ...), in float64: (N,), bool."""
    margin, _ = _margins(model, x, y)
    return (margin <= 0).any(1)


def _unboxed(margin: Tensor, w: Tensor, norm: float) -> Tensor:
    size = torch.linalg.vector_norm(w, ord=LINF if norm == L0 else dual(norm), dim=2)
    far = torch.ones_like(margin) if norm == L0 else margin / size.clamp_min(1e-300)
    return torch.where(size > 0, far, torch.inf)


def _room(x: Tensor, w: Tensor) -> Tensor:
    pixels = x.double().flatten(1)[:, None]
    return torch.where(w > 0, pixels, 1 - pixels)


def _boxed(margin: Tensor, w: Tensor, room: Tensor, norm: float) -> Tensor:
    size = w.abs()
    if norm in (L0, L1):
        return _in_turn(margin, size, room, norm)
    speed = torch.ones_like(size) if norm == LINF else size
    # Loss of margin at level t: Σ |w_i|·min(t·s_i, room_i), concave and piecewise linear, with kinks at room_i / s_i.
    kink = torch.where(size > 0, room / speed.clamp_min(1e-300), torch.inf)
    kink, order = kink.sort(dim=2)
    gain, spent = (size * speed).gather(2, order), (size * room).gather(2, order)
    gone = spent.cumsum(2) - spent  # from pixels that reached the box before this kink
    rate = gain.flip(2).cumsum(2).flip(2)
    # A concave curve lies below the extensions of its pieces: the last of their crossings is its own.
    level = torch.where(rate > 0, (margin[..., None] - gone) / rate.clamp_min(1e-300), -torch.inf).amax(2)
    level = torch.where(margin <= spent.sum(2), level, torch.inf)
    if norm == LINF:
        return level
    moved = torch.minimum(level[..., None] * size, room)
    return torch.where(level < torch.inf, moved.nan_to_num(0.0).square().sum(2).sqrt(), torch.inf)


def _in_turn(margin: Tensor, size: Tensor, room: Tensor, norm: float) -> Tensor:
    """Return the boxed distance in l1 or l0: pixels are used up in turn, those with the largest gain per cost first."""
    gains = size * room
    order = (size if norm == L1 else gains).argsort(dim=2, descending=True)
    gains, room = gains.gather(2, order), room.gather(2, order)
    missing = margin[..., None] - (gains.cumsum(2) - gains)
    share = torch.where(gains > 0, missing / gains.clamp_min(1e-300), 0.0).clamp(0, 1)
    cost = share * room if norm == L1 else share.ceil()
    return torch.where(margin <= gains.sum(2), cost.sum(2), torch.inf)


def linear_r_inf(model: nn.Module | LinearMap, x: Tensor, y: Tensor, eps: float, *, boxed: bool = True) -> float:
    """Return the accuracy of a linear model under the worst linf perturbation of size eps.

    For two classes this is the accuracy under FGSM; for more, FGSM is not the worst case.
    """
    margin, w = _margins(model, x, y)
    reach = _room(x, w).clamp_max(eps) if boxed else torch.full_like(w, eps)
    return float((margin > (w.abs() * reach).sum(2)).all(1).double().mean())


def linear_r_2(model: nn.Module | LinearMap, x: Tensor, y: Tensor, *, boxed: bool = True) -> float:
    """Return the mean l2 distance to the boundary over all images, with 0 for misclassified ones."""
    return float(linear_distance(model, x, y, L2, boxed=boxed).mean())


@dataclass(frozen=True)
class Theorem:
    """The quantities of the theorem for f = w·x + b, two classes, without the box.

    `numerator` is E[1(y·f > 0)·y·f]. `by_means` is the same value from class frequencies, accuracies and the means of
    the correctly classified images. `balanced` is t·w·(μ₊ − μ₋)/2, which needs balanced classes and equal accuracies.
    r_2 = numerator / ‖w‖₂ and r_inf ≤ markov = numerator / (eps·‖w‖₁).
    """

    accuracy: float
    l1: float
    l2: float
    nonzero: int
    numerator: float
    by_means: float
    balanced: float
    r_inf: float
    markov: float
    r_2: float


def theorem(model: nn.Module | LinearMap, x: Tensor, y: Tensor, eps: float) -> Theorem:
    """Evaluate the linear theorem (docs/theory.md) for a two-class linear model on images x with labels y in {0, 1}.

    Raise UserError for another number of classes, Unsupported for a model that is not linear.
    """
    linear = _read(model, x)
    weight, bias = linear
    if len(weight) != 2:
        raise UserError(f"the theorem needs two classes, but the model has {len(weight)}; use linear_distance")
    w, b = weight[1] - weight[0], bias[1] - bias[0]
    pixels, sign = x.double().flatten(1), 2.0 * y - 1
    signed = sign * (pixels @ w + b)
    right = signed > 0
    l1, l2 = float(w.abs().sum()), float(w.norm())
    numerator = float(torch.where(right, signed, 0).mean())
    by_means, means = 0.0, []
    for label, s in ((1, 1.0), (0, -1.0)):
        chosen = right & (y == label)
        means.append(pixels[chosen].mean(0) if bool(chosen.any()) else torch.zeros_like(w))
        by_means += float(chosen.double().mean()) * s * float(w @ means[-1] + b)
    accuracy = float(right.double().mean())
    return Theorem(
        accuracy=accuracy,
        l1=l1,
        l2=l2,
        nonzero=int((w != 0).sum()),
        numerator=numerator,
        by_means=by_means,
        balanced=accuracy * float(w @ (means[0] - means[1])) / 2,
        r_inf=linear_r_inf(linear, x, y, eps, boxed=False),
        markov=numerator / (eps * l1) if eps * l1 > 0 else math.inf,
        r_2=linear_r_2(linear, x, y, boxed=False),
    )
