"""Every way a network is made sparse: score × structure × allocation × schedule, and dynamic methods."""

from __future__ import annotations

from .allocation import erdos_renyi_kernel, uniform
from .channels import remove_channels, silent, tied_channels
from .contracts import Batch, Loss, Masks, Pruner, Score, Scores, Stateful
from .learned import hydra, movement
from .masks import (
    CollapsedLayerWarning,
    Counts,
    all_ones,
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
from .scores import SCORES, magnitude, random, snip, taylor, wanda
from .selection import SCOPES, select
from .structures import NM, Blocks, Channels, Structure, Unstructured
from .surgery import dynamic_network_surgery

__all__ = [
    "METHODS",
    "NM",
    "SCOPES",
    "SCORES",
    "STRUCTURES",
    "Batch",
    "Blocks",
    "Channels",
    "CollapsedLayerWarning",
    "Counts",
    "Loss",
    "Masks",
    "Pruner",
    "PruningSpec",
    "Rule",
    "Score",
    "Scores",
    "Stateful",
    "Structure",
    "Unstructured",
    "all_ones",
    "apply_",
    "bernoulli",
    "build_pruner",
    "check_masks",
    "check_reached",
    "collapsed",
    "counts",
    "cubic",
    "dynamic_network_surgery",
    "erdos_renyi_kernel",
    "gradual",
    "hydra",
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
    "sparsity_of",
    "taylor",
    "tied_channels",
    "uniform",
    "wanda",
]
