from __future__ import annotations

import pytest
import torch

from sparring.attacks.algorithms._losses import cross_entropy, cross_entropy_slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_slope_of_the_cross_entropy_is_autograds_to_the_bit(dtype, targeted):
    generator = torch.Generator().manual_seed(0)
    for images, classes, scale in ((1, 2, 1), (3, 3, 0.1), (7, 10, 10), (100, 10, 1), (100, 1000, 100)):
        logits = (torch.randn(images, classes, generator=generator) * scale).to(dtype)
        y, other = torch.randint(classes, (2, images), generator=generator)
        targets = other if targeted else None
        leaf = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(cross_entropy(leaf, y, targets).sum(), leaf)
        assert torch.equal(cross_entropy_slope(logits, y, targets), expected)
