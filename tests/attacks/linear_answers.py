"""A linear model whose distances have a closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparring.threat import dual


class Affine(nn.Module):
    """Two classes, logits (0, w·x + b): every distance has a closed form."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(score), score], dim=1)


def affine_problem(seed: int, *, features: int = 20, images: int = 40, on_box: bool) -> tuple[Affine, Tensor, Tensor]:
    """Return a linear model with images that it classifies correctly, many of their pixels on the box or none near."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(features, generator=generator)
    x = torch.rand(3 * images, 1, features, 1, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.6, x.round(), x) if on_box else 0.4 + 0.2 * x
    score = x.flatten(1) @ weight
    bias = -float(score.median())
    # Images next to the boundary say nothing about an attack: there rounding and fixed step lengths rule.
    x = x[(score + bias).abs().topk(images).indices]
    model = Affine(weight, bias).eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    return model, x, y


def unboxed_distance(model: Affine, x: Tensor, norm: float) -> Tensor:
    """Return the exact distance to the boundary where pixels may take any value: |f| over the dual norm of w."""
    weight = model.weight.detach().double()
    score = x.flatten(1).double() @ weight + model.bias.detach().double()
    return score.abs() / torch.linalg.vector_norm(weight, ord=dual(norm))


def boxed_distance(model: Affine, x: Tensor, y: Tensor, norm: float) -> Tensor:
    """Return the exact distance to the boundary inside the box, by bisection on the multiplier in float64."""
    weight = model.weight.detach().double()
    base = x.flatten(1).double()
    score = base @ weight + model.bias.detach().double()
    push = torch.where(y.bool(), -1.0, 1.0).double().unsqueeze(1) * weight
    room = torch.where(push > 0, 1 - base, base)
    if norm == 1:
        return _boxed_l1(push.abs(), room, score.abs())
    if norm == 0:
        gained = (push.abs() * room).sort(dim=1, descending=True).values.cumsum(1)
        return (gained < score.abs().unsqueeze(1)).sum(1) + 1.0
    speed = torch.ones_like(push) if norm == float("inf") else push.abs()
    low, high = torch.zeros(len(x), 1, dtype=torch.float64), torch.full((len(x), 1), 1e6, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        gained = (torch.minimum(speed * middle, room) * push.abs()).sum(1)
        enough = (gained >= score.abs()).unsqueeze(1)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    moved = torch.minimum(speed * high, room)
    gained = (moved * push.abs()).sum(1)
    exact = torch.linalg.vector_norm(moved, ord=norm, dim=1)
    return torch.where(gained >= score.abs() * (1 - 1e-9), exact, torch.inf)


def _boxed_l1(slope: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """Return the least total movement: pixels are used up in the order of their slope (a fractional knapsack)."""
    exact = []
    for slopes, rooms, missing in zip(slope.tolist(), room.tolist(), gap.tolist(), strict=True):
        moved, left = 0.0, missing
        for rate, limit in sorted(zip(slopes, rooms, strict=True), reverse=True):
            step = min(limit, left / rate)
            moved, left = moved + step, left - rate * step
        exact.append(moved if left <= 1e-12 else float("inf"))
    return torch.tensor(exact, dtype=torch.float64)
