"""Theory: certified robustness, exact distances, Lipschitz constants and linear closed forms.

Examples:
    >>> import torch
    >>> from sparring import bounds
    >>> from sparring.threat import LINF
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False)).eval()
    >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]))
    >>> radius = bounds.radius(net, torch.full((1, 1, 2, 2), 0.1), torch.tensor([0]), LINF)
    >>> 0.099 < float(radius) < 0.1
    True
"""

from __future__ import annotations

from ._linear_closed_form import (
    LinearMap,
    Theorem,
    linear_distance,
    linear_distances,
    linear_fooled,
    linear_r_2,
    linear_r_inf,
    theorem,
    weights_of,
)
from ._linear_scikit import linear_path, linear_pruned
from ._lipschitz import LIPSCHITZ, MaskedPoint, lipschitz, margin_ratios, random_mask_bounds
from ._summary import VACUOUS, Summary, summary
from .certify._certificates import BOUNDS, certified_accuracy, margin, radius, stable
from .certify._estimate import estimate, tightest
from .certify._training import TrainingBounds, ibp_initialise_, training_bounds
from .exact_distances._exact import Exact, exact
from .verification._verify import Verdict, verify, verify_property
from .verification._vnnlib import Property, read_vnnlib, results_text

__all__ = [
    "BOUNDS",
    "LIPSCHITZ",
    "VACUOUS",
    "Exact",
    "LinearMap",
    "MaskedPoint",
    "Property",
    "Summary",
    "Theorem",
    "TrainingBounds",
    "Verdict",
    "certified_accuracy",
    "estimate",
    "exact",
    "ibp_initialise_",
    "linear_distance",
    "linear_distances",
    "linear_fooled",
    "linear_path",
    "linear_pruned",
    "linear_r_2",
    "linear_r_inf",
    "lipschitz",
    "margin",
    "margin_ratios",
    "radius",
    "random_mask_bounds",
    "read_vnnlib",
    "results_text",
    "stable",
    "summary",
    "theorem",
    "tightest",
    "training_bounds",
    "verify",
    "verify_property",
    "weights_of",
]
