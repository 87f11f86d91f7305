"""Every way a network is made sparse: score × structure × allocation × schedule, and dynamic methods."""

from __future__ import annotations

from .allocation import erdos_renyi_kernel, uniform
from .contracts import Batch, Loss, Masks, Pruner, Score, Scores, Stateful
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
from .pruners import cubic, gradual, one_shot
from .rules import Rule, first_and_last
from .scores import SCORES, magnitude, random, snip, taylor, wanda
from .selection import SCOPES, select
from .structures import NM, Blocks, Channels, Structure, Unstructured

__all__ = [
    "NM",
    "SCOPES",
    "SCORES",
    "Batch",
    "Blocks",
    "Channels",
    "CollapsedLayerWarning",
    "Counts",
    "Loss",
    "Masks",
    "Pruner",
    "Rule",
    "Score",
    "Scores",
    "Stateful",
    "Structure",
    "Unstructured",
    "all_ones",
    "apply_",
    "check_masks",
    "collapsed",
    "counts",
    "cubic",
    "erdos_renyi_kernel",
    "first_and_last",
    "gradual",
    "magnitude",
    "one_shot",
    "prunable",
    "random",
    "select",
    "snip",
    "sparsity_of",
    "taylor",
    "uniform",
    "wanda",
]
