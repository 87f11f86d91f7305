from __future__ import annotations

import pytest
import torch
from torch import nn

from sparring import deploy
from sparring.deploy.folding import compile_model
from sparring.deploy.program import Scale, Sparse
from sparring.deploy.reference import run_reference
from sparring.errors import Unsupported, UserError
from sparring.models import Normalise


def assert_same(model: nn.Module, shape: tuple[int, ...], tolerance: float = 5e-6):
    program = compile_model(model.eval(), shape)
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    expected = model(x).detach()
    got = torch.from_numpy(run_reference(program, x.numpy()))
    assert (got - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-3)
    return program


@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5", "resnet-32", "vgg-like"])
def test_a_program_gives_the_models_logits(sparse_model, name):
    model = sparse_model(name, 0.1, width=0.5)
    shape = (1, 28, 28) if "lenet" in name else (3, 32, 32)
    program = assert_same(model, shape)
    padded_first = name in ("resnet-32", "vgg-like")
    assert sum(isinstance(step.op, Scale) for step in program.steps) == int(padded_first)


def test_units_that_nothing_reads_and_constant_units_disappear():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight[0] = 0  # constant: its value moves into the next bias
        model[1].bias[0] = 2.0
        model[3].weight[:, 1] = 0  # unread
    program = assert_same(model, (1, 2, 3))
    first = program.steps[1].op
    assert isinstance(first, Sparse) and first.shape[0] == 3


def test_a_constant_channel_in_front_of_padding_stays_and_its_logits_too():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 2, 3, padding=1),
        nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 1.5
    program = assert_same(model, (1, 7, 7))
    assert program.steps[0].op.shape[0] == 3


def test_channels_disappear_through_pooling_and_flattening():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[0].bias[1:3] = torch.tensor([0.7, -1.0])
    program = assert_same(model, (2, 6, 6))
    assert program.steps[0].op.shape == (2, 2, 3, 3)


def test_a_network_without_any_weight_keeps_its_constant_logits():
    model = nn.Sequential(Normalise((0.1,), (0.3,)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[4].weight.zero_()
    program = assert_same(model, (1, 4, 4))
    assert program.nonzeros == 0


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_strides_paddings_and_dilations(groups, sparsify):
    model = nn.Sequential(
        nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=groups),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.Flatten(),
        nn.BatchNorm1d(4 * 5 * 11),
        nn.Linear(4 * 5 * 11, 7),
        nn.BatchNorm1d(7),
    )
    assert_same(sparsify(model, 0.5, torch.Generator().manual_seed(groups)), (4, 9, 9))


def test_a_linear_layer_over_images_is_refused():
    with pytest.raises((Unsupported, UserError), match="flatten"):
        compile_model(nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(16, 2)), (1, 4, 4))


class Rule(nn.Module):
    """An activation-sparsity module, as the contract between parts describes it."""

    straight_through = False

    def __init__(self, kind: str, number: float) -> None:
        super().__init__()
        self.kind, self.threshold, self.sparsity = kind, number, number

    def forward(self, x):
        if self.kind == "shifted-relu":
            return (x - self.threshold).clamp_min(0)
        if self.kind in ("threshold", "percentile"):
            return x * (x > self.threshold)
        flat = x.flatten(1)
        kept = flat.topk(flat.shape[1] - round(self.sparsity * flat.shape[1]), dim=1).indices
        return (flat.clamp_min(0) * torch.zeros_like(flat).scatter_(1, kept, 1.0)).view_as(x)


@pytest.mark.parametrize("kind", ["shifted-relu", "threshold", "percentile", "top-k"])
def test_activation_sparsity_is_packed_run_and_differentiated(tmp_path, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), Rule(kind, 0.2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)).eval()
    assert_same(model, (1, 8, 8))
    packed = deploy.load(deploy.export(model, tmp_path / "a.sparring", shape=(1, 8, 8)))
    assert packed.native == (kind == "shifted-relu")
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(packed(x), model(x).detach(), rtol=1e-5, atol=1e-6)
    gradients = []
    for network in (model, deploy.PackedModule(packed)):
        image = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(network(image).sum(), image)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_activation_sparsity_without_a_packed_form_is_refused_by_name():
    model = nn.Sequential(nn.Flatten(), Rule("stochastic-pruning", 0.2), nn.Linear(4, 2))
    with pytest.raises(Unsupported, match="Rule"):
        compile_model(model, (1, 2, 2))
