"""Count the weights of a network, and how many of them are not zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .matrices import Matrix, matrices
from .modes import eval_mode
from .outputs import opened

__all__ = ["Counts", "counts", "made_dense"]

# fmt: off
# Operations that multiply with a matrix, and those whose result has the matrix's zeros, in the same places or others.
_PRODUCTS = frozenset({
    "linear", "bilinear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "inner", "einsum",
    "tensordot", "chain_matmul", "embedding", "embedding_bag", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell",
    "rnn_tanh_cell", "rnn_relu_cell", "multi_head_attention_forward", "scaled_dot_product_attention",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "__matmul__", "__rmatmul__",
})
_KEEPING = frozenset({
    "__get__", "__getitem__", "__mul__", "__neg__", "__rmul__", "__truediv__", "abs", "bfloat16", "chunk",
    "clone", "contiguous", "detach", "div", "double", "dropout", "expand", "expand_as", "flatten", "flip",
    "float", "half", "mul", "multiply", "narrow", "neg", "normalize", "permute", "relu", "reshape", "roll",
    "select", "sign", "split", "squeeze", "t", "tanh", "to", "transpose", "true_divide", "type_as", "unbind",
    "unflatten", "unsqueeze", "view", "view_as",
})
# fmt: on


@dataclass(frozen=True)
class Counts:
    """Counts of a network's values and of the nonzero ones: prunable weights, biases, normalisation, and all.

    Weights are those that layers compute with, after weight_norm and similar parametrisations. `matrices` are all
    weight matrices, including those that cannot be pruned or that forward() makes dense; `left_out` names these with
    the reason.
    """

    weights: int
    weights_nonzero: int
    biases: int
    biases_nonzero: int
    other: int
    other_nonzero: int
    matrices: int
    matrices_nonzero: int
    left_out: dict[str, str]

    @property
    def matrix_sparsity(self) -> float:
        """The fraction of zeros among the weights of all matrices, including those that cannot be pruned."""
        return 1.0 - self.matrices_nonzero / self.matrices if self.matrices else 0.0

    @property
    def weight_sparsity(self) -> float:
        """The fraction of prunable weights that are zero."""
        return 1.0 - self.weights_nonzero / self.weights if self.weights else 0.0

    @property
    def parameter_sparsity(self) -> float:
        """The fraction of zeros among all parameters, including biases and normalisation."""
        total = self.weights + self.biases + self.other
        nonzero = self.weights_nonzero + self.biases_nonzero + self.other_nonzero
        return 1.0 - nonzero / total if total else 0.0


def counts(model: nn.Module, x: Tensor | None = None) -> Counts:
    """Count a network's actual nonzero values, not those of its masks.

    x: images (N, ...) in [0, 1]; every weight of a matrix that forward() makes dense on them (see `made_dense`) counts.
    """
    values = {m: m.value() for m in matrices(model)}
    owners = {m.path for m in values if m.excuse is None}
    weights = {m.name: value for m, value in values.items() if m.excuse is None}
    biases: list[Tensor] = []
    other: list[Tensor] = []
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if name not in weights:
            (biases if "bias" in leaf and parameter.dim() == 1 and path in owners else other).append(parameter)
    left_out = {m.name: m.excuse for m in values if m.excuse is not None}
    left_out |= {} if x is None else made_dense(model, x)
    parts = (weights.values(), biases, other)
    tally = [(sum(v.numel() for v in part), sum(int(torch.count_nonzero(v)) for v in part)) for part in parts]
    dense = {m.name for m in values if m.excuse is None} & left_out.keys()
    total = sum(v.numel() for v in values.values())
    nonzero = sum(v.numel() if m.name in dense else int(torch.count_nonzero(v)) for m, v in values.items())
    return Counts(*tally[0], *tally[1], *tally[2], total, nonzero, left_out)


def made_dense(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Return the names of matrices that forward() transforms into others without their zeros, with the operation.

    x: images (N, ...) in [0, 1]; the model gets two of them. For example, `weight.softmax(-1)` and `weight + b @ a` are
    not zero where the weight is. Operations in compiled or scripted code are not detected.
    """
    known = [m for m in matrices(model) if m.excuse is None]
    with eval_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), parametrize.cached():
        network = opened(model, x[:2])
        with _Uses(known) as uses:
            network(x[:2])
    return {
        name: f"forward() uses it through '{operation}', which does not keep zeros"
        for name, operation in uses.lost.items()
    }


class _Uses(TorchFunctionMode):
    """Follow matrices through operations: `lost` names the first operation by which one loses its zeros."""

    def __init__(self, known: Iterable[Matrix]) -> None:
        super().__init__()
        values = [(getattr(m.module, m.attribute, None), m.name) for m in known]
        self.names = {id(value): name for value, name in values if isinstance(value, Tensor)}
        self.held = [value for value, _ in values]
        self.lost: dict[str, str] = {}

    def __torch_function__(self, function: Callable[..., Any], _types: Any, args: Any = (), options: Any = None) -> Any:
        result = function(*args, **(options or {}))
        name = getattr(function, "__name__", "")
        if name in _PRODUCTS:
            return result
        for value in args:
            if isinstance(value, Tensor) and id(value) in self.names:
                self._follow(value, name, result)
        return result

    def _follow(self, value: Tensor, name: str, result: Any) -> None:
        """Record an operation's result as the same matrix, or the matrix as lost."""
        for made in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(made, Tensor) or made is value:
                continue
            if name in _KEEPING:
                self.names[id(made)] = self.names[id(value)]
                self.held.append(made)  # or another tensor could get its identity
            elif made.shape == value.shape and made.is_floating_point():
                self.lost.setdefault(self.names[id(value)], name.strip("_"))
