from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparring import deploy
from sparring.attacks.evaluation._bpda import dense_copy, has_masked_gradients, straight_through
from sparring.declared import Declared
from sparring.deploy._compile import compile_model
from sparring.deploy._program import Scale, Sparse
from sparring.deploy._reference import run_reference
from sparring.errors import Unsupported
from sparring.models import Normalise
from sparring.sparsity import MeanSparse, Percentile, ShiftedReLU, Threshold, TopK


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


def test_a_linear_layer_over_the_last_axis_is_a_sparse_one():
    program = assert_same(nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(16, 2)), (1, 4, 4))
    assert [step.op.rows for step in program.steps if isinstance(step.op, Sparse)] == [True, False]


def drawn(alpha: float) -> MeanSparse:
    module = MeanSparse(alpha)
    generator = torch.Generator().manual_seed(0)
    module.mean, module.radius = torch.randn(4, generator=generator) / 4, torch.rand(4, generator=generator) / 4
    return module


def percentile(sparsity: float) -> Percentile:
    module = Percentile(sparsity)
    module.threshold.fill_(0.15)
    return module


RULES = {"shifted-relu": ShiftedReLU, "threshold": Threshold, "percentile": percentile, "top-k": TopK}


@pytest.mark.parametrize("kind", [*RULES, "mean-sparse"])
@pytest.mark.parametrize("padding", [0, 1])
def test_activation_sparsity_is_packed_run_differentiated_and_exported(tmp_path, kind, padding):
    torch.manual_seed(0)
    rule = {**RULES, "mean-sparse": drawn}[kind](0.2)
    layers = [nn.Conv2d(1, 4, 3), rule, nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=padding), copy.deepcopy(rule)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * (3 + 2 * padding) ** 2, 3)).eval()
    assert_same(model, (1, 12, 12))
    packed = deploy.load(deploy.export(model, tmp_path / "a.sparring", shape=(1, 12, 12)))
    assert packed.native
    for n in (1, 3, 37):
        x = torch.rand(n, 1, 12, 12, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(packed(x), model(x).detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(run_reference(packed.program, x.numpy())), packed(x))
    gradients = []
    for network in (model, deploy.PackedModule(packed)):
        image = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(network(image).sum(), image)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert packed.has_gradient == (kind != "mean-sparse")
    if packed.has_gradient:
        torch.testing.assert_close(packed.gradient(x, torch.ones(n, 3)), gradients[0], rtol=1e-4, atol=1e-6)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(deploy.to_onnx(model, tmp_path / "a.onnx", shape=(1, 12, 12)))
    got = session.run(None, {"images": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 20])
def test_of_equal_values_the_first_stay(n):
    model = nn.Sequential(nn.Flatten(), TopK(0.5), nn.Linear(37, 37)).eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(37))
        model[2].bias.zero_()
    x = torch.randint(0, 4, (n, 1, 1, 37), generator=torch.Generator().manual_seed(n)) / 4.0
    order = torch.sort(x.flatten(1), dim=1, descending=True, stable=True).indices[:, :19]
    expected = torch.zeros(n, 37).scatter_(1, order, x.flatten(1).gather(1, order))
    assert (deploy.pack(model, shape=(1, 1, 37))(x) == expected).all()


def test_an_attack_sees_through_packed_activation_sparsity():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(16, 30), Threshold(0.3), nn.Linear(30, 3)]
    model = nn.Sequential(*layers).eval()
    packed = deploy.PackedModule(deploy.pack(model, shape=(1, 4, 4)))
    x = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert has_masked_gradients(packed)
    with straight_through(packed, x[:1]), straight_through(model, x[:1]):
        expected, found = (torch.autograd.grad(net(x).sum(), x)[0] for net in (model, packed))
    assert (expected != torch.autograd.grad(model(x).sum(), x)[0]).any()
    torch.testing.assert_close(found, expected)
    dense = dense_copy(packed)
    assert dense is not None
    torch.testing.assert_close(dense(x), nn.Sequential(layers[0], layers[1], nn.ReLU(), layers[3])(x))


class Rule(Declared):
    """An activation-sparsity module, as the contract between parts describes it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return x


def test_activation_sparsity_without_a_packed_form_is_refused_by_name():
    model = nn.Sequential(nn.Flatten(), Rule("stochastic-pruning"), nn.Linear(4, 2))
    with pytest.raises(Unsupported, match="Rule"):
        compile_model(model, (1, 2, 2))
