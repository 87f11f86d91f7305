"""Kernel calls: a kernel, its arguments, and the layout they are for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ._llvm_ir import Spec

Table = NDArray[np.generic]


@dataclass(frozen=True)
class Layout:
    """How images lie: one by one with pixels as vectors (`tiles` False), or `units` tiles of `lanes` images each.

    A pixel of a tile is `vectors` vectors long: several where there are only linear layers, whose weights then serve
    more images from one stretch of memory.
    """

    tiles: bool
    lanes: int
    units: int = 1
    vectors: int = 1

    @property
    def together(self) -> int:
        """Return the images of one run."""
        return self.lanes * self.units if self.tiles else 1


@dataclass(frozen=True)
class Tiling:
    """What may be tuned in a layer: accumulators at most, lanes of a vector, bytes of input a block may touch."""

    accumulators: int = 16
    lanes: int = 16
    block_bytes: int = 0  # 0: all input channels at once


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: its kernel, its arguments, what tables they point to, and whether it runs once a unit."""

    spec: Spec
    arguments: NDArray[np.int64]
    tables: tuple[Table, ...]
    per_unit: bool
    key: str = ""  # equal keys: equal geometry, so that one tuning serves both


def kernel_call(spec: Spec, arguments: list[int], tables: tuple[Table, ...] = ()) -> Call:
    """Make a call that runs once a unit, with the addresses of tables behind the other arguments."""
    addresses = [table.ctypes.data for table in tables]
    return Call(spec, np.array([*arguments, *addresses], np.int64), tables, True)
