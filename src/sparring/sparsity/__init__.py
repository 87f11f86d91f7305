"""Every way a network is made sparse: score × structure × allocation × schedule, and dynamic methods."""

from __future__ import annotations

from ..tally import Counts, counts
from ._allocation import erdos_renyi_kernel, uniform
from ._channels import remove_channels, silent, tied_channels
from ._masks import (
    CollapsedLayerWarning,
    all_ones,
    applied_,
    apply_,
    collapsed,
    prunable,
    sparsity_of,
)
from ._rule import Rule, check_reached
from ._schedule import cubic
from ._scores import SCORES, gradients, magnitude, random, snip, taylor, wanda
from ._select import SCOPES, select
from ._structures import NM, Blocks, Channels, LeftDenseWarning, Structure, Unstructured
from ._types import Batch, Loss, Masks, Pruner, Score, Scores
from .activations._modules import (
    ACTIVATIONS,
    ActivationSparsifier,
    MeanSparse,
    Percentile,
    ShiftedReLU,
    StochasticPruning,
    Threshold,
    TopK,
)
from .activations._replace_relu import calibrate_, insert, sparsifiers
from .activations._statistics import Activity, LayerActivity, activity, with_activation_penalty
from .pruners._dns import dynamic_network_surgery
from .pruners._gradual import bernoulli, gradual, one_shot, proximal
from .pruners._lottery_ticket import iterative
from .pruners._movement_hydra import hydra, movement
from .pruners._registry import METHODS, STRUCTURES, PruningSpec, build_pruner
from .pruners._set_rigl import rigged_lottery, sparse_evolution

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
    "cubic",
    "dynamic_network_surgery",
    "erdos_renyi_kernel",
    "gradients",
    "gradual",
    "hydra",
    "insert",
    "iterative",
    "magnitude",
    "movement",
    "one_shot",
    "proximal",
    "prunable",
    "random",
    "remove_channels",
    "rigged_lottery",
    "select",
    "silent",
    "snip",
    "sparse_evolution",
    "sparsifiers",
    "sparsity_of",
    "taylor",
    "tied_channels",
    "uniform",
    "wanda",
    "with_activation_penalty",
]
