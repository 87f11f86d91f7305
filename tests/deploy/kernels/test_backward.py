from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from sparring import deploy
from sparring.errors import UserError
from sparring.models import Residual

from .test_engine import networks

pytestmark = pytest.mark.usefixtures("new_kernels")


def gradient(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    image = x.clone().requires_grad_()
    return torch.autograd.grad(model(image), image, upstream)[0]


def check(model: nn.Module, shape: tuple[int, ...], batches=(1, 18, 70)) -> None:
    packed = deploy.PackedModule(deploy.pack(model.eval(), shape=shape))
    assert packed.packed.has_gradient
    classes = packed.packed.program.classes
    for n in batches:
        generator = torch.Generator().manual_seed(n)
        x, upstream = torch.rand(n, *shape, generator=generator), torch.randn(n, classes, generator=generator)
        expected = gradient(model.double(), x.double(), upstream.double()).float()
        model.float()
        for _ in range(2):  # the second run finds the memory of the first
            error = (gradient(packed, x, upstream) - expected).abs().flatten(1).amax(1)
        # A maximum of two nearly equal values may be taken from the other one: allow it in few images.
        assert error.median() <= 1e-5 * expected.abs().max()
        assert (error > 1e-5 * expected.abs().max()).sum() <= 1 + n // 10
        check_rows(packed.packed, x, torch.stack([upstream, upstream.flip(1), -upstream]))


def check_rows(packed: deploy.Packed, x: torch.Tensor, rows: torch.Tensor) -> None:
    """Several gradients after one forward pass are to the last bit what they are one by one."""
    together = packed.gradient(x, rows)
    assert together.shape == (len(rows), *x.shape)
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(found, packed.gradient(x, row))


@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5", "resnet-32"])
def test_gradients_are_torchs(sparse_model, name):
    shape = (1, 28, 28) if "lenet" in name else (3, 32, 32)
    check(sparse_model(name, 0.1, width=0.5), shape, batches=(1, 18))


def test_residuals_strides_overlapping_pools_and_padded_views(sparsify):
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        Residual(nn.Conv2d(6, 6, 3, padding=1), nn.Identity()),
        Residual(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(6, 8, 1, stride=2)),
        nn.MaxPool2d(3, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    check(sparsify(model, 0.6, torch.Generator().manual_seed(0)), (2, 13, 13))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(network=networks())
def test_any_geometry_backwards(sparsify, network):
    model, shape, density, seed = network
    model = sparsify(model, max(density, 0.5), torch.Generator().manual_seed(seed))
    packed = deploy.PackedModule(deploy.pack(model, shape=shape))
    x = torch.rand(18, *shape, generator=torch.Generator().manual_seed(seed))
    upstream = torch.ones(18, packed.packed.program.classes)
    expected = gradient(model, x, upstream)
    error = (gradient(packed, x, upstream) - expected).abs().flatten(1).amax(1)
    assert error.median() <= 1e-5 * expected.abs().max().clamp_min(1e-6)
    check_rows(packed.packed, x, torch.stack([upstream, upstream.cumsum(1)]))


@pytest.mark.parametrize("side", [7, 10, 17, 23])
def test_gradients_that_add_up_in_place_are_added_once(sparsify, side):
    """Tiles that overlap would add twice where two branches meet."""
    block = Residual(nn.Conv2d(3, 3, 3, padding=1), nn.Identity())
    model = nn.Sequential(block, nn.ReLU(), nn.Flatten(), nn.Linear(3 * side * side, 4))
    check(sparsify(model, 0.7, torch.Generator().manual_seed(side)), (3, side, side), batches=(9,))


def test_many_vectors_at_once_and_no_gradient_at_all(sparse_model):
    model = sparse_model("lenet-5", 0.1)
    packed = deploy.PackedModule(deploy.pack(model, shape=(1, 28, 28)))
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    jacobians = []
    for module in (model, packed):
        image = x.clone().requires_grad_()
        basis = torch.eye(10)[:, None].expand(10, 3, 10)
        jacobians.append(torch.autograd.grad(module(image), image, basis, is_grads_batched=True)[0])
    torch.testing.assert_close(jacobians[1], jacobians[0], rtol=1e-4, atol=1e-5)
    assert not packed(x).requires_grad
    torch.testing.assert_close(packed.packed.gradient(x, basis), jacobians[0], rtol=1e-4, atol=1e-5)


def test_gradients_of_logits_that_do_not_fit_are_refused(sparse_model):
    packed = deploy.pack(sparse_model("lenet-5", 0.1), shape=(1, 28, 28))
    for shape in ((2, 10), (3, 9), (4, 2, 10), (1, 1, 3, 10)):
        with pytest.raises(UserError, match="do not match the network"):
            packed.gradient(torch.zeros(3, 1, 28, 28), torch.zeros(shape))
    assert packed.gradient(torch.zeros(0, 1, 28, 28), torch.zeros(0, 10)).shape == (0, 1, 28, 28)
    assert packed.gradient(torch.zeros(0, 1, 28, 28), torch.zeros(4, 0, 10)).shape == (4, 0, 1, 28, 28)


def test_without_kernels_torch_computes_the_same(sparse_model):
    model = sparse_model("resnet-32", 0.2, width=0.25)
    packed = deploy.pack(model, shape=(3, 32, 32), values="int8")
    plain = deploy.PackedModule(deploy.Packed(packed.program, native=False))
    x, upstream = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.ones(2, 10)
    assert not plain.packed.native and not plain.packed.has_gradient
    torch.testing.assert_close(
        gradient(plain, x, upstream), gradient(deploy.PackedModule(packed), x, upstream), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(deploy.Equivalent(packed.program)(x), packed(x), rtol=1e-4, atol=1e-5)
