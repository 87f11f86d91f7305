"""Random numbers that depend only on a seed and an image's number, not on its batch or shard.

They are a hash of a key, one per image, and a counter (splitmix64: Steele, Lea & Flood 2014, figure 14), so that they
are the same on every device and in every order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Draws", "Source", "drawn_at", "shared_of"]

# The constants of splitmix64, as signed numbers.
_WEYL, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_BITS = 24  # of a number: what float32 holds
_UNIT = 2.0**-_BITS
_BLOCK = 1 << 15  # hashes at once: what fits into a core's cache


@dataclass(frozen=True)
class Draws:
    """Random numbers for N images: `keys` (int64, (N,)) determine them, and `common` (int64, (1,)) shared ones.

    Equal keys give equal numbers: use `at` with another place for further ones. All numbers are multiples of 2^-24.
    """

    keys: Tensor
    common: Tensor

    @classmethod
    def of(cls, seed: int, images: range, device: torch.device | str = "cpu") -> Draws:
        """Return draws of a seed for images with these numbers, such as their positions in a test set."""
        start = torch.tensor([seed], dtype=torch.int64, device=device)
        common = _mix_(start.mul_(_SECOND).add_(_FIRST))
        numbers = torch.arange(images.start, images.stop, images.step, device=device)
        return cls(_mix_(common + (numbers + 1) * _WEYL), common)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, images: Tensor) -> Draws:
        """Return the draws of some of the images, by a mask or by their positions."""
        return Draws(self.keys[images], self.common)

    def at(self, place: int) -> Draws:
        """Return other draws for the same images, such as for a restart or a step; place: 0 or more."""
        step = (place + 1) * _FIRST % (1 << 64)
        step -= (step >> 63) << 64  # as a signed number
        return Draws(_mix_(self.keys + step), _mix_(self.common + step))

    def spread(self, places: range) -> Draws:
        """Return draws at consecutive places, next to each other for each image: (N · places,)."""
        steps = (torch.arange(places.start, places.stop, device=self.keys.device) + 1) * _FIRST
        return Draws(_mix_(self.keys.unsqueeze(1) + steps).flatten(), self.common)

    def shared(self) -> Draws:
        """Return draws for one image, the same for all images and any subset of them."""
        return Draws(self.common, self.common)

    def uniform(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return numbers in [0, 1): (N, *shape), with the dtype of `like`."""
        return self._made(lambda words: words.to(like.dtype).mul_(_UNIT), shape)

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return standard normal numbers: (N, *shape), with the dtype of `like` (Box & Muller 1958)."""

        def pairs(words: Tensor) -> Tensor:
            first, second = words.to(like.dtype).view(len(words), -1, 2).unbind(2)
            length, angle = first.add(1).mul_(_UNIT).log_().mul_(-2).sqrt_(), second * (2 * math.pi * _UNIT)
            return torch.cat([angle.cos().mul_(length), angle.sin_().mul_(length)], dim=1)

        return self._made(pairs, shape)

    def below(self, bound: int, shape: Sequence[int]) -> Tensor:
        """Return integers from 0 to bound − 1: int64 (N, *shape)."""
        return self._made(lambda words: words.long().mul_(bound).bitwise_right_shift_(_BITS), shape)

    def generator(self) -> torch.Generator:
        """Return a generator that the first image determines."""
        return torch.Generator().manual_seed(self.seed())

    def seed(self) -> int:
        """Return a seed, 0 to 2^31 − 1, that the first image determines."""
        return int(self.keys[0]) & 0x7FFFFFFF

    def _made(self, make: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
        """Return (N, *shape) numbers, made of integers of 24 random bits, int32 (images, an even number)."""
        count = math.prod(shape)
        counters = torch.arange(1, -(-count // 2) + 1, device=self.keys.device) * _WEYL  # a hash gives two
        at_once = max(1, _BLOCK // max(len(counters), 1)) if self.keys.device.type == "cpu" else len(self)
        parts = [
            make(_mix_(keys + counters).view(torch.int32).bitwise_and_((1 << _BITS) - 1))
            for keys in torch.split(self.keys.unsqueeze(1), max(at_once, 1))
        ]
        made = parts[0] if len(parts) == 1 else torch.cat(parts)
        return made[:, :count].reshape(len(self), *shape)


def _mix_(z: Tensor) -> Tensor:
    """Hash integers in place. Shifts keep the sign, so that two numbers share each hash; enough hashes remain."""
    moved = torch.bitwise_right_shift(z, 30)
    z.bitwise_xor_(moved).mul_(_FIRST)
    z.bitwise_xor_(torch.bitwise_right_shift(z, 27, out=moved)).mul_(_SECOND)
    return z.bitwise_xor_(torch.bitwise_right_shift(z, 31, out=moved))


# An attack's source of random numbers: draws by image, a generator, or (None) torch's default generator.
Source = Draws | torch.Generator | None


def drawn_at(source: Source, place: int, images: Tensor | None = None) -> Source:
    """Return the source at a place of an attack, and for some images; a generator continues with its next numbers."""
    if not isinstance(source, Draws):
        return source
    return (source if images is None else source[images]).at(place)


def shared_of(source: Source) -> Source:
    """Return the source of numbers that all images share."""
    return source.shared() if isinstance(source, Draws) else source
