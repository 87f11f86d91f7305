"""Every refusal names the operation, a line of the user's code, the reason and a way out."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.errors import Unsupported
from sparring.graph import lower

SHAPE = (2, 4, 4)


class Own(nn.Module):
    """A network whose forward() is given: a function of the module, its images and their features."""

    def __init__(self, step: Callable[[Own, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.step = nn.Linear(32, 3), step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x, x.flatten(1))


def cast(m: Own, x: Tensor, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.layer(h)


REFUSED: dict[str, tuple[Callable[[Own, Tensor, Tensor], Tensor], str]] = {
    "autocast": (cast, "_to_copy"),
    "rounding": (lambda m, x, h: m.layer(h.round()), "round"),
    "mean over images": (lambda m, x, h: m.layer(h - h.mean(0)), "mean"),
    "weights of images": (lambda m, x, h: h @ h.T @ m.layer(h), "matmul"),
    "complex numbers": (lambda m, x, h: m.layer(torch.fft.rfft(h, 62).abs()), "_fft_r2c"),
    "rounded quotient": (lambda m, x, h: m.layer(torch.div(h, 3, rounding_mode="floor")), "div"),
    "dropout left on": (lambda m, x, h: m.layer(F.dropout(h)), ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_where_why_and_what_to_do(name: str) -> None:
    step, operation = REFUSED[name]
    with pytest.raises(Unsupported) as refused:
        lower(Own(step).eval(), SHAPE)
    found = re.match(r"operation '(\w+)' \((.*)\) \S.*; \S.*", str(refused.value))
    assert found is not None, str(refused.value)
    assert operation in found[1] and "test_refusals.py:" in found[2]
