"""Threat models: distances, duals, projections and random points, by norm.

Everything that depends on the norm of a perturbation is looked up here, so an attack reads the same for every norm.
Batches have shape (N, ...); a norm reduces everything but the first axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from .draws import Draws, Source, drawn_at
from .errors import Unsupported, UserError
from .units import L0, L1, L2, LINF, norm_name, parse_eps, parse_norm

__all__ = [
    "L0",
    "L1",
    "L2",
    "LINF",
    "Threat",
    "diameter",
    "distance",
    "dual",
    "gaussian",
    "norm_name",
    "parse_norm",
    "project",
    "random_point",
    "uniform",
]


class _Threat(NamedTuple):
    norm: float
    eps: float | None


class Threat(_Threat):
    """Describe an attacker who moves an image by at most eps in a norm (eps None: by as little as possible).

    In l0 eps counts values, one for each channel of a pixel. Norms and budgets may be texts such as "L2" and "8/255".
    Raise UserError for an unknown norm or a bad budget.
    """

    __slots__ = ()

    def __new__(cls, norm: float | str, eps: float | str | None = None) -> Self:
        norm, eps = parse_norm(norm), None if eps is None else parse_eps(eps)
        if norm == LINF and eps is not None and eps > 1:
            raise UserError(f"eps {eps} is larger than the image range [0, 1]; divide eps by 255")
        return super().__new__(cls, norm, eps)


def dual(norm: float) -> float:
    """Return q with 1/p + 1/q = 1; raise Unsupported for l0, which is not a norm."""
    if norm == L0:
        raise Unsupported("l0 is not a norm and has no dual")
    return {LINF: L1, L2: L2, L1: LINF}[norm]


def distance(delta: Tensor, norm: float) -> Tensor:
    """Return the norm of each perturbation: (N, ...) to (N,), in pixel units where an image spans [0, 1].

    In l0 it is the number of values that differ from 0.
    """
    flat = delta.flatten(1)
    # The same number ten times as fast as vector_norm's maximum.
    result: Tensor = flat.abs().amax(1) if norm == LINF else torch.linalg.vector_norm(flat, ord=norm, dim=1)
    return result


def diameter(x: Tensor, norm: float) -> float:
    """Return the largest distance between two images in [0, 1] of the shape of those in x (N, ...)."""
    pixels = float(x[0].numel())
    return {LINF: 1.0, L2: math.sqrt(pixels)}.get(norm, pixels)


def project(delta: Tensor, norm: float, eps: float | Tensor) -> Tensor:
    """Return the point of the eps-ball nearest (in l2) to each perturbation; eps is a number or has shape (N,)."""
    radius = eps.to(delta.dtype) if isinstance(eps, Tensor) else delta.new_full((len(delta),), eps)
    radius = radius.view(-1, *[1] * (delta.dim() - 1))
    if norm == LINF:
        return torch.minimum(torch.maximum(delta, -radius), radius)
    if norm == L2:
        length = distance(delta, L2).view_as(radius)
        return delta * (radius / length.clamp_min(1e-30)).clamp_max(1.0)
    if norm == L0:
        rank = delta.flatten(1).abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return delta * (rank < radius.flatten(1).floor()).view_as(delta)
    return _project_l1(delta, radius)


def _project_l1(delta: Tensor, radius: Tensor) -> Tensor:
    # Duchi et al. 2008, figure 1: soft-threshold at the level that makes the absolute values sum to the radius.
    flat = delta.flatten(1).abs()
    ordered = flat.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - radius.flatten(1)
    counts = torch.arange(1, flat.shape[1] + 1, device=delta.device, dtype=delta.dtype)
    last = (ordered * counts > excess).sum(1, keepdim=True).clamp_min(1)
    level = (excess.gather(1, last - 1) / last).clamp_min(0)
    shrunk: Tensor = (flat - level).clamp_min(0)
    result: Tensor = (shrunk * delta.flatten(1).sign()).view_as(delta)
    return result


def uniform(shape: Sequence[int], like: Tensor, source: Source = None) -> Tensor:
    """Draw numbers from [0, 1) with the dtype and on the device of `like`; the first axis is that of the images.

    They are drawn on a generator's device, so that a CPU generator gives the same numbers for a GPU.
    """
    if isinstance(source, Draws):
        return source.uniform(shape[1:], like)
    device = like.device if source is None else source.device
    return torch.rand(tuple(shape), generator=source, dtype=like.dtype, device=device).to(like.device)


def gaussian(shape: Sequence[int], like: Tensor, source: Source = None) -> Tensor:
    """Draw standard normal numbers in the same way as `uniform`."""
    if isinstance(source, Draws):
        return source.normal(shape[1:], like)
    device = like.device if source is None else source.device
    return torch.randn(tuple(shape), generator=source, dtype=like.dtype, device=device).to(like.device)


def random_point(like: Tensor, norm: float, eps: float, source: Source = None) -> Tensor:
    """Draw a point uniformly from the eps-ball for each image; `like` sets the shape, dtype and device.

    Raise Unsupported for l0, whose ball is not bounded.
    """
    if norm == L0:
        raise Unsupported("the l0 ball is not bounded and has no uniform points")
    shape, flat = like.shape, like.flatten(1)
    if norm == LINF:
        return (uniform(shape, like, source) * 2 - 1) * eps
    dimension = flat.shape[1]
    radius = uniform((len(like), 1), like, drawn_at(source, 1)) ** (1 / dimension)
    if norm == L2:
        direction = gaussian(flat.shape, like, source)
        unit = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
    else:
        # Exponential magnitudes normalised by their sum are uniform on the simplex; signs are fair coins.
        size = -torch.log1p(-uniform(flat.shape, like, source))
        coin = uniform(flat.shape, like, drawn_at(source, 2)) < 0.5
        unit = torch.where(coin, -size, size) / size.sum(1, keepdim=True).clamp_min(1e-30)
    point: Tensor = unit * radius * eps
    return point.view(shape)
