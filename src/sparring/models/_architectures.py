"""The built-in networks, and a few layers that torch does not have.

Each adapts to the data's shape and number of classes and normalises first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..graph import Add, Affine, Step

Shape = tuple[int, int, int]
Floats = tuple[float, ...]


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation per channel; a model's first layer, so attacks see [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def steps(self, dtype: torch.dtype) -> list[Step]:
        """Describe what forward() computes; see `graph.Stepwise`."""
        mean, std = self.mean.to(dtype).flatten(), self.std.to(dtype).flatten()
        one = torch.ones_like(mean)
        return [(Affine("", one, -mean), (0,)), (Affine("", one / std, torch.zeros_like(one)), (1,))]


class Residual(nn.Module):
    """Compute relu(body(x) + shortcut(x)) (He et al. 2016, figure 2)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return result

    def steps(self, dtype: torch.dtype) -> list[Step]:
        """Describe what forward() computes; see `graph.Stepwise`."""
        return [(self.body, (0,)), (self.shortcut, (0,)), (Add(), (1, 2)), (self.relu, (3,))]


def mlp(shape: Shape, classes: int, mean: Floats, std: Floats, *, widths: Sequence[int] = (300, 100)) -> nn.Sequential:
    """Build a fully connected ReLU network with the given hidden widths."""
    layers: list[nn.Module] = [Normalise(mean, std), nn.Flatten()]
    features = math.prod(shape)
    for width in widths:
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


def linear(shape: Shape, classes: int, mean: Floats, std: Floats) -> nn.Sequential:
    """Build a linear classifier."""
    return mlp(shape, classes, mean, std, widths=())


def lenet_300_100(shape: Shape, classes: int, mean: Floats, std: Floats, *, width: float = 1.0) -> nn.Sequential:
    """Build LeNet-300-100 (LeCun et al. 1998): two hidden layers of 300 and 100 units, scaled by `width`."""
    return mlp(shape, classes, mean, std, widths=(_scaled(300, width), _scaled(100, width)))


def lenet_5(shape: Shape, classes: int, mean: Floats, std: Floats, *, width: float = 1.0) -> nn.Sequential:
    """Build Caffe's LeNet-5: conv20 5×5, pool, conv50 5×5, pool, fc500, ReLU, fc; channels scaled by `width`."""
    side = [_after_lenet_pools(s) for s in shape[1:]]
    first, second, hidden = _scaled(20, width), _scaled(50, width), _scaled(500, width)
    return nn.Sequential(
        Normalise(mean, std),
        nn.Conv2d(shape[0], first, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * side[0] * side[1], hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def _after_lenet_pools(side: int) -> int:
    result = ((side - 4) // 2 - 4) // 2
    if result < 1:
        raise UserError(f"lenet-5 needs images of at least 16 × 16 pixels, not of side {side}")
    return result


def small_cnn(shape: Shape, classes: int, mean: Floats, std: Floats, *, width: float = 1.0) -> nn.Sequential:
    """Build the small network of work on verification: conv16 4×4, conv32 4×4, both with stride 2, fc100, fc.

    Source: Wong & Kolter 2018. Nothing but ReLUs is nonlinear.
    """
    first, second, hidden = _scaled(16, width), _scaled(32, width), _scaled(100, width)
    side = [s // 2 // 2 for s in shape[1:]]
    convolutions = (nn.Conv2d(shape[0], first, 4, 2, 1), nn.ReLU(), nn.Conv2d(first, second, 4, 2, 1), nn.ReLU())
    last = (nn.Linear(second * side[0] * side[1], hidden), nn.ReLU(), nn.Linear(hidden, classes))
    return nn.Sequential(Normalise(mean, std), *convolutions, nn.Flatten(), *last)


def vgg_like(shape: Shape, classes: int, mean: Floats, std: Floats, *, width: float = 1.0) -> nn.Sequential:
    """Build the VGG-like network: six 3×3 convolutions (128-128-256-256-512-512) with batch norm, fc1024 twice."""
    if min(shape[1:]) < 8:
        raise UserError(f"vgg-like needs images of at least 8 × 8 pixels, not {shape[1]} × {shape[2]}")
    layers: list[nn.Module] = [Normalise(mean, std)]
    channels = shape[0]
    for stage in (128, 256, 512):
        for _ in range(2):
            out = _scaled(stage, width)
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
    features = channels * (shape[1] // 8) * (shape[2] // 8)
    hidden = _scaled(1024, width)
    layers += [nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def resnet_32(
    shape: Shape, classes: int, mean: Floats, std: Floats, *, width: float = 1.0, depth: int = 32
) -> nn.Sequential:
    """Build the CIFAR residual network of He et al. 2016 (depth 6n + 2, widths 16-32-64, 1×1 projections)."""
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"a CIFAR residual network has depth 6n + 2 (8, 14, 20, 26, 32, ...), not {depth}")
    channels = _scaled(16, width)
    layers: list[nn.Module] = [Normalise(mean, std), *_conv_bn(shape[0], channels, 3, 1), nn.ReLU()]
    for stage, base in enumerate((16, 32, 64)):
        out = _scaled(base, width)
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(_block(channels, out, stride))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _block(channels: int, out: int, stride: int) -> Residual:
    body = nn.Sequential(*_conv_bn(channels, out, 3, stride), nn.ReLU(), *_conv_bn(out, out, 3, 1))
    same = channels == out and stride == 1
    return Residual(body, nn.Identity() if same else nn.Sequential(*_conv_bn(channels, out, 1, stride)))


def _conv_bn(channels: int, out: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(out)


def _scaled(size: int, width: float) -> int:
    if not 0 < width <= 64:
        raise UserError(f"width must be above 0 and at most 64, not {width}")
    return max(1, round(size * width))
