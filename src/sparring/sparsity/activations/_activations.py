"""Modules that make activations sparse and replace ReLUs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...declared import Declared
from ...errors import UnknownNameError, UserError
from ...modes import eval_mode
from ...outputs import opened


class ActivationSparsifier(Declared):
    """Replace a ReLU: subclasses define the sparse activations in `sparse`, and the properties of `Declared`."""

    masks_gradients = True

    def forward(self, x: Tensor) -> Tensor:
        result = self.sparse(x)
        if not self.straight_through:
            return result
        dense = x.clamp_min(0)
        return dense + (result - dense).detach()

    def dense(self) -> nn.Module:
        """Return the layer that this module replaced."""
        return nn.ReLU()

    def sparse(self, x: Tensor) -> Tensor:
        """Return the sparse activations (N, ...) of pre-activations (N, ...)."""
        raise TypeError(f"{type(self).__name__} must define sparse()")


class ShiftedReLU(ActivationSparsifier):
    """max(x − threshold, 0): continuous, with a correct gradient (Mirzadeh et al. 2024, section 5.3)."""

    kind = "shifted-relu"
    nondecreasing = True
    masks_gradients = False

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = _not_negative(threshold, "threshold")

    def sparse(self, x: Tensor) -> Tensor:
        return (x - self.threshold).clamp_min(0)


class Threshold(ActivationSparsifier):
    """x where x > threshold, else 0 (FATReLU, Kurtz et al. 2020); its gradient does not show the jump."""

    kind = "threshold"
    nondecreasing = True

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = _not_negative(threshold, "threshold")

    def sparse(self, x: Tensor) -> Tensor:
        return x * (x > self.threshold)


class TopK(ActivationSparsifier):
    """Keep the largest activations of each image and layer (k-winners-take-all, Xiao et al. 2020).

    `sparsity` is the fraction set to zero; at least one activation stays.
    """

    kind = "top-k"

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        self.sparsity = _fraction(sparsity, "sparsity")

    def sparse(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        keep = max(1, flat.shape[1] - round(self.sparsity * flat.shape[1]))
        best = flat.topk(keep, dim=1).indices
        mask = torch.zeros_like(flat).scatter_(1, best, 1.0)
        return (flat.clamp_min(0) * mask).view_as(x)


class Percentile(ActivationSparsifier):
    """A threshold per layer at a percentile of its activations on calibration data; see `calibrate_`.

    `sparsity` is the fraction that is set to zero on these data. Before calibration this is a ReLU.
    """

    kind = "percentile"
    nondecreasing = True
    threshold: Tensor

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        self.sparsity = _fraction(sparsity, "sparsity")
        self.calibrating = False
        self.register_buffer("threshold", torch.zeros(()))

    def sparse(self, x: Tensor) -> Tensor:
        if self.calibrating:
            values = x.detach().clamp_min(0).flatten()
            rank = round(self.sparsity * values.numel())
            self.threshold.copy_(values.kthvalue(rank).values if rank else torch.zeros(()))
        return x * (x > self.threshold)


class StochasticPruning(ActivationSparsifier):
    """Stochastic activation pruning (Dhillon et al. 2018, equation 4): keep and rescale activations that are sampled.

    `samples` is the number of samples as a fraction of the layer's units, drawn with replacement and with probabilities
    proportional to the activations.
    """

    kind = "stochastic-pruning"
    stochastic = True

    def __init__(self, samples: float) -> None:
        super().__init__()
        if not 0 < samples <= 10:
            raise UserError(f"samples is the number of draws per unit, above 0 and at most 10, not {samples}")
        self.samples = samples

    def sparse(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).clamp_min(0)
        total = flat.detach().sum(1, keepdim=True)
        # A layer without activity draws uniformly from zeros: the result is still zero.
        chance = torch.where(total > 0, flat.detach() / total.clamp_min(1e-30), 1 / flat.shape[1])
        draws = max(1, round(self.samples * flat.shape[1]))
        drawn = torch.multinomial(chance, draws, replacement=True, generator=self.generator)
        hit = torch.zeros_like(flat).scatter_(1, drawn, 1.0)
        kept = -torch.expm1(draws * torch.log1p(-chance.clamp_max(1 - 1e-7)))  # 1 − (1 − chance)^draws
        return (flat * hit / kept.clamp_min(1e-30)).view_as(x)


class MeanSparse(ActivationSparsifier):
    """Block variation around the mean, then ReLU (Amini et al. 2024, equation 5): |x − μ| <= α·σ becomes μ.

    μ and σ are those of each channel's pre-activations on calibration data (see `calibrate_`); before that, it is a
    ReLU. It makes x − μ sparse, not the activations. Every published gain disappeared under BPDA (`straight_through`).
    """

    kind = "mean-sparse"
    nondecreasing = True
    mean: Tensor
    radius: Tensor

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = _not_negative(alpha, "alpha")
        self.calibrating = False
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("radius", torch.full((1,), -1.0))

    def sparse(self, x: Tensor) -> Tensor:
        if self.calibrating:
            axes = [axis for axis in range(x.dim()) if axis != 1]
            self.mean = x.detach().mean(axes)
            self.radius = self.alpha * x.detach().std(axes, correction=0)
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, radius = self.mean.view(shape), self.radius.view(shape)
        return torch.where((x - mean).abs() <= radius, mean, x).clamp_min(0)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        # The buffers get their size, one value per channel, at calibration.
        for name in ("mean", "radius"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _fraction(value: float, name: str) -> float:
    if not 0 <= value < 1:
        raise UserError(f"{name} is a fraction, at least 0 and below 1, not {value}")
    return value


def _not_negative(value: float, name: str) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} is a finite number, at least 0, not {value}")
    return value


# Classes that take a level.
ACTIVATIONS: dict[str, type[Any]] = {
    module.kind: module for module in (ShiftedReLU, Threshold, TopK, Percentile, StochasticPruning, MeanSparse)
}


# -- in the place of ReLUs ---------------------------------------------------------------------------------------------

_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_METHODS = ("relu", "relu_")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Declared) or super().is_leaf_module(m, module_qualified_name)


def insert(model: nn.Module, factory: Callable[[], nn.Module], *, spare: Collection[str] = ()) -> nn.Module:
    """Return a copy of a model in which a module of the factory replaces every ReLU, module or function.

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
                f"the function '{node.name}' would keep its current mode when the model is traced; "
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
    """Yield the sparse activations of a model with their paths."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationSparsifier):
            yield name, module


@torch.no_grad()
def calibrate_(model: nn.Module, x: Tensor) -> None:
    """Set thresholds and means of the modules that need them, in place, from one batch of float images in [0, 1].

    Each module is calibrated on the outputs of the modules before it. Use the validation split, never the test split; a
    few hundred images are enough.
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
