"""Memory format of filters: convolutions on CPUs and CUDA GPUs are fastest with channels last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["channels_last"]


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Hold filters on a CPU or CUDA GPU with their channels side by side, and put them back on leaving, unchanged.

    Networks with 1 × 1 filters over fewer than 16 inputs are left alone: in this layout oneDNN writes past its memory
    when such a convolution has a stride (its issue 6035).
    """
    filters = [p for p in model.parameters() if p.dim() == 4 and p.device.type in ("cpu", "cuda") and p.is_contiguous()]
    if any(p.shape[2:] == (1, 1) and p.shape[1] < 16 for p in filters):
        filters = []
    places = [p.data for p in filters]
    for parameter in filters:
        # With one channel every layout counts as contiguous, but strides determine the layout and pooling of outputs.
        parameter.data = torch.empty_like(parameter.data, memory_format=torch.channels_last).copy_(parameter.data)
    try:
        yield
    finally:
        for parameter, place in zip(filters, places, strict=True):
            parameter.data = place.copy_(parameter.data)
