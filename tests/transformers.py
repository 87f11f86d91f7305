"""ConvNeXt, Mixer and networks of attention, written as torchvision, timm and Hugging Face write them; see there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]


class Channels(nn.LayerNorm):
    """Normalise over channels that lie before the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(wide, wide, 7, padding=3, groups=wide), nn.LayerNorm(wide, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(wide, 4 * wide), nn.GELU(), nn.Linear(4 * wide, wide))
        self.layer_scale = nn.Parameter(torch.full((wide, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        result = self.layer_scale * torch.permute(h, (0, 3, 1, 2))
        result += x
        return result


def convnext(shape: Shape, classes: int, width: int, blocks: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 4, 4), Channels(width, eps=1e-6)]
    for stage, count in enumerate(blocks):
        wide = width * 2**stage
        if stage:
            layers += [Channels(wide // 2, eps=1e-6), nn.Conv2d(wide // 2, wide, 2, 2)]
        layers += [ConvNeXtBlock(wide) for _ in range(count)]
    head = [nn.AdaptiveAvgPool2d(1), Channels(wide, eps=1e-6), nn.Flatten(1), nn.Linear(wide, classes)]
    return nn.Sequential(*layers, *head)


class Mlp(nn.Module):
    def __init__(self, wide: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(wide, inner), nn.GELU(), nn.Dropout(0.0)
        self.fc2, self.drop2 = nn.Linear(inner, wide), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class PatchEmbed(nn.Module):
    """Cut an image into patches, each a vector: (N, places, width)."""

    def __init__(self, channels: int, patch: int, wide: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(channels, wide, patch, patch), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class MixerBlock(nn.Module):
    def __init__(self, places: int, wide: int) -> None:
        super().__init__()
        self.norm1, self.mlp_tokens = nn.LayerNorm(wide, eps=1e-6), Mlp(places, wide // 2)
        self.norm2, self.mlp_channels = nn.LayerNorm(wide, eps=1e-6), Mlp(wide, 4 * wide)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, shape: Shape, classes: int, width: int, depth: int, patch: int) -> None:
        super().__init__()
        places = (shape[1] // patch) * (shape[2] // patch)
        self.stem, self.norm = PatchEmbed(shape[0], patch, width), nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.Sequential(*(MixerBlock(places, width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))).mean(dim=1))


class FusedAttention(nn.Module):
    """timm's attention: one matrix for queries, keys and values, and torch's fused function."""

    def __init__(self, wide: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        count, places, wide = x.shape
        qkv = self.qkv(x).reshape(count, places, 3, self.heads, wide // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=0.0)
        return self.proj(out.transpose(1, 2).reshape(count, places, wide))


class TorchAttention(nn.Module):
    """torchvision's attention: torch's module."""

    def __init__(self, wide: int, heads: int) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(wide, heads, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.self_attention(x, x, x, need_weights=False)
        return out


class SpelledAttention(nn.Module):
    """Hugging Face's attention: matrices of their own, and a softmax that is spelled out."""

    def __init__(self, wide: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size, self.dropout = heads, wide // heads, nn.Dropout(0.1)
        self.query, self.key, self.value = (nn.Linear(wide, wide) for _ in range(3))
        self.dense = nn.Linear(wide, wide)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.heads, self.size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        weights = F.softmax(torch.matmul(q, k.transpose(-1, -2)) * self.size**-0.5, dim=-1, dtype=torch.float32)
        out = torch.matmul(self.dropout(weights.to(q.dtype)), v).transpose(1, 2).contiguous()
        return self.dense(out.reshape((*out.size()[:-2], self.heads * self.size)))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, wide: int, ratio: int = 2) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(wide, eps=1e-6), attention, nn.LayerNorm(wide, eps=1e-6)
        self.mlp = Mlp(wide, ratio * wide)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A class token and patches through pre-norm blocks, with a kind of attention."""

    def __init__(
        self,
        attention: type[nn.Module],
        shape: Shape,
        classes: int,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        ratio: int = 2,
    ) -> None:
        super().__init__()
        places = 1 + (shape[1] // patch) * (shape[2] // patch)
        self.patch_embed, self.cls_token = PatchEmbed(shape[0], patch, width), nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, places, width))
        self.blocks = nn.Sequential(*(Block(attention(width, heads), width, ratio) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


@dataclass
class Output:
    """What Hugging Face's networks return."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class HuggingFaceViT(ViT):
    def forward(self, x: Tensor) -> Output:  # type: ignore[override]
        return Output(super().forward(x))


class WindowAttention(nn.Module):
    """Swin's attention within windows, moved by `shift`, with a bias of relative places, as torchvision writes it."""

    index: Tensor

    def __init__(self, wide: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.proj = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (place[:, :, None] - place[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", (apart[..., 0] * (2 * window - 1) + apart[..., 1]).flatten())

    def forward(self, x: Tensor) -> Tensor:
        count, height, width, wide = x.shape
        side, shift = self.window, self.shift
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        _, tall, broad, _ = x.shape
        if shift > 0:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        windows = (tall // side) * (broad // side)
        x = x.view(count, tall // side, side, broad // side, side, wide)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(count * windows, side**2, wide)
        qkv = self.qkv(x).reshape(x.size(0), side**2, 3, self.heads, wide // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (wide // self.heads) ** -0.5, qkv[1], qkv[2]
        bias = self.table[self.index].view(side**2, side**2, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        weights = q.matmul(k.transpose(-2, -1)) + bias
        if shift > 0:
            weights = weights.view(count, windows, self.heads, side**2, side**2)
            weights = weights + self.apart(x, tall, broad).unsqueeze(1).unsqueeze(0)
            weights = weights.view(-1, self.heads, side**2, side**2)
        x = F.softmax(weights, dim=-1).matmul(v).transpose(1, 2).reshape(x.size(0), side**2, wide)
        x = self.proj(x).view(count, tall // side, broad // side, side, side, wide)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(count, tall, broad, wide)
        if shift > 0:
            x = torch.roll(x, shifts=(shift, shift), dims=(1, 2))
        return x[:, :height, :width, :].contiguous()

    def apart(self, x: Tensor, tall: int, broad: int) -> Tensor:
        """Return what keeps places from seeing those that a shift brought from the other side: (windows, n, n)."""
        mask, side = x.new_zeros((tall, broad)), self.window
        steps, count = ((0, -side), (-side, -self.shift), (-self.shift, None)), 0
        for h in steps:
            for w in steps:
                mask[h[0] : h[1], w[0] : w[1]] = count
                count += 1
        mask = mask.view(tall // side, side, broad // side, side).permute(0, 2, 1, 3).reshape(-1, side**2)
        mask = mask.unsqueeze(1) - mask.unsqueeze(2)
        return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)


class PatchMerging(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * wide), nn.Linear(4 * wide, 2 * wide, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width, _ = x.shape[-3:]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        parts = [x[..., 0::2, 0::2, :], x[..., 1::2, 0::2, :], x[..., 0::2, 1::2, :], x[..., 1::2, 1::2, :]]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    def __init__(
        self, shape: Shape, classes: int, width: int, blocks: tuple[int, ...], window: int, patch: int
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        self.patches, self.norm = nn.Conv2d(shape[0], width, patch, patch), nn.LayerNorm(width)
        for stage, count in enumerate(blocks):
            wide = width * 2**stage
            stages += [PatchMerging(wide // 2)] if stage else []
            for block in range(count):
                shift = window // 2 if block % 2 else 0
                stages.append(Block(WindowAttention(wide, 2**stage, window, shift), wide))
        self.features, self.last, self.head = nn.Sequential(*stages), nn.LayerNorm(wide), nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.norm(self.patches(x).permute(0, 2, 3, 1)))
        x = self.last(x).permute(0, 3, 1, 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
