"""Trace a classifier and translate it, operation by operation."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import Unsupported, UserError
from ..modes import eval_mode
from .ops import Activation, Add, Affine, AvgPool, Conv2d, Flatten, Graph, Input, Linear, MaxPool, Node, Op, ReLU

__all__ = ["lower"]

# Functions that are constant but for jumps, of which staircase activations are made.
STEPS = ("floor", "ceil", "round", "trunc", "sign", "heaviside")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hasattr(m, "straight_through") or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Run a graph and note every tensor's shape; torch's own ShapeProp imports sympy, which takes most of a second."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["shape"] = tuple(value.shape)
        return value


def lower(model: nn.Module, shape: tuple[int, ...]) -> Graph:
    """Lower a classifier for images of `shape` (channels, height, width) to a Graph; parameters are shared, not copied.

    Raise Unsupported, naming the culprit, for control flow that cannot be traced and for operations without a rule.
    """
    with eval_mode(model):
        traced = _trace(model)
        try:
            first = next((p for p in model.parameters()), torch.zeros(()))
            with torch.no_grad():
                # Two images, so that a batch axis is never mistaken for one of size 1.
                _Shapes(model, graph=traced).run(torch.zeros(2, *shape, dtype=first.dtype, device=first.device))
        except Exception as error:  # the user's own operations, which can raise anything
            raise UserError(f"the model does not accept images of shape {shape}: {_first_line(error)}") from error
        return _Lowering(model, traced).run()


def _trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward(), which can raise anything
        raise Unsupported(
            f"{type(model).__name__} cannot be traced ({_first_line(error)}); "
            "forward() must not branch on values and must use modules or functions of torch.nn"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Lowering:
    """Translate a traced graph node by node, dropping what does nothing in eval mode."""

    def __init__(self, model: nn.Module, traced: fx.Graph) -> None:
        self.model = model
        self.traced = traced
        self.nodes: list[Node] = []
        self.index: dict[fx.Node, int] = {}
        self.constants: dict[fx.Node, Tensor] = {}

    def run(self) -> Graph:
        for node in self.traced.nodes:
            if node.op == "placeholder":
                if self.nodes:
                    raise Unsupported("the model takes more than one input; give it one image batch")
                self._append(node, Input())
            elif node.op == "get_attr":
                self.constants[node] = _attribute(self.model, str(node.target))
            elif node.op == "call_module":
                self._module(node, self.model.get_submodule(str(node.target)))
            elif node.op in ("call_function", "call_method"):
                self._function(node)
            elif node.op == "output":
                self._output(node)
        return Graph(tuple(self.nodes))

    def _output(self, node: fx.Node) -> None:
        result = node.args[0]
        if not isinstance(result, fx.Node) or result not in self.index:
            raise Unsupported("the model must return one tensor of logits")
        if self.index[result] != len(self.nodes) - 1:
            self.nodes = self.nodes[: self.index[result] + 1]

    def _append(self, node: fx.Node, op: Op, *inputs: Any) -> None:
        self.index[node] = len(self.nodes)
        self.nodes.append(Node(op, tuple(self.index[i] for i in inputs), _shape(node)))

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        name, source = str(node.target), node.args[0]
        match module:
            case _ if hasattr(module, "straight_through"):
                self._append(node, Activation(name, module), source)
            case nn.Linear():
                self._append(node, Linear(name, module.weight, module.bias), source)
            case nn.Conv2d():
                self._append(node, _convolution(name, module), source)
            case nn.BatchNorm1d() | nn.BatchNorm2d():
                self._append(node, _batch_norm(name, module), source)
            case nn.ReLU():
                self._append(node, ReLU(), source)
            case nn.MaxPool2d():
                self._append(node, _max_pool(module), source)
            case nn.AvgPool2d() | nn.AdaptiveAvgPool2d():
                self._average(node, source, module)
            case nn.Flatten():
                self._append(node, Flatten(), source)
            case nn.Identity() | nn.Dropout() | nn.Dropout2d():
                self.index[node] = self.index[source]  # type: ignore[index]
            case _:
                raise Unsupported(f"layer '{name}' of type {type(module).__name__} has no rule")

    def _function(self, node: fx.Node) -> None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        source = node.args[0] if node.args else None
        if name in ("size", "getattr", "getitem", "dim") and not _is_tensor(node):
            return  # shape arithmetic, used by a later view
        if name in ("relu", "relu_"):
            self._append(node, ReLU(), source)
        elif name in ("dropout", "dropout2d", "contiguous"):
            self.index[node] = self.index[source]  # type: ignore[index]
        elif name in ("flatten", "view", "reshape"):
            self._flatten(node, source)
        elif name in ("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "div", "neg"):
            self._arithmetic(node, name.lstrip("i") if name != "iadd" else "add")
        elif name == "max_pool2d":
            self._append(node, _functional_max_pool(node), source)
        elif name in ("avg_pool2d", "adaptive_avg_pool2d", "mean"):
            self._average(node, source, None)
        else:
            step = name.rstrip("_") in STEPS
            reason = ": it jumps, so it has no finite Lipschitz constant" if step else ""
            raise Unsupported(f"operation '{name}' has no rule{reason}")

    def _flatten(self, node: fx.Node, source: Any) -> None:
        before, after = _shape(source), _shape(node)
        if len(after) != 1 or math.prod(before) != after[0]:
            raise Unsupported(f"a reshape from {before} to {after} has no rule; only flattening has")
        if before == after:
            self.index[node] = self.index[source]
        else:
            self._append(node, Flatten(), source)

    def _average(self, node: fx.Node, source: Any, module: nn.Module | None) -> None:
        before, after = _shape(source), _shape(node)
        if len(before) != 3:
            raise Unsupported("an average that is not over image positions has no rule")
        if node.target == "mean" or getattr(node.target, "__name__", "") == "mean":
            if after not in ((before[0],), (before[0], 1, 1)):
                raise Unsupported("a mean that is not over both image axes has no rule")
            self.index[node] = len(self.nodes)
            self.nodes.append(Node(AvgPool(before[1:], before[1:]), (self.index[source],), (before[0], 1, 1)))
            if len(after) == 1:
                self.index[node] = len(self.nodes)
                self.nodes.append(Node(Flatten(), (len(self.nodes) - 1,), after))
            return
        if isinstance(module, nn.AvgPool2d) or getattr(node.target, "__name__", "") == "avg_pool2d":
            self._append(node, _avg_pool(node, module), source)
            return
        if before[1] % after[1] or before[2] % after[2]:
            raise Unsupported(f"adaptive pooling from {before[1:]} to {after[1:]} has uneven windows and no rule")
        kernel = (before[1] // after[1], before[2] // after[2])
        self._append(node, AvgPool(kernel, kernel), source)

    def _arithmetic(self, node: fx.Node, name: str) -> None:
        left, right = node.args[0], node.args[1] if len(node.args) > 1 else None
        if left in self.index and right in self.index:
            if name != "add" or _shape(left) != _shape(right):
                raise Unsupported(f"'{name}' of two computed tensors has no rule; only the sum of equal shapes has")
            self._append(node, Add(), left, right)
            return
        source, other, swapped = (left, right, False) if left in self.index else (right, left, True)
        value = self._constant(other, _shape(source)) if name != "neg" else torch.ones(_shape(source)[0])
        one, zero = torch.ones_like(value), torch.zeros_like(value)
        if (name, swapped) == ("truediv", True):
            raise Unsupported("dividing by a computed tensor has no rule")
        scale, shift = {
            "add": (one, value),
            "sub": (-one, value) if swapped else (one, -value),
            "mul": (value, zero),
            "truediv": (one / value, zero),
            "div": (one / value, zero),
            "neg": (-one, zero),
        }[name]
        self._append(node, Affine("", scale, shift), source)

    def _constant(self, value: Any, shape: tuple[int, ...]) -> Tensor:
        tensor = self.constants[value] if isinstance(value, fx.Node) and value in self.constants else value
        if isinstance(tensor, fx.Node) or tensor is None:
            raise Unsupported("arithmetic with a value that is neither a constant nor a layer's output has no rule")
        tensor = torch.as_tensor(tensor, dtype=torch.float32) if not isinstance(tensor, Tensor) else tensor
        channels = shape[0]
        if tensor.numel() == 1:
            return tensor.detach().reshape(1).expand(channels)
        if tensor.numel() != channels:
            raise Unsupported(f"a constant of shape {tuple(tensor.shape)} is not one value per channel")
        return tensor.detach().reshape(channels)


def _attribute(model: nn.Module, path: str) -> Tensor:
    value: Any = operator.attrgetter(path)(model)
    if not isinstance(value, Tensor):
        raise Unsupported(f"'{path}' is not a tensor")
    return value


def _is_tensor(node: fx.Node) -> bool:
    return "shape" in node.meta


def _shape(node: Any) -> tuple[int, ...]:
    if not isinstance(node, fx.Node) or not _is_tensor(node):
        raise Unsupported(f"'{node}' is not a tensor")
    shape: tuple[int, ...] = node.meta["shape"]
    return shape[1:]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _convolution(name: str, module: nn.Conv2d) -> Conv2d:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise Unsupported(f"layer '{name}': only zero padding given as numbers has a rule")
    padding, dilation = _pair(module.padding), _pair(module.dilation)
    return Conv2d(name, module.weight, module.bias, _pair(module.stride), padding, dilation, module.groups)


def _batch_norm(name: str, module: nn.BatchNorm1d | nn.BatchNorm2d) -> Affine:
    if module.running_mean is None or module.running_var is None:
        raise Unsupported(f"layer '{name}' normalises by the batch even in eval mode; give it running statistics")
    scale = (module.running_var + module.eps).rsqrt()
    if module.affine:
        scale = scale * module.weight
    shift = -module.running_mean * scale
    return Affine(name, scale.detach(), (shift + module.bias if module.affine else shift).detach())


def _max_pool(module: nn.MaxPool2d) -> MaxPool:
    stride = _pair(module.stride if module.stride is not None else module.kernel_size)
    return MaxPool(_pair(module.kernel_size), stride, _pair(module.padding), _pair(module.dilation), module.ceil_mode)


def _functional_max_pool(node: fx.Node) -> MaxPool:
    options = dict(zip(("kernel_size", "stride", "padding", "dilation", "ceil_mode"), node.args[1:], strict=False))
    options.update(node.kwargs)
    kernel = _pair(options["kernel_size"])
    stride = kernel if options.get("stride") in (None, []) else _pair(options["stride"])
    padding, dilation = _pair(options.get("padding", 0)), _pair(options.get("dilation", 1))
    return MaxPool(kernel, stride, padding, dilation, bool(options.get("ceil_mode", False)))


def _avg_pool(node: fx.Node, module: nn.Module | None) -> AvgPool:
    kernel: Any
    stride: Any
    if isinstance(module, nn.AvgPool2d):
        kernel, stride, padding, ceil = module.kernel_size, module.stride, module.padding, module.ceil_mode
    else:
        options: dict[str, Any] = dict(
            zip(("kernel_size", "stride", "padding", "ceil_mode"), node.args[1:], strict=False)
        )
        options.update(node.kwargs)
        kernel, stride = options["kernel_size"], options.get("stride")
        padding, ceil = options.get("padding", 0), options.get("ceil_mode", False)
    if _pair(padding) != (0, 0) or ceil:
        raise Unsupported("average pooling with padding or ceil_mode has no rule")
    return AvgPool(_pair(kernel), _pair(kernel) if stride in (None, []) else _pair(stride))
