"""No bound may ever be wrong: networks in few dimensions, hostile points, and planted bugs that must be caught."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import pytest
import torch
from torch import nn

from sparring.bounds import BOUNDS
from sparring.bounds._curves import between
from sparring.bounds._network import adjoint, margin_rows, prepare
from sparring.bounds._region import region
from sparring.bounds.certify import _crown as crown
from sparring.bounds.certify import _relaxations as relaxations
from sparring.bounds.certify._relaxations import propagate, relax
from sparring.graph import Graph

from ..random_networks import double, hostile_points, network, smooth_network

Build = Callable[[int], tuple[nn.Module, tuple[int, ...]]]
NORMS = (math.inf, 2.0, 1.0)
METHODS = ("interval", "crown-interval", "crown")


def violations(seeds: Iterable[int], methods: tuple[str, ...], build: Build = network) -> Iterator[tuple[int, float]]:
    """Yield every network and norm at which a margin or a node's bound is beaten by a hostile point."""
    for seed in seeds:
        for norm in NORMS[: 2 + (seed % 10 == 0)]:
            if _violated(seed, norm, methods, build):
                yield seed, norm


@cache
def _lowered(build: Build, seed: int) -> tuple[nn.Module, tuple[int, ...], Graph]:
    model, shape = build(seed)
    return model, shape, prepare(model, shape, certified=True)


def _violated(seed: int, norm: float, methods: tuple[str, ...], build: Build) -> bool:
    model, shape, graph = _lowered(build, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, x.round(), x)  # pixels on the box, as in MNIST
    eps = float(0.02 * 30 ** torch.rand((), generator=generator)) * (1 if norm == math.inf else 2)
    exact = double(model)
    y = exact(x).argmax(1)
    points = hostile_points(model, x, int(y), norm, eps, points=200, generator=generator)
    assert len(points) >= 1000
    values = [point.flatten(1) for point in _node_values(graph, points)]
    gaps = (margin_rows(graph, y)[0] @ values[-1].T).amin(1)
    reach = region(x, norm, eps)
    assert torch.allclose(values[-1][:20], exact(points[:20]), atol=1e-9)
    with torch.no_grad():
        margins = [BOUNDS[method](graph, reach, margin_rows(graph, y))[0] for method in methods]
        kinds = ((False, False), (True, False), (True, True))
        nodes = [crown.bound_nodes(graph, reach, backward=back, roughly=rough)[0] for back, rough in kinds]
    beaten = any(bool((margin > gaps + 1e-9).any()) for margin in margins)
    return beaten or any(_outside(v, b) for bounds in nodes for v, b in zip(values, bounds, strict=True))


def _outside(value: torch.Tensor, bound: relaxations.Interval) -> bool:
    lower, upper = bound.lower.flatten(1) - 1e-9, bound.upper.flatten(1) + 1e-9
    return bool(((value < lower) | (value > upper)).any())


def _node_values(graph, points: torch.Tensor) -> list[torch.Tensor]:
    return graph.values(points)


@pytest.mark.parametrize(
    "seeds", [range(63), pytest.param(range(63, 203), marks=pytest.mark.nightly)], ids=["a few", "the others"]
)
def test_no_bound_is_beaten_on_two_hundred_networks(seeds: range) -> None:
    assert not list(violations(seeds, METHODS))


def test_alpha_optimised_bounds_are_not_beaten() -> None:
    assert not list(violations(range(300, 321), ("alpha-crown",)))


@pytest.mark.parametrize("seeds", [range(0, 6, 2), pytest.param(range(1, 6, 2), marks=pytest.mark.nightly)], ids=str)
def test_no_bound_of_smooth_networks_is_beaten(seeds: range) -> None:
    assert not list(violations(seeds, (*METHODS, "alpha-crown"), smooth_network))


def _product_without_its_width(op, *inputs):
    lines = relax(op, *inputs)
    return dataclasses.replace(lines, half=0 * lines.half) if isinstance(lines, relaxations.ProductLines) else lines


def _low_lines_lifted(op, lower, upper):
    low_slope, low_shift, high_slope, high_shift = between(op, lower, upper)
    return low_slope, low_shift + 0.02 * (upper - lower), high_slope, high_shift


SMOOTH_BUGS = {
    "a product's width is forgotten": (crown, "relax", _product_without_its_width),
    "the lower lines of curves are lifted": (relaxations, "between", _low_lines_lifted),
}


@pytest.mark.parametrize("bug", SMOOTH_BUGS)
def test_planted_bugs_of_smooth_networks_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, broken = SMOOTH_BUGS[bug]
    monkeypatch.setattr(module, name, broken)
    assert any(violations(range(6), METHODS, smooth_network))


def _relu_chord_through_the_origin(bounds):
    lines = _relu(bounds)
    return lines._replace(high_shift=torch.zeros_like(lines.high_shift))


def _relu_lower_slope_too_steep(bounds):
    lines = _relu(bounds)
    return lines._replace(low_shift=torch.where(lines.free, 0.1 * bounds.upper, 0))


def _pool_of_the_largest_upper_bound(op, bounds):
    swapped = relaxations.Interval(bounds.lower, (bounds.lower + bounds.upper) / 2)
    return _max_pool(op, swapped)


_relu, _max_pool = relaxations._relu, relaxations._max_pool
_squared = relaxations._squared


def _no_bias(op, shape):
    return None


def _shifted_convolution(op, a, shape):
    pulled = adjoint(op, a, shape)
    return pulled.roll(1, -1) if isinstance(op, relaxations.MaxPool | relaxations.Conv2d) else pulled


def _forgotten_scale(op):
    return op if isinstance(op, relaxations.Affine | relaxations.Flatten) else _squared(op)


def _first_input_only(op, *inputs):
    return inputs[0] if isinstance(op, relaxations.Add) else propagate(op, *inputs)


BUGS = {
    "the ReLU chord loses its shift": (relaxations, "_relu", _relu_chord_through_the_origin),
    "the lower ReLU line is lifted": (relaxations, "_relu", _relu_lower_slope_too_steep),
    "max pooling over half the interval": (relaxations, "_max_pool", _pool_of_the_largest_upper_bound),
    "biases are dropped": (crown, "offset", _no_bias),
    "a convolution's adjoint is off by one": (crown, "adjoint", _shifted_convolution),
    "the normalisation's scale is forgotten": (relaxations, "_squared", _forgotten_scale),
    "a residual branch is dropped": (crown, "propagate", _first_input_only),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, broken = BUGS[bug]
    monkeypatch.setattr(module, name, broken)
    assert any(violations(range(63), METHODS))
