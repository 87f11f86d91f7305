"""Sparsity: pruning as score × structure × allocation × schedule, dynamic methods, and sparse activations.

Examples:
    >>> import torch
    >>> from sparring import sparsity
    >>> net = torch.nn.Linear(10, 10)
    >>> masks = sparsity.select(sparsity.magnitude(net), 0.9)
    >>> sparsity.apply_(net, masks)
    >>> sparsity.sparsity_of(masks), int((net.weight != 0).sum())
    (0.9, 10)
"""

from __future__ import annotations

from ..declared import Declared
from ..tally import Counts, counts
from ._masks import (
    Batch,
    CollapsedLayerWarning,
    Loss,
    Masks,
    Score,
    Scores,
    all_ones,
    applied_,
    apply_,
    collapsed,
    masked,
    multiply_,
    prunable,
    shown,
    sparsity_of,
    targets,
)
from ._registry import METHODS, STRUCTURES, PruningSpec, build_pruner, covered, spared
from ._rule import Pruner, Rule, Step, check_reached, cubic
from ._scores import SCORES, gradients, magnitude, random, snip, taylor, wanda
from ._select import (
    NM,
    SCOPES,
    Blocks,
    Channels,
    Inputs,
    LeftDenseWarning,
    Structure,
    Unstructured,
    erdos_renyi_kernel,
    select,
    uniform,
)
from .activations._activations import (
    ACTIVATIONS,
    ActivationSparsifier,
    MeanSparse,
    Percentile,
    ShiftedReLU,
    StochasticPruning,
    Threshold,
    TopK,
    calibrate_,
    insert,
    sparsifiers,
)
from .activations._activity import Activity, LayerActivity, activity, with_activation_penalty
from .channels._channels import remove_channels, silent, tied_channels
from .methods._dns import dynamic_network_surgery
from .methods._gradual import bernoulli, gradual, iterative, one_shot, proximal
from .methods._movement_hydra import hydra, movement
from .methods._set_rigl import rigged_lottery, sparse_evolution

__all__ = [
    "ACTIVATIONS",
    "METHODS",
    "NM",
    "SCOPES",
    "SCORES",
    "STRUCTURES",
    "ActivationSparsifier",
    "Activity",
    "Batch",
    "Blocks",
    "Channels",
    "CollapsedLayerWarning",
    "Counts",
    "Declared",
    "Inputs",
    "LayerActivity",
    "LeftDenseWarning",
    "Loss",
    "Masks",
    "MeanSparse",
    "Percentile",
    "Pruner",
    "PruningSpec",
    "Rule",
    "Score",
    "Scores",
    "ShiftedReLU",
    "Step",
    "StochasticPruning",
    "Structure",
    "Threshold",
    "TopK",
    "Unstructured",
    "activity",
    "all_ones",
    "applied_",
    "apply_",
    "bernoulli",
    "build_pruner",
    "calibrate_",
    "check_reached",
    "collapsed",
    "counts",
    "covered",
    "cubic",
    "dynamic_network_surgery",
    "erdos_renyi_kernel",
    "gradients",
    "gradual",
    "hydra",
    "insert",
    "iterative",
    "magnitude",
    "masked",
    "movement",
    "multiply_",
    "one_shot",
    "proximal",
    "prunable",
    "random",
    "remove_channels",
    "rigged_lottery",
    "select",
    "shown",
    "silent",
    "snip",
    "spared",
    "sparse_evolution",
    "sparsifiers",
    "sparsity_of",
    "targets",
    "taylor",
    "tied_channels",
    "uniform",
    "wanda",
    "with_activation_penalty",
]
