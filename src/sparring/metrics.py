"""Pure functions of models and tensors: accuracy, distances in both conventions, operations, bytes.

Examples:
    >>> import torch
    >>> from sparring import metrics
    >>> metrics.accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    0.75
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .graph import Call, Conv2d, Linear, lower, refusal
from .tally import counts

__all__ = ["Distances", "Size", "accuracy", "distances", "macs", "robust_accuracy", "size"]

# Operations that multiply by weights, or values by one another, and that are not counted here.
_MULTIPLY = frozenset(
    """matmul bmm scaled_dot_product_attention conv1d conv3d conv_transpose1d conv_transpose2d conv_transpose3d lstm gru
    rnn_tanh rnn_relu""".split()  # noqa: SIM905
)


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Return the fraction of images whose largest logit, of logits (N, classes), is that of the label in y (N,)."""
    return float((logits.argmax(1) == y).double().mean())


def robust_accuracy(clean_correct: Tensor, success: Tensor) -> float:
    """Return the fraction of images that are correct without and under attack; both arguments are bool (N,)."""
    return float((clean_correct & ~success).double().mean())


@dataclass(frozen=True)
class Distances:
    """Distances of a minimum-norm attack in both conventions (design.md, section 2).

    `mean` is over all images and counts misclassified ones as 0 (the paper's r_2). `mean_correct` and `median_correct`
    are over correctly classified images on which the attack succeeded. `failed` is the fraction of correctly classified
    images on which it did not succeed; these are censored and enter no mean. A value is NaN if there is nothing to
    average.
    """

    mean: float
    mean_correct: float
    median_correct: float
    failed: float


def distances(distance: Tensor, clean_correct: Tensor) -> Distances:
    """Summarise distances (N,), which are inf where the attack failed."""
    found = torch.isfinite(distance)
    counted = torch.where(clean_correct, distance, torch.zeros_like(distance)).double()
    correct = counted[clean_correct & found]
    failed = float((clean_correct & ~found).sum()) / max(1, int(clean_correct.sum()))
    usable = counted[found | ~clean_correct]
    return Distances(_mean(usable), _mean(correct), float(correct.median()) if len(correct) else math.nan, failed)


def pixel_distances(x_adv: Tensor, x: Tensor, distance: Tensor) -> Tensor:
    """Return in how many pixels, whatever the channel, images (N, C, ...) differ: (N,), inf where the distance is."""
    changed = (x_adv != x).any(1).flatten(1).sum(1)
    return torch.where(torch.isfinite(distance), changed, torch.inf)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


@dataclass(frozen=True)
class Size:
    """Count a network's parameters and weights.

    `weights` are those that can be pruned: the weights of linear, convolutional, recurrent and attention layers, as the
    layers compute with them (after weight_norm, for example). `matrices` counts the weights of all matrices, including
    those that cannot be pruned.
    """

    parameters: int
    weights: int
    nonzero: int
    nonzero_weights: int
    matrices: int
    nonzero_matrices: int

    @property
    def sparsity_matrices(self) -> float:
        """Return the fraction of zeros among the weights of all matrices, including those that cannot be pruned."""
        return 1 - self.nonzero_matrices / max(1, self.matrices)

    @property
    def sparsity(self) -> float:
        """Return the fraction of prunable weights that are zero."""
        return 1 - self.nonzero_weights / max(1, self.weights)

    @property
    def sparsity_total(self) -> float:
        """Return the fraction of zeros among all parameters, including biases and normalisation."""
        return 1 - self.nonzero / max(1, self.parameters)

    @property
    def bytes_dense(self) -> int:
        """Return the bytes of all parameters in float32."""
        return 4 * self.parameters

    @property
    def bytes_sparse(self) -> int:
        """Return the bytes of a bitmask over the prunable weights and the remaining values in float32."""
        return math.ceil(self.weights / 8) + 4 * (self.nonzero_weights + self.parameters - self.weights)


def size(model: nn.Module, x: Tensor | None = None) -> Size:
    """Count parameters and weights, and how many of them are nonzero; for x see `counts`."""
    counted, everything = counts(model, x), list(model.parameters())
    return Size(
        sum(p.numel() for p in everything),
        counted.weights,
        sum(int(p.count_nonzero()) for p in everything),
        counted.weights_nonzero,
        counted.matrices,
        counted.matrices_nonzero,
    )


def macs(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Count the multiply-accumulates with weights for one image of `shape`: (all weights, nonzero weights only).

    Raise Unsupported for a model that cannot be lowered, or that has weights in operations that are not counted.
    """
    dense, sparse = 0, 0
    for node in lower(model, shape).nodes:
        if isinstance(node.op, Linear | Conv2d):
            positions = math.prod(node.shape) // len(node.op.weight)
            dense += node.op.weight.numel() * positions
            sparse += int(node.op.weight.count_nonzero()) * positions
        elif isinstance(node.op, Call) and node.op.name in _MULTIPLY:
            raise refusal(node, "has no rule for counting its products; write it with layers of torch.nn")
    return dense, sparse
