"""What a study of linear classifiers is: for each loss, paths of classifiers on every pair of classes and on all."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from ...errors import PlanError


@dataclass(frozen=True)
class LinearPaths:
    """Train one loss with both penalties along `l1` and `l2`, and prune by `magnitude` what validation accuracy chose.

    `l1` and `l2` are inverse penalty strengths (scikit-learn's C), `magnitude` sparsities, `eps` budgets in l_inf.
    Every pair of `classes` (none: of all) is studied, and all of them at once; `train_images` and `images` are the most
    that a group trains on and is judged on. `tolerance` is the solver's.
    """

    loss: Literal["logistic", "svm"] = "logistic"
    l2: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    l1: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    magnitude: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
    eps: tuple[float, ...] = (0.1,)
    classes: tuple[int, ...] | None = None
    images: int = 1000
    train_images: int = 12_000
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not self.l2 or not self.eps:
            raise PlanError("[[linear]] needs at least one l2 strength, for the dense classifier, and one eps")
        if any(value <= 0 for value in (*self.l2, *self.l1, *self.eps, self.tolerance)):
            raise PlanError("[[linear]]: strengths, eps and tolerance must be above 0")
        if not all(0 < sparsity < 1 for sparsity in self.magnitude):
            raise PlanError("[[linear]]: a sparsity is the fraction removed, above 0 and below 1")
        if self.images < 2 or self.train_images < 2:
            raise PlanError("[[linear]]: images and train_images must be 2 or more")
        if self.classes is not None and (len(set(self.classes)) != len(self.classes) or len(self.classes) < 2):
            raise PlanError("[[linear]]: classes must be two or more different ones")

    def groups(self, classes: int) -> list[tuple[int, ...]]:
        """Return all studied classes at once, then every pair, of a data set with so many classes.

        The largest group comes first, since it takes longest. Raise PlanError for classes that the data lack.
        """
        chosen = tuple(sorted(self.classes or range(classes)))
        if chosen[-1] >= classes or chosen[0] < 0:
            raise PlanError(f"[[linear]]: classes are numbered 0 to {classes - 1}; the plan names {list(chosen)}")
        pairs: list[tuple[int, ...]] = list(itertools.combinations(chosen, 2))
        return pairs if len(chosen) == 2 else [chosen, *pairs]
