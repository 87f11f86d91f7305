"""The backward pass to the image as kernel calls: a transposed layer is a sparse layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ...errors import Unsupported
from .._program import Program, Scale, Shape, Snap, Sparse, sparse_from_dense
from ._abi import Call, Layout, Tiling, kernel_call
from ._elementwise import Pack, PoolGradient, UnpackImages
from ._fusion import Elementwise, FusedLayer, MaxPool, Move, Sparsify, Task, View, tasks_of
from ._layout import Buffer
from ._llvm_ir import Unit
from ._plan import Planner, factors, sources_of, usual


class GradientPlanner(Planner):
    """Run forward keeping every value, then backward: image and gradient of the logits in, gradient of the image out.

    The forward pass is run again rather than stored: fetching its values from main memory would take longer.
    """

    def __init__(self, program: Program, layout: Layout) -> None:
        """Raise Unsupported for the few networks without a backward pass in kernels."""
        if any(isinstance(step.op, Snap) for step in program.steps):
            raise Unsupported("values that snap to a centre can be positive and have no gradient")
        super().__init__(program, tasks_of(program, whole=False), layout, keep=True)
        producers = {task.result: task for task in self.tasks if not isinstance(task, View)}
        self._rectified = {v for v, task in producers.items() if getattr(task, "relu", False)}
        self._gradients = {v: self._place_gradient(v, producers.get(v)) for v in self.buffers}
        # All places are assigned before the first call is made, since calls contain the size of a unit.
        self._plain = {
            task.source: self.reserve(Buffer((self.shapes[task.source][0], 1, 1), (0, 0), layout.lanes))
            for task in self.tasks
            if isinstance(task, FusedLayer) and len(self.shapes[task.source]) == 1
        }
        self._left = dict.fromkeys(self.buffers, 0)  # number of contributions that a gradient still lacks
        self._started: set[int] = set()
        self.forward_calls = 0  # number of calls before the backward pass

    def _place_gradient(self, value: int, producer: Task | None) -> Buffer:
        """Return the buffer of a value's gradient, with the zeros that the transposed producer reads."""
        buffer = replace(self.buffers[value], pad=(0, 0), origin=0)
        if isinstance(producer, FusedLayer) and len(self.shapes[producer.source]) == 3:
            op, before = producer.op, self.shapes[producer.source]
            reach = [op.dilation[i] * (op.shape[2 + i] - 1) for i in (0, 1)]
            sides = [before[1 + i] + 2 * op.padding[i] - reach[i] for i in (0, 1)]
            pad = [max(0, reach[i] - op.padding[i]) for i in (0, 1)]
            shape = (op.shape[0], sides[0], sides[1])
            buffer = replace(buffer, shape=shape, pad=(pad[0], pad[1]), step=op.stride)
        return self.reserve(buffer)

    def calls(self, choose: Callable[[str], Tiling | None]) -> list[Call]:
        """Return all kernel calls, forward then backward."""
        forward = super().calls(choose)[:-1]
        self.forward_calls = len(forward)
        _, tasks = self.pack_images()
        for task in tasks:
            # A reader of a view reads the viewed value.
            for value in [] if isinstance(task, View) else sources_of(task):
                self._left[self.base(value)] += 1
        last = self.base(len(self.program.steps))
        classes = self.program.classes
        logits = self._gradients[last]
        if self._left[last] or not logits.whole:
            raise Unsupported("the logits of this network are read again inside it, or are a view of padded values")
        backward = [
            kernel_call(
                Pack(self.layout.lanes, False, self.layout.side, Unit.UPSTREAM),
                [logits.origin, 1, 1, classes, 0, 0, 4 * classes],
                factors(None),
            )
        ]
        if last in self._rectified:
            backward.append(self.pointwise(logits, logits, logits.shape, gate=self.buffers[last]))
        for task in reversed(tasks):
            backward += self._back(task)
        return [*forward, *backward, self._unpack()]

    def _unpack(self) -> Call:
        """Return the call that writes the image's gradient."""
        first = self.tasks[0]
        _, tasks = self.pack_images()
        scale = first.scale if isinstance(first, Elementwise) and len(tasks) < len(self.tasks) else None
        gradient = self._gradients[0 if scale is None else first.result]
        channels, rows, width = gradient.shape
        if scale is None:
            channels, rows, width = 1, 1, channels * rows * width
        sizes = [channels, rows, width, gradient.outer, gradient.inner, 4 * math.prod(self.program.shape)]
        scales = np.ones(1, np.float32) if scale is None else scale.scale
        return kernel_call(UnpackImages(self.layout.lanes), [gradient.origin, self.end, *sizes], (scales,))

    def _into(self, value: int) -> tuple[Buffer, Buffer | None, Buffer | None]:
        """Return a gradient contribution's place, what it is added to, and the gate of the sum if it is the last."""
        base = self.base(value)
        target = self._gradients[base]
        self._left[base] -= 1
        other = target if base in self._started else None
        self._started.add(base)
        gate = self.buffers[base] if not self._left[base] and base in self._rectified else None
        return target, other, gate

    def _back(self, task: Task) -> list[Call]:
        if isinstance(task, Move):
            return []
        upstream = self._gradients[self.base(task.result)]
        match task:
            case FusedLayer():
                calls = [] if task.residual is None else [self._add(upstream, task.residual)]
                return [*calls, *self._back_layer(task, upstream)]
            case MaxPool():
                return self._back_pool(task, upstream)
            case Sparsify():
                return [self._add(upstream, task.source)]
        scale = None if task.scale is None else Scale(task.scale.scale, np.zeros_like(task.scale.shift))
        calls = [self._add(upstream, task.source, scale)]
        return calls if task.other is None else [*calls, self._add(upstream, task.other)]

    def _add(self, upstream: Buffer, value: int, scale: Scale | None = None) -> Call:
        self.plain(value)
        target, other, gate = self._into(value)
        if self.shapes[value] != self.shapes[self.base(value)]:
            raise Unsupported("a flattened value is read by a layer that is not linear")
        return self.pointwise(upstream, target, self.shape3(value), other=other, gate=gate, scale=scale)

    def _back_layer(self, task: FusedLayer, upstream: Buffer) -> list[Call]:
        turned = FusedLayer(_transposed(task.op), 0, 0)
        target, other, gate = self._into(task.source)
        choice = usual(self.layout.lanes)
        shape: Shape = self.shapes[task.source]
        after: list[Call] = []
        if len(shape) == 1:
            features = (shape[0], 1, 1)
            if target.whole and self.buffers[self.base(task.source)].whole:
                target = replace(target, shape=features)
                other, gate = (None if b is None else replace(b, shape=features) for b in (other, gate))
            else:  # into a plain place first, from there among the zeros
                plain = self._plain[task.source]
                base = self.shape3(self.base(task.source))
                after = [self.pointwise(replace(plain, shape=base), target, base, other=other, gate=gate)]
                target, other, gate = plain, None, None
        call = self.sums(turned, upstream, target, choice, shape=shape, other=other, gate=gate)
        return [call, *after]

    def _back_pool(self, task: MaxPool, upstream: Buffer) -> list[Call]:
        op, value = task.op, self.buffers[self.base(task.source)]
        target, other, gate = self._into(task.source)
        shape = self.shape3(task.source)
        sides = (*shape[1:], *self.shape3(task.result)[1:])
        inside = all((sides[i + 2] - 1) * op.stride[i] + op.kernel[i] <= sides[i] for i in (0, 1))
        apart = all(op.stride[i] >= op.kernel[i] for i in (0, 1)) and op.dilation == (1, 1) and op.padding == (0, 0)
        add = other is not None or not (inside and apart)
        spec = PoolGradient(self.layout.lanes, sides, op, add, gate is not None and not add)
        strides = [number for buffer in (value, upstream, target) for number in buffer.strides]
        calls = [kernel_call(spec, [value.origin, upstream.origin, target.origin, shape[0], *strides])]
        if add and other is None:
            nothing = Scale(np.zeros(shape[0], np.float32), np.zeros(shape[0], np.float32))
            calls.insert(0, self.pointwise(target, target, shape, scale=nothing, relu=True))
        if add and gate is not None:
            calls.append(self.pointwise(target, target, shape, gate=gate))
        return calls


def _transposed(op: Sparse) -> Sparse:
    """Return the layer that carries gradients back, for gradients spread out by the stride among zeros."""
    weight = np.ascontiguousarray(op.dense().transpose(1, 0, 2, 3)[:, :, ::-1, ::-1])
    padding = tuple(op.dilation[i] * (op.shape[2 + i] - 1) - op.padding[i] for i in (0, 1))
    zeros = np.zeros(op.shape[1], np.float32)
    return sparse_from_dense(weight, zeros, padding=(padding[0], padding[1]), dilation=op.dilation)
