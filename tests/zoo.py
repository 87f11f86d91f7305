"""Small networks in the manner of torchvision's and timm's, for images of one channel: each has a habit of theirs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ZOO", "kill_"]

CLASSES = 10


class ResidualBlock(nn.Module):
    """Convolve, add what came in, and activate in place: the module is used twice, as in torchvision's ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class PreActivationBlock(nn.Module):
    """Activate in place before the shortcut is taken: the shortcut carries relu(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(self.relu(x))
        out += x
        return out


class DepthwiseBlock(nn.Module):
    """An inverted residual block of MobileNet: expand, filter every channel alone, project."""

    def __init__(self, width: int, expanded: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            nn.ReLU6(inplace=True),
            nn.Conv2d(expanded, expanded, 3, padding=1, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            nn.ReLU6(inplace=True),
            nn.Conv2d(expanded, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate that sees all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, 2, 1)
        self.act = nn.SiLU(inplace=True)
        self.expand = nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * self.expand(self.act(self.reduce(gate))).sigmoid()


class DenseBlock(nn.Module):
    """Concatenate what is new to all that was there, as DenseNet does."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width + i * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d(width + i * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Transformer(nn.Module):
    """Four patches and a class token through pre-norm attention, as a ViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.places = nn.Parameter(0.02 * torch.randn(1, 5, 8))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
        seen = self.norm1(h)
        h = h + self.attention(seen, seen, seen, need_weights=False)[0]
        h = h + self.mlp(self.norm2(h))
        return self.head(self.norm3(h)[:, 0])


class Rows(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn((x[:, 0] - 0.5) / 0.5)
        return self.head(states[:, -1])


class Twice(nn.Module):
    """One tensor goes two ways, and one layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(64, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        up, down = F.relu(h), F.relu(-h)
        return self.head(F.relu(self.shared(up)) + F.relu(self.shared(down)) + h)


class Written(nn.Module):
    """Activations in place everywhere, functional ones too, and an augmented assignment on a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.fc, self.head = nn.Linear(24, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1((x - 0.5) / 0.5), inplace=True)
        g = h = self.conv2(h)
        g += 0.1
        h.relu_()
        return self.head(F.relu_(self.fc(h.flatten(1))))


class ConvNeXt(nn.Module):
    """A block of ConvNeXt behind its stem: channels last between permutations, LayerScale, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.expand, self.project = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma = nn.Parameter(0.5 * torch.ones(8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        h = self.norm1(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.gamma * self.project(F.gelu(self.expand(h)))
        x = x + h.permute(0, 3, 1, 2)
        return self.head(self.norm2(x.mean((-2, -1))))


class Swin(nn.Module):
    """Attention within windows that are shifted, with a bias of relative places, as Swin's blocks have."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)
        self.places = nn.Parameter(0.02 * torch.randn(1, 2, 4, 4))
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def windows(self, h: Tensor) -> Tensor:
        """Attend within each 2×2 window of a 4×4 map, moved by one."""
        count = h.shape[0]
        h = torch.roll(h, (-1, -1), (1, 2)).view(count, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
        q, k, v = self.qkv(h).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / 2 + self.places).softmax(-1)
        h = self.proj((weights @ v).transpose(1, 2).reshape(-1, 4, 8))
        h = h.view(count, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(count, 4, 4, 8)
        return torch.roll(h, (1, 1), (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).permute(0, 2, 3, 1)
        h = h + self.windows(self.norm1(h))
        h = h + self.mlp(self.norm2(h))
        return self.head(self.norm3(h).mean((1, 2)))


class InceptionBlock(nn.Module):
    """Three branches of other kernels, one of which pools, side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = self.branch(width, 2, 1)
        self.three = nn.Sequential(self.branch(width, 2, 1), self.branch(2, 3, 3))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), self.branch(width, 2, 1))

    @staticmethod
    def branch(width: int, out: int, kernel: int) -> nn.Module:
        layers = [nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out, eps=0.001)]
        return nn.Sequential(*layers, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.pooled(x)], 1)


def _with_stem(width: int, *body: nn.Module, out: int | None = None) -> nn.Module:
    stem = [nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)]
    if not isinstance(body[0], PreActivationBlock):
        stem.append(nn.ReLU(inplace=True))
    pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * (out or width), CLASSES)]
    return nn.Sequential(*stem, *body, *pool)


def dropout() -> nn.Module:
    """Return a VGG-like network with dropout in place."""
    features = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout2d(0.2, inplace=True)]
    classifier = [nn.Flatten(), nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(16, CLASSES)]
    return nn.Sequential(*features, *classifier)


ZOO: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: _with_stem(4, ResidualBlock(4)),
    "pre-activation": lambda: _with_stem(4, PreActivationBlock(4), nn.ReLU(inplace=True)),
    "depthwise": lambda: _with_stem(4, DepthwiseBlock(4, 8)),
    "squeeze-excite": lambda: _with_stem(4, SqueezeExcite(4)),
    "dense-concatenation": lambda: _with_stem(4, DenseBlock(4, 3), nn.BatchNorm2d(10), nn.ReLU(inplace=True), out=10),
    "attention": Transformer,
    "recurrent": Rows,
    "twice": Twice,
    "dropout": dropout,
    "in-place": Written,
    "convnext": ConvNeXt,
    "swin": Swin,
    "inception": lambda: _with_stem(4, InceptionBlock(4), out=7),
}


def kill_(model: nn.Module, share: float = 1.0) -> nn.Module:
    """Make a share of the units of the first activated layer that has a bias dead, whatever the image, in place."""
    layers = [
        m for n, m in model.named_modules() if n not in ("patches", "norm1", "norm2", "norm3", "attention.out_proj")
    ]
    first = next(m for m in layers if isinstance(getattr(m, "bias", None), nn.Parameter))
    with torch.no_grad():
        first.bias[: round(share * len(first.bias))] = -100.0
    return model
