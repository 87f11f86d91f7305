"""Networks that people have, written as torchvision, timm and Hugging Face write them, at a width that costs little.

Each takes the shape of an image (channels, height, width), the number of classes, its first width and the blocks of its
stages.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .transformers import FusedAttention, HuggingFaceViT, Mixer, SpelledAttention, Swin, TorchAttention, ViT, convnext

__all__ = ["ARCHITECTURES", "FIRST_ROUND"]

Shape = tuple[int, ...]
Blocks = tuple[int, ...]
ReLU = partial(nn.ReLU, inplace=True)
ReLU6, Hardswish, SiLU = (partial(act, inplace=True) for act in (nn.ReLU6, nn.Hardswish, nn.SiLU))
Act = Callable[[], nn.Module]


def conv_bn(
    wide: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: Act | None = ReLU
) -> nn.Sequential:
    """Return a convolution that keeps the size, batch normalisation and an activation in place."""
    conv = nn.Conv2d(wide, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), *([act()] if act else []))


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate that sees all of them."""

    def __init__(self, wide: int, inner: int, act: Act = ReLU, gate: Act = nn.Sigmoid) -> None:
        super().__init__()
        self.avgpool, self.activation, self.scale_activation = nn.AdaptiveAvgPool2d(1), act(), gate()
        self.fc1, self.fc2 = nn.Conv2d(wide, inner, 1), nn.Conv2d(inner, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


# -- residual networks ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """The basic block and the bottleneck of ResNet, and RegNet's: one activation for all, and an addition in place."""

    def __init__(self, wide: int, inner: int, out: int, stride: int, *, groups: int = 0, gate: bool = False) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        if out == inner and not groups:
            body = [conv_bn(wide, inner, 3, stride, act=None), conv_bn(inner, out, 3, act=None)]
        else:
            middle = conv_bn(inner, inner, 3, stride, groups or 1, act=None)
            body = [conv_bn(wide, inner, act=None), middle, conv_bn(inner, out, act=None)]
        self.body = nn.ModuleList(body)
        self.gate = SqueezeExcite(inner, max(wide // 4, 1)) if gate else None
        self.downsample = None if wide == out and stride == 1 else conv_bn(wide, out, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        for layer in self.body[:-1]:
            x = self.relu(layer(x))
        if self.gate is not None:
            x = self.gate(x)
        out = self.body[-1](x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Four stages of residual blocks behind a stem that pools."""

    def __init__(self, shape: Shape, classes: int, width: int, blocks: Blocks, expansion: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], width, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        wide, stages = width, []
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            for block in range(count):
                stride = 2 if stage and not block else 1
                stages.append(Residual(wide, inner, wide := inner * expansion, stride))
        self.stages, self.avgpool = nn.Sequential(*stages), nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreActivation(nn.Module):
    """The block of Wide-ResNet: its shortcut carries the activated input where widths differ."""

    def __init__(self, wide: int, out: int, stride: int, drop: float = 0.3) -> None:
        super().__init__()
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(wide), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(wide, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.drop, self.same = drop, wide == out
        self.shortcut = None if self.same else nn.Conv2d(wide, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            out = self.relu(self.bn1(x))
        else:
            x = out = self.relu(self.bn1(x))
        out = self.relu(self.bn2(self.conv1(out)))
        out = self.conv2(F.dropout(out, self.drop, self.training))
        return torch.add(x if self.shortcut is None else self.shortcut(x), out)


class WideResNet(nn.Module):
    def __init__(self, shape: Shape, classes: int, width: int, blocks: Blocks) -> None:
        super().__init__()
        self.conv1, wide, layers = nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), width, []
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                layers.append(PreActivation(wide, wide := 2 * width * 2**stage, stride))
        self.layers, self.bn, self.fc = nn.Sequential(*layers), nn.BatchNorm2d(wide), nn.Linear(wide, classes)
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.layers(self.conv1(x))), inplace=True)
        return self.fc(F.avg_pool2d(x, 8).mean((2, 3)).view(-1, self.wide))


class RegNet(nn.Module):
    def __init__(self, shape: Shape, classes: int, width: int, blocks: Blocks, *, gate: bool) -> None:
        super().__init__()
        self.stem, wide, body = conv_bn(shape[0], width, 3, 2), width, []
        for stage, count in enumerate(blocks):
            for block in range(count):
                out = width * (stage + 1)
                body.append(Residual(wide, out, out, 1 if block else 2, groups=out // (width // 2), gate=gate))
                wide = out
        self.trunk, self.avgpool, self.fc = nn.Sequential(*body), nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.trunk(self.stem(x))).flatten(start_dim=1))


# -- plain and concatenating networks ---------------------------------------------------------------------------------


class VGG(nn.Module):
    """VGG with batch normalisation: pooled to 7×7 whatever the size, then three layers with dropout."""

    def __init__(self, shape: Shape, classes: int, width: int, blocks: Blocks, side: int = 7) -> None:
        super().__init__()
        layers, wide = [], shape[0]
        for stage, count in enumerate(blocks):
            for _ in range(count):
                out = width * min(2**stage, 8)
                layers += [nn.Conv2d(wide, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                wide = out
            layers.append(nn.MaxPool2d(2, 2))
        self.features, self.avgpool, inner = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((side, side)), 8 * width
        hidden = [nn.Linear(wide * side**2, inner), nn.ReLU(True), nn.Dropout(), nn.Linear(inner, inner), nn.ReLU(True)]
        self.classifier = nn.Sequential(*hidden, nn.Dropout(), nn.Linear(inner, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class DenseLayer(nn.Module):
    def __init__(self, wide: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(wide), ReLU(), nn.Conv2d(wide, 4 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        out = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(out)))


class DenseBlock(nn.ModuleDict):
    """Layers that each see all that was there before."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, shape: Shape, classes: int, width: int, blocks: Blocks) -> None:
        super().__init__()
        stem = [nn.Conv2d(shape[0], width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), ReLU(), nn.MaxPool2d(3, 2, 1)]
        growth, wide, layers = width // 2, width, [*stem]
        for stage, count in enumerate(blocks):
            block = {f"denselayer{i + 1}": DenseLayer(wide + i * growth, growth) for i in range(count)}
            layers, wide = [*layers, DenseBlock(block)], wide + count * growth
            if stage < len(blocks) - 1:
                halved = [nn.Conv2d(wide, wide // 2, 1, bias=False), nn.AvgPool2d(2, 2)]
                layers, wide = [*layers, nn.BatchNorm2d(wide), ReLU(), *halved], wide // 2
        self.features, self.classifier = nn.Sequential(*layers, nn.BatchNorm2d(wide)), nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class Fire(nn.Module):
    def __init__(self, wide: int, squeezed: int, out: int) -> None:
        super().__init__()
        self.squeeze, self.squeeze_activation = nn.Conv2d(wide, squeezed, 1), nn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_activation = nn.Conv2d(squeezed, out, 1), nn.ReLU(inplace=True)
        self.expand3x3, self.expand3x3_activation = nn.Conv2d(squeezed, out, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        small, large = self.expand1x1(x), self.expand3x3(x)
        return torch.cat([self.expand1x1_activation(small), self.expand3x3_activation(large)], 1)


def squeezenet(shape: Shape, classes: int, width: int = 8, blocks: Blocks = (2, 2, 4)) -> nn.Module:
    """Pool with rounding up; the classifier is a convolution that ends in a ReLU, as torchvision's does."""
    layers, wide = [nn.Conv2d(shape[0], width, 3, 2), ReLU()], width
    for stage, count in enumerate(blocks):
        layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        for _ in range(count):
            out = width * (stage + 1)
            layers.append(Fire(wide, out // 2, out))
            wide = 2 * out
    head = [nn.Dropout(0.5), nn.Conv2d(wide, classes, 1), ReLU(), nn.AdaptiveAvgPool2d((1, 1))]
    for module in [*(m for layer in layers for m in layer.modules()), head[1]]:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight)
            nn.init.zeros_(module.get_parameter("bias"))
    return nn.Sequential(*layers, *head, nn.Flatten())


class Shuffled(nn.Module):
    """ShuffleNetV2's unit: half of the channels pass by, then those of both halves alternate."""

    def __init__(self, wide: int, out: int, stride: int) -> None:
        super().__init__()
        half, first = out // 2, wide if stride > 1 else out // 2
        filters = [conv_bn(first, first, 3, stride, first, act=None), conv_bn(first, half)]
        self.branch1 = nn.Sequential(*filters) if stride > 1 else None
        body = [conv_bn(first, half), conv_bn(half, half, 3, stride, half, act=None), conv_bn(half, half)]
        self.branch2 = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        if self.branch1 is None:
            passing, x = x.chunk(2, dim=1)
        else:
            passing = self.branch1(x)
        out = torch.cat((passing, self.branch2(x)), dim=1)
        count, channels, height, width = out.size()
        out = out.view(count, 2, channels // 2, height, width)
        return torch.transpose(out, 1, 2).contiguous().view(count, channels, height, width)


class ShuffleNetV2(nn.Module):
    def __init__(self, shape: Shape, classes: int, width: int, blocks: Blocks) -> None:
        super().__init__()
        self.conv1, self.maxpool = conv_bn(shape[0], width, 3, 2), nn.MaxPool2d(3, 2, 1)
        wide, stages = width, []
        for stage, count in enumerate(blocks):
            for block in range(count):
                stages.append(Shuffled(wide, wide := width * 2 ** (stage + 1), 1 if block else 2))
        self.stages, self.conv5, self.fc = nn.Sequential(*stages), conv_bn(wide, 2 * wide), nn.Linear(2 * wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stages(self.maxpool(self.conv1(x))))
        return self.fc(x.mean([2, 3]))


# -- mobile networks --------------------------------------------------------------------------------------------------


class SameConv(nn.Conv2d):
    """Pad as TensorFlow does: as much as the stride needs, more of it at the end."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        spare = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (x.shape[3], x.shape[2])]
        x = F.pad(x, [spare[0] // 2, spare[0] - spare[0] // 2, spare[1] // 2, spare[1] - spare[1] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class StochasticDepth(nn.Module):
    """Leave out a branch for some of the images in training."""

    def forward(self, x: Tensor, p: float = 0.2) -> Tensor:
        if not self.training:
            return x
        kept = torch.empty((x.shape[0], *[1] * (x.ndim - 1)), dtype=x.dtype, device=x.device).bernoulli_(1 - p)
        return x * kept.div_(1 - p)


class Inverted(nn.Module):
    """The inverted residual of mobile networks: expand, filter every channel alone, gate, project."""

    def __init__(
        self,
        wide: int,
        out: int,
        kernel: int,
        stride: int,
        act: Act,
        gate: Act | None = None,
        same: bool = False,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        inner = expansion * wide
        filtered = conv_bn(inner, inner, kernel, stride, inner, act)
        if same and stride == 1:
            filtered[0] = nn.Conv2d(inner, inner, kernel, padding="same", groups=inner, bias=False)
        elif same:
            filtered[0] = SameConv(inner, inner, kernel, stride, groups=inner, bias=False)
        gates = [SqueezeExcite(inner, wide, act if gate is nn.Sigmoid else ReLU, gate)] if gate else []
        expanded = [conv_bn(wide, inner, act=act)] if expansion > 1 else []
        self.block = nn.Sequential(*expanded, filtered, *gates, conv_bn(inner, out, act=None))
        self.stochastic_depth = StochasticDepth() if gate is nn.Sigmoid else nn.Identity()
        self.use_res_connect = stride == 1 and wide == out

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


def mobile(
    shape: Shape, classes: int, width: int, blocks: Blocks, act: Act, gate: Act | None = None, *, same: bool = False
) -> nn.Module:
    """Return MobileNet or EfficientNet, by activation and gate; `same`: padded as in TensorFlow."""
    stem = conv_bn(shape[0], width, 3, 2, act=act)
    if same:
        stem[0] = SameConv(shape[0], width, 3, 2, bias=False)
    wide, layers = width, list[nn.Module]([stem])
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage and not block else 1
            out, kernel = width * (stage + 1), 5 if stage % 2 else 3
            layers.append(Inverted(wide, out, kernel, stride, act, gate, same))
            wide = out
    layers += [conv_bn(wide, 4 * wide, act=act), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if gate is nn.Hardsigmoid:
        layers += [nn.Linear(4 * wide, 4 * wide), act(), nn.Dropout(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(4 * wide, classes))


_MOBILE_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2(shape: Shape, classes: int) -> nn.Module:
    """Return MobileNetV2 at full size: expansion, width, blocks and stride of each stage are those of its paper."""
    wide, layers = 32, list[nn.Module]([conv_bn(shape[0], 32, 3, 2, act=ReLU6)])
    for expansion, out, count, stride in _MOBILE_V2:
        for block in range(count):
            layers.append(Inverted(wide, out, 3, 1 if block else stride, ReLU6, expansion=expansion))
            wide = out
    layers += [conv_bn(wide, 1280, act=ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(1280, classes))


# -- own inventions ---------------------------------------------------------------------------------------------------


class Rows(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self, shape: Shape, classes: int, width: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(shape[0] * shape[2], width, batch_first=True), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x.permute(0, 2, 1, 3).flatten(2))
        return self.head(states[:, -1])


class Branches(nn.Module):
    """Two branches: one pools over an uneven border, the other goes down and up again; their maps lie side by side."""

    def __init__(self, shape: Shape, classes: int, width: int) -> None:
        super().__init__()
        pooled = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
        self.left = nn.Sequential(nn.Conv2d(shape[0], width, 5, padding=2), nn.LeakyReLU(0.1), pooled)
        down, up = nn.Conv2d(shape[0], width, 3, 4, 1), nn.ConvTranspose2d(width, width, 2, 2)
        self.right = nn.Sequential(down, nn.BatchNorm2d(width), nn.ReLU(), up)
        self.head = nn.Linear(2 * width * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x).clamp(-1, 1)
        both = torch.cat([left[..., : right.shape[2], : right.shape[3]], right], 1)
        return self.head(F.adaptive_max_pool2d(both, 4).reshape(x.size(0), -1))


ARCHITECTURES: dict[str, Callable[[Shape, int], nn.Module]] = {
    "resnet18": partial(ResNet, width=8, blocks=(2, 2, 2, 2), expansion=1),
    "resnet50": partial(ResNet, width=8, blocks=(3, 4, 6, 3), expansion=4),
    "wide_resnet": partial(WideResNet, width=4, blocks=(4, 4, 4)),
    "vgg16_bn": partial(VGG, width=4, blocks=(2, 2, 3, 3, 3)),
    "densenet121": partial(DenseNet, width=8, blocks=(6, 12, 24, 16)),
    "regnet_x": partial(RegNet, width=8, blocks=(1, 2, 7, 2), gate=False),
    "regnet_y": partial(RegNet, width=8, blocks=(1, 3, 6, 2), gate=True),
    "squeezenet": partial(squeezenet, width=8, blocks=(2, 2, 4)),
    "shufflenet_v2": partial(ShuffleNetV2, width=8, blocks=(4, 8, 4)),
    "mobilenet_v2": partial(mobile, width=8, blocks=(1, 2, 3, 3, 1), act=ReLU6),
    "mobilenet_v3": partial(mobile, width=8, blocks=(1, 2, 3, 2), act=Hardswish, gate=nn.Hardsigmoid),
    "efficientnet_b0": partial(mobile, width=8, blocks=(1, 2, 2, 3, 1), act=SiLU, gate=nn.Sigmoid),
    "efficientnet_lite0": partial(mobile, width=8, blocks=(1, 2, 2, 3, 1), act=ReLU6, same=True),
    "convnext_tiny": partial(convnext, width=8, blocks=(3, 3, 9, 3)),
    "deit_tiny": partial(ViT, FusedAttention, width=32, depth=2, heads=2, patch=8),
    "swin_tiny": partial(Swin, width=16, blocks=(2, 2), window=4, patch=4),
    "mixer": partial(Mixer, width=32, depth=2, patch=8),
    "torchvision_vit": partial(ViT, TorchAttention, width=32, depth=2, heads=2, patch=8),
    "hugging_face_vit": partial(HuggingFaceViT, SpelledAttention, width=32, depth=2, heads=2, patch=8),
    "lstm_rows": partial(Rows, width=32),
    "two_branches": partial(Branches, width=8),
}
_CONVOLUTIONAL = ("resnet18", "regnet_y", "shufflenet_v2", "mobilenet_v3", "two_branches")
FIRST_ROUND = (*_CONVOLUTIONAL, "convnext_tiny", "deit_tiny", "swin_tiny")
