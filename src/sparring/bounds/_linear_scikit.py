"""Linear classifiers trained by scikit-learn: regularisation paths and magnitude pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from ..errors import UserError

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC


def linear_path(
    x: Tensor,
    y: Tensor,
    strengths: Sequence[float],
    *,
    loss: str = "logistic",
    penalty: str = "l2",
    iterations: int = 1000,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> list[nn.Sequential]:
    """Train one linear classifier per inverse penalty strength (scikit-learn's C) on images x (N, ...) in [0, 1].

    loss: "logistic" or "svm" (squared hinge); penalty: "l1" or "l2" (Fan et al. 2008, liblinear; one against the rest
    for more than two classes). Each result maps images to logits (N, classes); for two classes their difference is
    scikit-learn's decision function. Raises UserError for other names or labels other than 0..classes−1.
    """
    pixels, targets = _problem(x, y, loss, penalty)
    everywhere = np.ones((len(targets), pixels.shape[1]), dtype=np.bool_)
    estimators = (_estimator(loss, penalty, strength, iterations, tolerance, seed) for strength in strengths)
    return [_fitted(estimator, pixels, targets, everywhere) for estimator in estimators]


def linear_pruned(
    x: Tensor,
    y: Tensor,
    sparsities: Sequence[float],
    *,
    dense: nn.Sequential,
    loss: str = "logistic",
    strength: float = 1.0,
    iterations: int = 1000,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> list[nn.Sequential]:
    """Prune a classifier of `linear_path` by magnitude to each sparsity, and train the remaining weights again.

    `dense` was trained with the l2 penalty, this loss and this strength. Each class keeps its largest weights; for two
    classes both logits keep the same ones. Raises UserError as `linear_path` does, and for sparsities outside [0, 1).
    """
    if not all(0 <= sparsity < 1 for sparsity in sparsities):
        raise UserError("a sparsity is the fraction removed, at least 0 and below 1")
    pixels, targets = _problem(x, y, loss, "l2")
    layer = dense[-1]
    assert isinstance(layer, nn.Linear)
    sizes = layer.weight.detach().abs()[-len(targets) :].numpy()
    models = []
    for sparsity in sparsities:
        count = max(1, round((1 - sparsity) * sizes.shape[1]))
        keep = np.zeros_like(sizes, dtype=np.bool_)
        np.put_along_axis(keep, np.argsort(-sizes, axis=1, kind="stable")[:, :count], True, axis=1)
        models.append(_fitted(_estimator(loss, "l2", strength, iterations, tolerance, seed), pixels, targets, keep))
    return models


def _problem(x: Tensor, y: Tensor, loss: str, penalty: str) -> tuple[csr_matrix, NDArray[np.bool_]]:
    """Check, and return the pixels and one row of targets per classifier to train: one for two classes."""
    if loss not in ("logistic", "svm") or penalty not in ("l1", "l2"):
        raise UserError(f"loss is 'logistic' or 'svm' and penalty 'l1' or 'l2', not '{loss}' and '{penalty}'")
    if len(y) == 0 or torch.unique(y).tolist() != list(range(int(y.max()) + 1)) or int(y.max()) < 1:
        raise UserError("a linear classifier needs images of every class 0, 1, ... and at least two classes")
    classes = int(y.max()) + 1
    labels = range(classes) if classes > 2 else (1,)
    # Most pixels are 0, which liblinear skips: with sparse rows it need not search for them at every strength.
    return csr_matrix(x.double().flatten(1).numpy()), np.stack([y.numpy() == label for label in labels])


def _fitted(
    estimator: LogisticRegression | LinearSVC, pixels: csr_matrix, targets: NDArray[np.bool_], keep: NDArray[np.bool_]
) -> nn.Sequential:
    """Train one against the rest, each on the pixels it keeps, and return them as a model."""
    weights, biases = np.zeros(keep.shape), np.zeros(len(keep))
    for row, (target, kept) in enumerate(zip(targets, keep, strict=True)):
        estimator.fit(pixels if kept.all() else pixels[:, kept], target)
        weights[row, kept], biases[row] = estimator.coef_[0], estimator.intercept_[0]
    weight, bias = torch.from_numpy(weights), torch.from_numpy(biases)
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    layer = nn.Linear(weight.shape[1], len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), layer)


def _estimator(
    loss: str, penalty: str, strength: float, iterations: int, tolerance: float, seed: int
) -> LogisticRegression | LinearSVC:
    # A third of a second to import, which only linear studies should pay.
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    if loss == "svm":
        return LinearSVC(C=strength, penalty=penalty, dual=False, max_iter=iterations, tol=tolerance, random_state=seed)
    estimator = LogisticRegression(
        C=strength, solver="liblinear", max_iter=iterations, tol=tolerance, random_state=seed
    )
    if estimator.get_params().get("penalty", "deprecated") == "deprecated":  # scikit-learn 1.8 and later
        return estimator.set_params(l1_ratio=float(penalty == "l1"))
    return estimator.set_params(penalty=penalty)
