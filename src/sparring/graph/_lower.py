"""The one way to a graph: read a model, compare what was read with the model itself, and only then hand it over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ._check import check, observed
from ._ops import Graph
from ._plain_stacks import read_plain


def lower(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    images: Tensor | None = None,
    dtype: torch.dtype | None = None,
    plain: bool = False,
) -> Graph:
    """Lower a classifier for images of `shape` (channels, height, width) to a Graph that computes the same logits.

    The graph is what torch computes in eval mode: hooks, replaced forwards and writes in place included. It is compared
    with the model on random images inside [0, 1] and at its corners and on up to eight of `images` (N, *shape): each
    alone, all together, in another order, among many others, with and without gradients, and twice; see `check`.
    dtype: of the graph's tensors; None leaves those of the model, and parameters are then shared, not copied. plain:
    read only plain stacks of torch's layers, which takes milliseconds, and refuse the rest. The model, its modes,
    buffers, hooks and random state come back as they were.

    Raise Unsupported, naming operation, layer and line, for what has no rule, what draws at random, what depends on
    other images, and for a graph that differs from the model; UserError if the model does not accept such images.
    """
    with observed(model, shape, images) as seen:
        graph = read_plain(model, shape, dtype or seen.dtype, seen.x.device, shared=dtype is None)
        if graph is None and plain:
            raise Unsupported(f"{type(model).__name__} is not a plain stack of layers")
        if graph is None:
            from ._torch_export import read_exported

            graph = read_exported(model, seen.x[:2], dtype or seen.dtype, shared=dtype is None)
        return check(graph, model, seen)
