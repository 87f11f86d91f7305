"""Operations without a sparse kernel: torch's own, from a list of those that a graph can contain.

Shapes are inferred by torch itself, without memory for values, so that a file cannot exceed its limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import graph
from ..errors import UserError
from ._program import MOST_ELEMENTS, Dense, Misfit, Shape

_IMAGES = 3  # a batch on which shapes are inferred
_TRUTHS = frozenset(
    """gt lt ge le eq ne logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not isnan isinf where
    masked_fill""".split()  # noqa: SIM905
)
_REFUSED = "the network cannot be computed"


@cache
def function_of(name: str) -> Callable[..., Any]:
    """Return torch's operation by its name; raise UserError if it is not one that a graph can hold."""
    if name in graph.RECURRENT:
        return graph.RECURRENT[name]
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet, None), overload, None) if packet in graph.CALLS else None
    if not isinstance(operation, torch._ops.OpOverload) or operation._schema.is_mutable:
        raise UserError(f"there is no operation {name[:40]!r}")
    return partial(_of_numbers, operation) if packet in _TRUTHS else operation


def _of_numbers(operation: torch._ops.OpOverload, **given: Any) -> Tensor:
    """Evaluate an operation on truth values, which are 0 and 1 in a program, as all its values are numbers."""
    kind = next(value.dtype for value in given.values() if isinstance(value, Tensor))
    wanted = operation._schema.name.startswith(("aten::logical", "aten::bitwise"))
    found: Tensor = operation(
        **{key: v != 0 if wanted or key in ("condition", "mask") else v for key, v in given.items()}
    )
    return found.to(kind)


def name_of(call: graph.Call) -> str:
    """Return the name under which a Call is packed."""
    function = call.function.args[0] if isinstance(call.function, partial) else call.function
    if isinstance(function, torch._ops.OpOverload):
        return str(function).removeprefix("aten.")
    return call.name


def call_of(op: Dense, dtype: torch.dtype = torch.float32) -> graph.Call:
    """Return an operation as that of a graph whose tensors are of `dtype`."""
    options = {key: _typed(value, dtype) for key, value in op.options.items()}
    return graph.Call(op.name.split(".")[0], function_of(op.name), op.names, options, op.place)


def _typed(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return [_typed(v, dtype) for v in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return dtype if value is torch.float32 else value


def dense(call: graph.Call, *inputs: Tensor) -> Tensor:
    """Evaluate an operation on batches; raise UserError if torch cannot."""
    try:
        return graph.called(call, *inputs)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{_REFUSED}: {str(error).splitlines()[0][:200]}") from error


def dense_shape(op: Dense, shapes: Sequence[Shape]) -> Shape:
    """Return the shape of an operation's result for one image; raise Misfit if it does not take such inputs."""
    if not shapes or (op.names and len(op.names) != len(shapes)):
        raise Misfit(f"{op.name} has {len(shapes)} inputs")
    if op.options.get("training") or op.options.get("train") or op.options.get("dropout_p"):
        raise Misfit(f"{op.name} draws at random")
    try:
        call = call_of(op)
        found = graph.called(_unwritten(call), *(torch.empty(_IMAGES, *s, device="meta") for s in shapes))
        shape = tuple(found.shape)
    except Exception as error:  # torch's own checks, which can raise anything
        raise Misfit(f"{op.name}: {(str(error).splitlines() or [''])[0][:200]}") from error
    if shape[:1] != (_IMAGES,) or len(shape) < 2 or found.dtype != torch.float32:
        raise Misfit(f"{op.name} makes a value of shape {shape} and {found.dtype} of {_IMAGES} images")
    index = op.options.get("index")
    if isinstance(index, Tensor) and index.numel() and not _within(index, shapes[0], op.options.get("dim")):
        raise Misfit(f"{op.name} reads beyond its input")
    if _scratch(op, shapes, shape[1:]) > MOST_ELEMENTS:
        raise Misfit(f"{op.name} needs too much memory")
    return shape[1:]


def _unwritten(call: graph.Call) -> graph.Call:
    options = {key: _on_meta(value) for key, value in call.options.items()}
    return graph.Call(call.name, call.function, call.names, options, call.place)


def _on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [_on_meta(v) for v in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def _within(index: Tensor, shape: Shape, dim: Any) -> bool:
    side = (_IMAGES, *shape)[dim]
    return bool((index >= -side).all() and (index < side).all())


def _scratch(op: Dense, shapes: Sequence[Shape], result: Shape) -> int:
    """Return how many temporary numbers torch may need while it computes an operation for one image."""
    weight, name = op.options.get("weight"), op.name.split(".")[0]
    if name == "matmul" and len(shapes) == 2:
        (*_, rows, inner), columns = shapes[0] if len(shapes[0]) > 1 else (1, *shapes[0]), result[-1]
        return math.prod(result[:-2]) * inner * (rows + columns)
    if name == "scaled_dot_product_attention":
        return math.prod(shapes[0][:-1]) * (shapes[1][-2] if len(shapes[1]) > 1 else 1)
    if name.startswith("conv") and isinstance(weight, Tensor):
        places = math.prod(shapes[0][1:] if "transpose" in name else result[1:])
        return places * math.prod(weight.shape[1:])
    return 0
