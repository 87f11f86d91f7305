"""Faults that a lowering could have, put into it on purpose: benchmarks/lowering.py has to count each.

A fault lasts as long as `graph.lower` runs, and for that time it rules the model too: sparring's own comparison of the
graph with the model sees nothing, and only the benchmark's judge can. Faults of the graph itself, and of bounds, are
put in after that comparison.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparring import bounds, graph
from sparring.bounds import _network as network
from sparring.graph import Add, Affine, Graph, Node

__all__ = ["FAULTS", "Fault", "planted"]

Call = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _Misread(TorchFunctionMode):
    """Have every call of torch's functions go through `call` while a model is lowered."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, dict(kwargs or {}))


@dataclass(frozen=True)
class Fault:
    """A planted fault: in how calls are read, in the model that is lowered, or in the resulting graph or radius.

    `shown_by` is a pattern for the source of the models that can show it.
    """

    means: str
    shown_by: str
    call: Call | None = None
    model: Callable[[nn.Module], nn.Module] | None = None
    graph: Callable[[Graph], Graph] | None = None
    radius: float = 1.0


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Put a fault into everything that lowers a model."""
    if name is None:
        yield
        return
    fault, lower, radius = FAULTS[name], graph.lower, bounds.radius

    def faulty(model: nn.Module, shape: tuple[int, ...], *rest: Any, **options: Any) -> Graph:
        taken = fault.model(copy.deepcopy(model)) if fault.model else model
        with _Misread(fault.call) if fault.call else contextlib.nullcontext():
            lowered = lower(taken, shape, *rest, **options)
        return fault.graph(lowered) if fault.graph else lowered

    def larger(*rest: Any, **options: Any) -> Tensor:
        return radius(*rest, **options) * fault.radius

    with (
        mock.patch.object(graph, "lower", faulty),
        mock.patch.object(network, "lower", faulty),
        mock.patch.object(bounds, "radius", larger),
    ):
        yield


def _no_divisor(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Average over the window's size, however the call gives another divisor."""
    if _name(func) == "avg_pool2d":
        args, kwargs = args[:6], {key: value for key, value in kwargs.items() if key != "divisor_override"}
    return func(*args, **kwargs)


def _without(*keywords: str) -> Call:
    """Read calls without some of their keywords."""

    def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **{key: value for key, value in kwargs.items() if key not in keywords})

    return call


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", ""))


def _not_in_place(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute what an in-place ReLU returns, but leave its input as it was."""
    if _name(func) in ("relu_", "clamp_", "clamp_min_") or (_name(func) == "relu" and kwargs.get("inplace")):
        return func(args[0].clone(), *args[1:], **kwargs)
    return func(*args, **kwargs)


def _written_at_once(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Take in-place arithmetic for the ordinary kind: names that stand for the same tensor miss the write."""
    ordinary = {"add_": torch.add, "sub_": torch.sub, "mul_": torch.mul, "div_": torch.div}
    ordinary |= {"__iadd__": torch.add, "__isub__": torch.sub, "__imul__": torch.mul, "__itruediv__": torch.div}
    return ordinary.get(_name(func), func)(*args, **kwargs)


def _no_dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Drop dropout, on or off."""
    return args[0] if _name(func) in ("dropout", "dropout1d", "alpha_dropout") else func(*args, **kwargs)


def _no_noise(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Take what is drawn for a constant."""
    match _name(func):
        case "randn_like" | "rand_like" | "bernoulli" | "uniform_":
            return torch.full_like(args[0], 0.3)
        case "randn" | "rand":
            return torch.full(args if isinstance(args[0], int) else args[0], 0.3)
        case "normal":
            return torch.full(kwargs["size"], 0.3)
    return func(*args, **kwargs)


def _no_batch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Take a mean over the batch for a constant."""
    if _name(func) in ("mean", "amax") and kwargs.get("dim", args[1] if len(args) > 1 else None) == 0:
        return torch.full(args[0].shape[1:], 0.3)
    return func(*args, **kwargs)


def _no_hooks(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def _no_own_forward(model: nn.Module) -> nn.Module:
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model


def _each(change: Callable[[Node], Node]) -> Callable[[Graph], Graph]:
    return lambda lowered: Graph(tuple(change(node) for node in lowered.nodes))


def _along_the_last_axis(node: Node) -> Node:
    """Turn what an affine layer adds around, as a constant that is laid along another axis would."""
    if isinstance(node.op, Affine) and node.op.shift.numel() > 1:
        return replace(node, op=replace(node.op, shift=node.op.shift.flip(0)))
    return node


def _one_way(node: Node) -> Node:
    """Feed both sides of a sum from its first input."""
    return replace(node, inputs=node.inputs[:1] * 2) if isinstance(node.op, Add) else node


FAULTS = {
    "alpha": Fault("alpha= of add and sub is not read", r"alpha=", call=_without("alpha")),
    "divisor": Fault(
        "divisor_override= of average pooling is not read", r"divisor_override|False, True, 2", call=_no_divisor
    ),
    "activation": Fault(
        "an in-place ReLU leaves its input as it was", r"inplace=True|relu_|clamp_", call=_not_in_place
    ),
    "write": Fault(
        "in-place arithmetic is lost on other names of the tensor", r"\+= |mul_|add_|sub_", call=_written_at_once
    ),
    "dropout": Fault("dropout that is on is dropped", r"F.dropout\(h(, 0\.\d)?\)|p=0.5, tr", call=_no_dropout),
    "noise": Fault(
        "noise is taken for a constant", r"randn_like\(h|randn\(1|torch.rand\(h|normal\(0|bernoulli\(", call=_no_noise
    ),
    "batch": Fault("a mean over the batch is taken for a constant", r"(mean|amax)\((dim=)?0", call=_no_batch),
    "hooks": Fault("hooks are not run", r"register_forward", model=_no_hooks),
    "forward": Fault("a forward() that was replaced on an instance is not run", r"\.forward = ", model=_no_own_forward),
    "broadcast": Fault(
        "a constant is laid along the axis in the wrong order", r"BatchNorm", graph=_each(_along_the_last_axis)
    ),
    "shortcut": Fault("both sides of a sum are its first input", r"\+ g", graph=_each(_one_way)),
    "radius": Fault("certified radii are half as large again", r"nn.Linear", radius=1.5),
}
