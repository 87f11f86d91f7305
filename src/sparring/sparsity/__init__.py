"""Every way a network is made sparse: score × structure × allocation × schedule, and dynamic methods."""

from __future__ import annotations

from .activation import (
    ACTIVATIONS,
    ActivationSparsifier,
    MeanSparse,
    Percentile,
    ShiftedReLU,
    StochasticPruning,
    Threshold,
    TopK,
)
from .allocation import erdos_renyi_kernel, uniform
from .channels import remove_channels, silent, tied_channels
from .contracts import Batch, Loss, Masks, Pruner, Score, Scores, Stateful
from .insertion import calibrate_, insert, sparsifiers
from .learned import hydra, movement
from .listening import Activity, LayerActivity, activity, with_activation_penalty
from .masks import (
    CollapsedLayerWarning,
    Counts,
    all_ones,
    applied_,
    apply_,
    check_masks,
    collapsed,
    counts,
    prunable,
    sparsity_of,
)
from .pruners import bernoulli, gradual, one_shot, proximal
from .registry import METHODS, STRUCTURES, PruningSpec, build_pruner
from .regrow import rigged_lottery, sparse_evolution
from .rewinding import iterative
from .rules import Rule, check_reached
from .schedule import cubic
from .scores import SCORES, gradients, magnitude, random, snip, taylor, wanda
from .selection import SCOPES, select
from .structures import NM, Blocks, Channels, LeftDenseWarning, Structure, Unstructured
from .surgery import dynamic_network_surgery

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
    "Stateful",
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
    "check_masks",
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
