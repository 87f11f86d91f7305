from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparring import attacks
from sparring.bounds import BOUNDS, certified_accuracy, margin, radius
from sparring.bounds._network import prepare
from sparring.bounds._region import region
from sparring.bounds.certify._crown import bound_nodes, lower_bound
from sparring.bounds.certify._relaxations import Interval
from sparring.errors import UnknownNameError, Unsupported, UserError
from sparring.threat import LINF, Threat, distance

from ..random_networks import network


def two_class(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = torch.rand(20, 3, 2, 2) * 0.2 + 0.4  # far from the box, so that the closed form needs no clipping
    return model, x, model(x).argmax(1)


class Cancelling(nn.Module):
    """Add a number and take it off again, which float32 rounds."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number, self.weight = number, nn.Parameter(torch.full((2, 2), 0.5))
        self.scale = nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((F.linear(x.flatten(1), self.weight) - 0.5) * self.scale + self.number) - self.number


def test_radii_hold_for_a_model_that_float32_rounds() -> None:
    model, shape = Cancelling(100.0), (1, 1, 2)
    middle = torch.linspace(0.4999, 0.5001, 401)
    x = middle.view(-1, 1, 1, 1).expand(-1, *shape).contiguous()
    y = model(x).argmax(1)
    found = radius(model, x, y, math.inf, method="interval")
    assert (found > 0).any()
    towards = torch.where(y == 0, -1.0, 1.0).view(-1, 1, 1, 1) * 0.999 * found.float().view(-1, 1, 1, 1)
    assert torch.equal(model(x + towards).argmax(1)[found > 0], y[found > 0])
    assert prepare(model, shape).rounding > 0
    assert prepare(Cancelling(0.0), shape).rounding == 0


@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("norm", [math.inf, 2.0, 1.0])
def test_a_linear_model_is_bounded_exactly(method: str, norm: float) -> None:
    model, x, y = two_class()
    weight, bias = model.get_parameter("1.weight").double(), model.get_parameter("1.bias").double()
    signed = (1 - 2 * y.double()) * ((weight[0] - weight[1]) @ x.double().flatten(1).T + bias[0] - bias[1])
    slope = torch.linalg.vector_norm(weight[0] - weight[1], ord={math.inf: 1, 2.0: 2, 1.0: math.inf}[norm])
    found = margin(model, x, y, Threat(norm, 0.05), method=method).squeeze(1)
    if method != "interval" or norm == math.inf:  # intervals replace the other balls by their box
        torch.testing.assert_close(found, (signed - 0.05 * slope).detach(), atol=1e-6, rtol=0)
        distances = (signed / slope).detach()
        near = distances < 0.35
        assert near.any()
        assert ((radius(model, x, y, norm, method=method) / distances - 1)[near].abs() < 1.1e-3).all()


@pytest.mark.parametrize("norm", [math.inf, 2.0])
def test_both_ends_of_every_unit_are_lower_bounds_of_it_and_of_minus_it(norm: float) -> None:
    for seed in range(14):  # every kind of network twice
        model, shape = network(seed)
        graph = prepare(model, shape)
        reach = region(torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)), norm, 0.2)
        with torch.no_grad():
            bounds, relaxed = bound_nodes(graph, reach, backward=True)
            simple, _ = bound_nodes(graph, reach, backward=False)
            for index in {node.inputs[0] for i, node in enumerate(graph.nodes) if i in relaxed}:
                units = math.prod(graph.nodes[index].shape)
                rows = (
                    torch.eye(units, dtype=torch.float64)
                    .view(1, units, *graph.nodes[index].shape)
                    .repeat(2, *[1] * (1 + len(graph.nodes[index].shape)))
                )
                lower, upper = (sign * lower_bound(graph, index, sign * rows, reach, relaxed) for sign in (1, -1))
                known, found = (Interval(*(end.flatten(1) for end in b[index])) for b in (simple, bounds))
                refined = (known.lower < 0) & (known.upper > 0)
                torch.testing.assert_close(found.lower[refined], torch.maximum(lower, known.lower)[refined])
                torch.testing.assert_close(found.upper[refined], torch.minimum(upper, known.upper)[refined])


def test_the_ball_and_the_box_are_used_together() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model.get_parameter("1.weight").copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        model.get_parameter("1.bias").zero_()
    x = torch.tensor([[[[0.5, 0.9]]]])  # the second pixel can only rise by 0.1, the first by sqrt(0.5² − 0.1²)
    found = margin(model, x, torch.tensor([0]), Threat(2.0, 0.5), method="crown")
    expected = -(1.5 + 3.6 + 0.4 + 3 * math.sqrt(0.24))
    assert found.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(7))
def test_tighter_methods_are_tighter(seed: int) -> None:
    model, shape = network(seed)
    x = torch.rand(16, *shape, generator=torch.Generator().manual_seed(seed))
    y = model(x).argmax(1)
    threat = Threat(math.inf, 0.05)
    crown, alpha = (margin(model, x, y, threat, method=m) for m in ("crown", "alpha-crown"))
    assert (alpha >= crown - 1e-9).all()
    assert (margin(model, x, y, threat, method="crown-interval") <= crown + 1e-6).double().mean() > 0.8


def test_at_eps_zero_the_margin_is_the_models_own() -> None:
    model, shape = network(3)
    x = torch.rand(5, *shape)
    logits = model(x).double()
    y = logits.argmax(1)
    ordered = margin(model, x, y, Threat(2.0, 0.0), method="crown").amin(1)
    top = logits.topk(2).values
    torch.testing.assert_close(ordered, (top[:, 0] - top[:, 1]).detach(), atol=1e-5, rtol=0)


def test_no_point_within_the_radius_changes_the_label() -> None:
    model, shape = network(0)
    x = torch.rand(6, *shape)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % model(x).shape[1]
    safe = radius(model, x, y, math.inf)
    assert safe[0] == 0 and (safe[1:] > 0).all()
    for _ in range(50):
        delta = (torch.rand_like(x) * 2 - 1).sign() * safe.view(-1, 1, 1, 1).float() * 0.9999
        near = (x + delta).clamp(0, 1)
        assert (distance(near - x, math.inf) <= safe + 1e-6).all()
        assert (model(near).argmax(1) == y)[1:].all()


def test_certified_accuracy_counts_images() -> None:
    model, x, y = two_class()
    y[:5] = 1 - y[:5]
    assert certified_accuracy(model, x, y, Threat(math.inf, 0.0)) == pytest.approx(0.75)
    assert certified_accuracy(model, x, y, Threat(math.inf, 1.0)) == 0


def test_the_models_mode_and_weights_stay() -> None:
    model, x, y = two_class()
    model.train()
    margin(model, x, y, Threat(2.0, 0.1))
    assert model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_refusals_name_cause_and_way_out() -> None:
    model, x, y = two_class()
    with pytest.raises(UserError, match="eps"):
        margin(model, x, y, Threat(2.0))
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        margin(model, x * 255, y, Threat(2.0, 0.1))
    with pytest.raises(UnknownNameError, match="crown"):
        margin(model, x, y, Threat(2.0, 0.1), method="crwn")
    with pytest.raises(Unsupported, match=r"'mish' .*no rule for bounds"):
        margin(nn.Sequential(nn.Flatten(), nn.Mish(), nn.Linear(12, 2)), x, y, Threat(2.0, 0.1))
    with pytest.raises(Unsupported, match=r"'layer_norm' .*divides by a value that depends"):
        margin(nn.Sequential(nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 2)), x, y, Threat(2.0, 0.1))


def test_an_empty_batch_gives_empty_bounds() -> None:
    model, x, y = two_class()
    assert margin(model, x[:0], y[:0], Threat(2.0, 0.1)).shape == (0, 1)
    assert radius(model, x[:0], y[:0], 2.0).shape == (0,)


class Odd(nn.Module):
    """Pool images without a channel, and add to each what is one number an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        pooled = F.max_pool2d(h[:, 0], 2) + F.avg_pool2d(h[:, 1], 2)
        return self.head(pooled.flatten(1) + h.flatten(1).sum(1).reshape(-1, 1))


@pytest.mark.parametrize("method", ["interval", "crown-interval", "crown", "alpha-crown"])
def test_nodes_without_channels_or_axes_are_bounded(method: str) -> None:
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.rand(3, 1, 4, 4)
    y = model(x).argmax(1)
    proved = radius(model, x, y, LINF, method=method)
    reached = attacks.run(model, x, y, attacks.ATTACKS["nearest"], Threat(LINF)).distance
    assert ((proved > 0) & (proved <= reached * (1 + 1e-6))).all()


def test_a_radius_is_found_where_intervals_of_the_image_itself_are_wide() -> None:
    torch.manual_seed(0)
    linear = [nn.Linear(64 if at else 32, 64) for at in range(24)]
    for layer in linear:
        nn.init.orthogonal_(layer.weight, gain=2.0)
    layers = [one for layer in linear for one in (layer, nn.SiLU())]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 3)).double().eval()
    x = torch.rand(2, 2, 4, 4)
    y = model(x.double()).argmax(1)
    assert (margin(model, x, y, Threat(LINF, 0.0), method="interval").amin(1) <= 0).all()
    assert (radius(model, x, y, LINF, method="crown", tolerance=0.3) > 0).all()
    assert (radius(model, x, (y + 1) % 3, LINF, method="crown", tolerance=0.3) == 0).all()


class Written(nn.Module):
    """Write parts of the images into a copy of them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        y[:, :, 1:3, ::2] = x[:, :, :2, ::2] - 1
        y[:, 0, 3] = 0.5 * x[:, 0, 0]
        return self.head(y.flatten(1))


def test_parts_written_into_a_value_are_bounded_exactly() -> None:
    torch.manual_seed(0)
    model, x, eps = Written(), 0.4 + 0.2 * torch.rand(1, 1, 4, 4), 0.1
    y = model(x).argmax(1)
    found = margin(model, x, y, Threat(LINF, eps), method="crown")
    logits = model(x)[0].detach()
    slopes = torch.autograd.functional.jacobian(lambda v: model(v)[0], x).flatten(1)
    rest = [k for k in range(3) if k != int(y)]
    exact = [logits[y] - logits[k] - eps * (slopes[y] - slopes[k]).abs().sum() for k in rest]
    assert found[0].tolist() == pytest.approx([float(value) for value in exact], abs=1e-5)
