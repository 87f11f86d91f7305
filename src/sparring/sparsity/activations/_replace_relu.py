"""Put activation-sparsity modules in the place of every ReLU of a model, and calibrate them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...errors import UnknownNameError, UserError
from ...modes import eval_mode
from ...outputs import opened
from ._modules import ActivationSparsifier, MeanSparse, Percentile

_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_METHODS = ("relu", "relu_")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hasattr(m, "straight_through") or super().is_leaf_module(m, module_qualified_name)


def insert(model: nn.Module, factory: Callable[[], nn.Module], *, spare: Collection[str] = ()) -> nn.Module:
    """Return a copy of a model with a module of the factory's in the place of every ReLU, module or function.

    Parameters keep their names and values. A model whose ReLUs are modules, each used once, keeps its class; otherwise
    it is traced. `spare` names ReLUs that stay: a module's path, or "relu", "relu_1", ... for functions in the order of
    the forward pass. Raise UserError if there is no ReLU, or if functions cannot be found because tracing fails.
    """
    model = copy.deepcopy(model)
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's forward(), which can raise anything
        raise UserError(
            f"{type(model).__name__} cannot be traced, so its ReLUs cannot be found ({error}); "
            "write the forward pass without branching on values, or put the modules in by hand"
        ) from error
    found = [node for node in graph.nodes if _is_relu(model, node)]
    names = {node: str(node.target) if node.op == "call_module" else node.name for node in found}
    for name in spare:
        if name not in names.values():
            raise UnknownNameError("ReLU", name, names.values())
    chosen = [node for node in found if names[node] not in spare]
    if not chosen:
        raise UserError(f"{type(model).__name__} has no ReLU to replace")
    paths = [names[node] for node in chosen if node.op == "call_module"]
    if len(set(paths)) == len(chosen):
        for path in paths:
            model.set_submodule(path, factory().train(model.get_submodule(path).training))
        return model
    return _rewritten(model, graph, chosen, factory)


def _is_relu(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), nn.ReLU)
    return (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target in _METHODS
    )


def _rewritten(
    model: nn.Module, graph: fx.Graph, chosen: list[fx.Node], factory: Callable[[], nn.Module]
) -> fx.GraphModule:
    for node in graph.nodes:
        if node.op == "call_function" and "training" in node.kwargs:
            raise UserError(
                f"the function '{node.name}' would stay in its present mode when the model is traced; "
                "use its module (nn.Dropout) instead"
            )
    for index, node in enumerate(chosen):
        name = f"sparse_activation_{index}"
        model.add_module(name, factory().train(model.training))
        with graph.inserting_after(node):
            replacement = graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    rewritten = fx.GraphModule(model, graph)
    rewritten.training = model.training
    return rewritten


def sparsifiers(model: nn.Module) -> Iterator[tuple[str, ActivationSparsifier]]:
    """Yield the activation-sparsity modules of a model with their paths."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationSparsifier):
            yield name, module


@torch.no_grad()
def calibrate_(model: nn.Module, x: Tensor) -> None:
    """Set thresholds and means of the modules that need them, from one batch of float images in [0, 1], in place.

    Each module is calibrated on what the modules before it let through. Use the validation split, never the test
    split; some hundred images are plenty.
    """
    if not len(x):
        raise UserError("calibration needs images; the batch is empty")
    needing = [module for _, module in sparsifiers(model) if isinstance(module, Percentile | MeanSparse)]
    try:
        for module in needing:
            module.calibrating = True
        with eval_mode(model):
            opened(model, x)(x)
    finally:
        for module in needing:
            module.calibrating = False
