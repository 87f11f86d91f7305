"""Small random networks of every layer kind, and hostile points in a region, to test bounds against."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.models import Normalise, Residual
from sparring.threat import L2, project, random_point

KINDS = ("mlp", "conv", "grouped", "max-pool", "avg-pool", "batch-norm", "residual")


def network(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Build a random network of a random kind at a random sparsity between 0 and 99%, and its input shape."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    channels, side, kind = pick(1, 2), pick(3, 4), KINDS[seed % len(KINDS)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(Normalise((0.4,) * channels, (0.5,) * channels), *_body(kind, channels, side, pick))
        model.eval()(torch.zeros(2, channels, side, side))  # gives lazy layers their shape
        _randomise_(model, generator, sparsity=(0.0, 0.3, 0.6, 0.9, 0.99)[pick(0, 4)])
    return model.eval(), (channels, side, side)


def _body(kind: str, channels: int, side: int, pick) -> list[nn.Module]:
    classes, width = pick(2, 4), pick(2, 8)
    if kind == "mlp":
        hidden = [nn.Linear(channels * side**2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return [nn.Flatten(), *hidden[: 2 * pick(0, 2)], nn.LazyLinear(classes)]
    first = nn.Conv2d(channels, 4, pick(1, 3), stride=pick(1, 2), padding=pick(0, 1), bias=bool(pick(0, 1)))
    if kind == "conv":
        rest = [nn.ReLU(), nn.Conv2d(4, 3, 2, padding=1, dilation=pick(1, 2)), nn.ReLU()]
    elif kind == "grouped":
        rest = [nn.ReLU(), nn.Conv2d(4, 6, 2, padding=1, groups=2), nn.ReLU(), nn.Dropout()]
    elif kind == "max-pool":
        kernel = pick(2, 3)
        pool = nn.MaxPool2d(kernel, stride=pick(1, 2), padding=1, ceil_mode=bool(pick(0, 1)))
        first = nn.Conv2d(channels, 4, 2, padding=1)
        rest = [pool, *([nn.ReLU()] if pick(0, 1) else [])]
    elif kind == "avg-pool":
        first = nn.Conv2d(channels, 4, 2, padding=1)
        rest = [nn.ReLU(), nn.AvgPool2d(2, stride=pick(1, 2)), nn.Conv2d(4, 4, 1), nn.ReLU()]
    elif kind == "batch-norm":
        rest = [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    else:
        inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        rest = [nn.ReLU(), Residual(inner, nn.Identity() if pick(0, 1) else nn.Conv2d(4, 4, 1))]
    return [first, *rest, nn.Flatten(), nn.LazyLinear(classes)]


class Gated(nn.Module):
    """Scale every channel by a gate that sees all of them (Hu et al. 2018)."""

    def __init__(self, width: int, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.gate = nn.Conv2d(width, width, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * gate


class Mixed(nn.Module):
    """Mix places, then channels, as MLP-Mixer does (Tolstikhin et al. 2021), and scale by constants of all shapes."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.across, self.along = nn.Linear(places, places), nn.Linear(width, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2).transpose(1, 2)
        h = h + F.gelu(self.across(h.transpose(1, 2))).transpose(1, 2) * self.token
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        h[:, :2, 1:] = F.relu(h[:, 1:3, 1:])
        h[:, 2] = self.token[0, 0] - h[:, 3]
        return F.silu(self.along(h))[:, 1:].mean(1)


def smooth_network(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Build a random network of smooth activations, gates and moved axes, and its input shape."""
    activations = [nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Hardswish()]
    generator = torch.Generator().manual_seed(seed)
    act, other = activations[seed % 6], activations[(seed + 1) % 6]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Conv2d(1, 4, 2, padding=1)
        bodies = (
            [act, nn.Conv2d(4, 3, 3, padding=1), other, nn.Flatten(), nn.Linear(48, 3)],
            [nn.ReLU(), Gated(4, other), nn.Conv2d(4, 3, 2), act, nn.Flatten(), nn.Linear(27, 3)],
            [Mixed(4, 16), act, nn.Linear(4, 3)],
        )
        model = nn.Sequential(Normalise((0.4,), (0.5,)), first, *bodies[seed // 2 % 3])
        _randomise_(model, generator, sparsity=0.1)
    return model.eval(), (1, 3, 3)


def _randomise_(model: nn.Module, generator: torch.Generator, *, sparsity: float) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.2)
                module.weight.copy_(torch.randn(module.num_features, generator=generator))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2 * (torch.rand(parameter.shape, generator=generator) >= sparsity))


def hostile_points(
    model: nn.Module, x: Tensor, y: int, norm: float, eps: float, *, points: int, generator: torch.Generator
) -> Tensor:
    """Return sampled and attacked points around one image x (1, ...), in ball and box: (5·points, ...), float64.

    The attack runs in float32; its points are projected in float64.
    """
    origin, x = x, x.float()
    start = random_point(x.expand(points, *x.shape[1:]), norm, eps, generator)
    signs = start.sign() * eps if norm == math.inf else project(start * 1e6, norm, eps)
    far = torch.arange(points).view(-1, *[1] * (x.dim() - 1)) % 2 == 0  # half of them on the sphere or in corners
    found = (x + torch.where(far, signs, start)).clamp(0, 1)
    classes = model(x).shape[1]
    target = (y + 1 + torch.arange(points) % (classes - 1)) % classes
    steps = [found]
    for size in (0.7, 0.3, 0.1, 0.05):
        found = found.detach().requires_grad_()
        logits = model(found)
        gap = logits[:, y] - logits.gather(1, target[:, None]).squeeze(1)
        (slope,) = torch.autograd.grad(gap.sum(), found)
        step = slope.sign() if norm != L2 else slope / slope.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        found = (x + project(found.detach() - size * 2 * eps * step - x, norm, eps)).clamp(0, 1)
        steps.append(found)
    return (origin + project(torch.cat(steps).detach().double() - origin, norm, eps)).clamp(0, 1)


def double(model: nn.Module) -> nn.Module:
    """Return a float64 copy in eval mode."""
    return copy.deepcopy(model).double().eval()
