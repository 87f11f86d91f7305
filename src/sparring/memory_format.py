"""Memory format of filters: convolutions on a CPU are fastest with channels last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["channels_last"]


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Hold filters on a CPU with their channels side by side, and put them back on leaving; values stay the same.

    Networks with 1 × 1 filters over fewer than 16 inputs are left alone: in this layout oneDNN writes past its memory
    when such a convolution has a stride (its issue 6035).
    """
    filters = [p for p in model.parameters() if p.dim() == 4 and p.device.type == "cpu" and p.is_contiguous()]
    if any(p.shape[2:] == (1, 1) and p.shape[1] < 16 for p in filters):
        filters = []
    places = [p.data for p in filters]
    for parameter in filters:
        # Of one channel every layout is "contiguous" already, but strides decide how outputs lie and are pooled.
        parameter.data = torch.empty_like(parameter.data, memory_format=torch.channels_last).copy_(parameter.data)
    try:
        yield
    finally:
        for parameter, place in zip(filters, places, strict=True):
            parameter.data = place.copy_(parameter.data)
