"""The region of an attack: a ball around each image, intersected with the image range [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..threat import L0, L2, LINF, distance, norm_name

_REFINEMENTS = 6


@dataclass(frozen=True, eq=False)
class Region:
    """Balls of radius eps (N,) around float64 images x (N, ...), intersected with the box [lower, upper].

    `sided`: bounds over l2 balls leave out pixels that the box prevents from moving in the direction, such as black
    ones. This is valid for every region; certificates do not use it, so that their records stay the same to the last
    bit.
    """

    x: Tensor
    norm: float
    eps: Tensor
    lower: Tensor
    upper: Tensor
    sided: bool = False

    def __getitem__(self, images: slice) -> Region:
        values = (v[images] for v in (self.x, self.eps, self.lower, self.upper))
        return self._of(*values)

    def repeated(self, count: int) -> Region:
        """Return the ball of one image, repeated."""
        x, eps, lower, upper = (v.expand(count, *v.shape[1:]) for v in (self.x, self.eps, self.lower, self.upper))
        return self._of(x, eps, lower, upper)

    def _of(self, x: Tensor, eps: Tensor, lower: Tensor, upper: Tensor) -> Region:
        return Region(x, self.norm, eps, lower, upper, self.sided)

    def minimum(self, a: Tensor, *, refine: bool = False) -> Tensor:
        """Bound a·x' from below over the region: coefficients (N, K, features) to (N, K).

        For linf the bound is attained. For l2 and l1 it is the better of the ball's and the box's; `refine` uses
        both at once for l2, by a few steps on the multiplier of the ball (every multiplier gives a valid bound).
        """
        centre, half = _flat(self.upper + self.lower) / 2, _flat(self.upper - self.lower) / 2
        bound = dot(a, centre) - dot(a.abs(), half)
        if self.norm == LINF:
            return bound
        size = a.abs().amax(2) if self.norm != L2 else distance_rows(self._free(a) if self.sided else a)
        bound = torch.maximum(bound, dot(a, _flat(self.x)) - self.eps[:, None] * size)
        return torch.maximum(bound, self._dual(a)[0]) if refine and self.norm == L2 else bound

    def minimiser(self, a: Tensor) -> Tensor:
        """Return where a·x' is smallest over an l2 ball and the box, to the accuracy of `refine`: (N, K, features)."""
        return _flat(self.x)[:, None] + self._dual(a)[1]

    def _free(self, a: Tensor) -> Tensor:
        """Return the coefficients of pixels that can move against them, others as 0: these add nothing below 0."""
        floor, ceiling = (_flat(side)[:, None] for side in (self.lower >= self.x, self.upper <= self.x))
        return torch.where((a > 0) & floor | (a < 0) & ceiling, 0, a)

    def _dual(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return a lower bound of a·x' (N, K), and the last step d from x.

        Lagrangian of the ball: min over the box of a·d + m(‖d‖² − eps²)/2 is a lower bound for every m > 0.
        """
        low, high = _flat(self.lower - self.x)[:, None], _flat(self.upper - self.x)[:, None]
        square = (self.eps**2)[:, None]
        multiplier = distance_rows(a) / self.eps[:, None].clamp_min(1e-30)
        best, step = torch.full_like(multiplier, -torch.inf), torch.zeros_like(a)
        for _ in range(_REFINEMENTS):
            multiplier = multiplier.clamp_min(1e-30)
            wanted = -a / multiplier[..., None]
            step = wanted.clamp(low, high)
            length = step.square().sum(2)
            best = torch.maximum(best, (a * step).sum(2) + multiplier * (length - square) / 2)
            free = torch.where(step == wanted, a, 0).square().sum(2)
            rest = square - torch.where(step == wanted, 0, step).square().sum(2)
            multiplier = torch.where(rest > 0, (free / rest.clamp_min(1e-30)).sqrt(), multiplier / 2)
        return best + dot(a, _flat(self.x)), step


def region(x: Tensor, norm: float, eps: float | Tensor) -> Region:
    """Return the region of radius eps, a number or (N,), around images x; raise UserError for l0 and other pixels."""
    if norm_name(norm) == norm_name(L0):
        raise UserError("bounds support linf, l2 and l1, not l0, whose ball is not convex; attack it with nearest")
    check_pixels(x)
    x = x.detach().double()
    radius = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x))
    wide = radius.view(-1, *[1] * (x.dim() - 1))
    return Region(x, norm, radius, (x - wide).clamp_min(0), (x + wide).clamp_max(1))


def check_pixels(x: Tensor) -> None:
    """Raise UserError for pixels outside [0, 1]."""
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise UserError("bounds need images in [0, 1]; put the normalisation inside the model and divide bytes by 255")


def distance_rows(a: Tensor) -> Tensor:
    """Return the l2 norm of each row: (N, K, features) to (N, K)."""
    return distance(a.flatten(0, 1), L2).view(a.shape[:2])


def _flat(value: Tensor) -> Tensor:
    return value.flatten(1)


def dot(a: Tensor, v: Tensor) -> Tensor:
    """Return a·v: coefficients (N, K, features) and values (N, features) to (N, K)."""
    return torch.bmm(a, v[..., None]).squeeze(2)
