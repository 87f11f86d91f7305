"""Linear classifiers trained by scikit-learn, as models of ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["linear_path"]


def linear_path(
    x: Tensor,
    y: Tensor,
    strengths: Sequence[float],
    *,
    loss: str = "logistic",
    penalty: str = "l2",
    iterations: int = 1000,
    seed: int = 0,
) -> list[nn.Sequential]:
    """Train one linear classifier per inverse penalty strength (scikit-learn's C) on images x (N, ...) in [0, 1].

    loss: "logistic" or "svm" (squared hinge); penalty: "l1" or "l2" (Fan et al. 2008, liblinear; one against the rest
    where there are more than two classes). Each result maps images to logits (N, classes); for two classes their
    difference is scikit-learn's decision function. Raise UserError for other names or labels that are not 0..classes−1.
    """
    if loss not in ("logistic", "svm") or penalty not in ("l1", "l2"):
        raise UserError(f"loss is 'logistic' or 'svm' and penalty 'l1' or 'l2', not '{loss}' and '{penalty}'")
    if len(y) == 0 or torch.unique(y).tolist() != list(range(int(y.max()) + 1)) or int(y.max()) < 1:
        raise UserError("a linear classifier needs images of every class 0, 1, ... and of two classes at least")
    pixels, labels = x.double().flatten(1).numpy(), y.numpy()
    models = []
    for strength in strengths:
        estimator = _estimator(loss, penalty, strength, iterations, seed)
        fitted = OneVsRestClassifier(estimator).fit(pixels, labels).estimators_
        models.append(
            _as_model([torch.from_numpy(e.coef_[0]) for e in fitted], [float(e.intercept_[0]) for e in fitted])
        )
    return models


def _estimator(loss: str, penalty: str, strength: float, iterations: int, seed: int) -> LogisticRegression | LinearSVC:
    if loss == "svm":
        return LinearSVC(C=strength, penalty=penalty, dual=False, max_iter=iterations, random_state=seed)
    estimator = LogisticRegression(C=strength, solver="liblinear", max_iter=iterations, random_state=seed)
    if estimator.get_params().get("penalty", "deprecated") == "deprecated":  # scikit-learn 1.8 and later
        return estimator.set_params(l1_ratio=float(penalty == "l1"))
    return estimator.set_params(penalty=penalty)


def _as_model(weights: list[Tensor], biases: list[float]) -> nn.Sequential:
    weight, bias = torch.stack(weights), torch.tensor(biases, dtype=torch.float64)
    if len(weight) == 1:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    layer = nn.Linear(weight.shape[1], len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), layer)
