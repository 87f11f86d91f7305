"""Linear layers of one image: many rows at once, in tables made for the kernels that gather their inputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ._abi import Call, kernel_call
from ._fusion import FusedLayer
from ._layout import Buffer, offsets_of
from ._matmul import Lookup, Rows

MOST_PLACES = 1 << 16  # what sixteen bits tell apart


def rows_call(task: FusedLayer, source: Buffer, target: Buffer) -> Call:
    """Return the call of the kernel that computes eight rows of a linear layer at once."""
    op = task.op
    lengths = np.diff(op.indptr)
    groups = -(-op.shape[0] // 8)
    order = np.argsort(-lengths, kind="stable")
    starts = np.zeros(groups + 1, np.int32)
    np.cumsum(lengths[order[::8]], out=starts[1:])  # the first of a group is its longest
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    row = np.repeat(rank, lengths)
    slot = starts[row // 8] + np.arange(op.nonzeros) - np.repeat(op.indptr[:-1], lengths)
    places = np.zeros((starts[-1] + 1, 8), np.uint16)
    places[slot, row % 8] = offsets_of(op, source, True) // 4
    weights = _aligned((max(1, int(starts[-1])), 8))
    weights[slot, row % 8] = op.values
    biases = np.zeros(8 * groups, np.float32)
    biases[: len(order)] = op.bias[order]
    stored = np.full(8 * groups, 4 * len(order), np.int32)  # lanes without a row write behind the last one
    stored[: len(order)] = 4 * order
    return kernel_call(
        Rows(task.relu), [source.origin, target.origin, groups], (starts, places, weights, biases, stored)
    )


def lookup_call(task: FusedLayer, source: Buffer, target: Buffer) -> Call:
    """Return the call of the kernel that computes sixteen rows at once from windows of 32 inputs."""
    op = task.op
    offsets = offsets_of(op, source, True)
    groups = -(-op.shape[0] // 16)
    starts = [0]
    windows: list[int] = []
    slots: list[tuple[int, int, int]] = []  # slot, lane, nonzero
    for group in range(groups):
        rows = range(16 * group, min(16 * group + 16, op.shape[0]))
        heads = [int(op.indptr[row]) for row in rows]
        ends = [int(op.indptr[row + 1]) for row in rows]
        while any(head < end for head, end in zip(heads, ends, strict=True)):
            window = min(int(offsets[h]) for h, end in zip(heads, ends, strict=True) if h < end)
            for lane, (head, end) in enumerate(zip(heads, ends, strict=True)):
                if head < end and offsets[head] < window + 128:
                    slots.append((len(windows), lane, head))
                    heads[lane] += 1
            windows.append(window)
        starts.append(len(windows))
    places = np.zeros((len(windows), 16), np.uint8)
    weights = _aligned((len(windows), 16))
    chosen = np.array(slots, np.int64).reshape(-1, 3)
    base = np.array(windows, np.int32)
    places[chosen[:, 0], chosen[:, 1]] = (offsets[chosen[:, 2]] - base[chosen[:, 0]]) // 4
    weights[chosen[:, 0], chosen[:, 1]] = op.values[chosen[:, 2]]
    biases = np.zeros(16 * groups, np.float32)
    biases[: op.shape[0]] = op.bias
    tables = (np.array(starts, np.int32), base, places, weights, biases)
    return kernel_call(Lookup(task.relu), [source.origin, target.origin, groups], tables)


def _aligned(shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return zeros that start at a multiple of 64 bytes: a load across two cache lines takes twice the time."""
    size = 4 * shape[0] * shape[1]
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)
