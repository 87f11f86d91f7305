from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from scipy import optimize
from torch import nn

from sparring.bounds import (
    LinearMap,
    linear_distance,
    linear_distances,
    linear_fooled,
    linear_path,
    linear_pruned,
    linear_r_2,
    linear_r_inf,
    margin,
    theorem,
    weights_of,
)
from sparring.bounds.exact_distances._exact import exact
from sparring.errors import Unsupported, UserError
from sparring.models import Normalise
from sparring.threat import L0, L1, Threat, dual


def linear_model(classes: int, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(Normalise((0.3,), (0.5,)), nn.Flatten(), nn.Linear(9, classes))
    x = torch.rand(40, 1, 3, 3)
    x = torch.where(torch.rand(x.shape) < 0.3, x.round(), x)
    y = model(x).argmax(1)
    y[:4] = (y[:4] + 1) % classes
    return model, x, y


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("norm", [math.inf, 2.0, 1.0])
def test_unboxed_distances_are_margin_over_dual_norm(classes: int, norm: float) -> None:
    model, x, y = linear_model(classes)
    weight, bias = weights_of(model, (1, 3, 3))
    torch.testing.assert_close(x.double().flatten(1) @ weight.T + bias, model(x).double(), atol=1e-5, rtol=0)
    expected = []
    for image, label in zip(x.double().flatten(1), y, strict=True):
        values = weight @ image + bias
        ways = [
            (values[label] - values[k]) / torch.linalg.vector_norm(weight[label] - weight[k], ord=dual(norm))
            for k in range(classes)
            if k != label
        ]
        expected.append(max(0.0, float(min(ways))))
    found = linear_distance(model, x, y, norm, boxed=False)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert (found[:4] == 0).all()


def test_a_model_read_once_gives_to_the_bit_what_the_model_gives() -> None:
    for classes in (2, 4):
        model, x, y = linear_model(classes)
        linear = weights_of(model, (1, 3, 3))
        for boxed in (True, False):
            assert torch.equal(
                linear_distance(linear, x, y, 2.0, boxed=boxed), linear_distance(model, x, y, 2.0, boxed=boxed)
            )
            assert linear_r_2(linear, x, y, boxed=boxed) == linear_r_2(model, x, y, boxed=boxed)
            assert linear_r_inf(linear, x, y, 0.1, boxed=boxed) == linear_r_inf(model, x, y, 0.1, boxed=boxed)
    model, x, y = linear_model(2)
    assert theorem(weights_of(model, (1, 3, 3)), x, y, 0.1) == theorem(model, x, y, 0.1)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("norm", [math.inf, 2.0])
def test_at_the_boxed_distance_the_worst_margin_vanishes(classes: int, norm: float) -> None:
    model, x, y = linear_model(classes)
    distances = linear_distance(model, x, y, norm)
    assert (distances >= linear_distance(model, x, y, norm, boxed=False) - 1e-12).all()
    assert (distances > 0).any() and distances.isfinite().any()
    for i in ((distances > 0) & distances.isfinite()).nonzero().flatten():
        worst = margin(model, x[i : i + 1], y[i : i + 1], Threat(norm, float(distances[i])), method="crown")
        assert abs(float(worst.min())) < 1e-6


def by_bisection(w: torch.Tensor, x: torch.Tensor, margin: float) -> float:
    """Return the length of the shortest step inside the box that takes w·x down by margin, from its multiplier.

    The Karush-Kuhn-Tucker conditions leave clamp(x - t·w, 0, 1), whose loss of margin grows with t.
    """

    def lost(t: float) -> float:
        return float(w @ (x - (x - t * w).clamp(0, 1)))

    if lost(1e12) < margin:
        return math.inf
    low, high = 0.0, 1.0
    while lost(high) < margin:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if lost(middle) >= margin else (middle, high)
    return float((x - (x - high * w).clamp(0, 1)).norm())


def by_quadratic_program(w: torch.Tensor, x: torch.Tensor, margin: float) -> float:
    bounds = [(-float(v), 1 - float(v)) for v in x]
    reach = {"type": "ineq", "fun": lambda d: -float(w.numpy() @ d) - margin, "jac": lambda d: -w.numpy()}
    found = optimize.minimize(
        lambda d: d @ d, 0.01 * -w.numpy(), jac=lambda d: 2 * d, bounds=bounds, constraints=reach, method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    return math.sqrt(found.fun) if found.success else math.inf


@pytest.mark.parametrize("pixels", [6, 60])
def test_boxed_l_2_distances_of_ten_classes_equal_those_of_other_solvers(pixels: int) -> None:
    compared = 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(10, pixels, generator=generator).double() * (0.1 + seed)
        weight[:, torch.rand(pixels, generator=generator) < 0.2] = 0
        x = torch.rand(8, 1, 1, pixels, generator=generator)
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.4, x.round(), x)
        bias = torch.randn(10, generator=generator).double() * 0.1
        logits = x.double().flatten(1) @ weight.T + bias
        y = logits.argmax(1)
        distances = linear_distance(LinearMap(weight, bias), x, y, 2.0)
        for image, label, values, found in zip(x.double().flatten(1), y, logits, distances, strict=True):
            ways = [(weight[label] - weight[k], float(values[label] - values[k])) for k in range(10) if k != label]
            expected = min(by_bisection(w, image, margin) for w, margin in ways)
            assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)
            if pixels < 10:
                program = min(by_quadratic_program(w, image, margin) for w, margin in ways)
                assert float(found) <= program * (1 + 1e-9)
                compared += math.isclose(float(found), program, rel_tol=1e-5)
    assert pixels >= 10 or compared >= 40


def fewest(w: torch.Tensor, room: torch.Tensor, margin: float) -> float:
    """Return how many pixels must move, over all sets of pixels."""
    gains = (w.abs() * room).tolist()
    sets = (chosen for size in range(len(gains) + 1) for chosen in combinations(gains, size))
    return next((float(len(chosen)) for chosen in sets if sum(chosen) >= margin), math.inf)


def by_linear_program(w: torch.Tensor, room: torch.Tensor, margin: float) -> float:
    """Return the least total movement within each pixel's room."""
    limits = [(0.0, float(limit)) for limit in room]
    found = optimize.linprog([1.0] * len(w), A_ub=[(-w.abs()).tolist()], b_ub=[-margin], bounds=limits)
    return float(found.fun) if found.success else math.inf


@pytest.mark.parametrize(("classes", "more"), [(2, 1.3), (2, 1.4), (4, 1.3)])
def test_boxed_l_1_and_l_0_distances_equal_those_of_a_linear_program_and_of_a_search(classes: int, more: float) -> None:
    model, x, _ = linear_model(classes)
    weight, bias = weights_of(model, (1, 3, 3))
    bias[0] += more  # so that a margin takes many pixels, or more than there are
    y = (x.double().flatten(1) @ weight.T + bias).argmax(1)
    y[:4] = (y[:4] + 1) % classes
    found = linear_distances(LinearMap(weight, bias), x, y, [(L1, True), (L0, True), (L0, False)])
    for image, label, l1, l0, free in zip(x.double().flatten(1), y, *found, strict=True):
        ways = []
        for w, offset in ((weight[label] - weight[k], bias[label] - bias[k]) for k in range(classes) if k != label):
            room = torch.where(w > 0, image, 1 - image)
            margin = max(0.0, float(w @ image + offset))
            ways.append((by_linear_program(w, room, margin), fewest(w, room, margin)))
        assert float(l1) == pytest.approx(min(way[0] for way in ways), abs=1e-9)
        assert float(l0) == min(way[1] for way in ways)
        assert float(free) == min(1.0, float(l0))
    assert found[1].isinf().any() if more == 1.4 else len(found[1].unique()) > 3


def test_what_is_fooled_is_told_in_double_precision() -> None:
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    weight = torch.full((2, 4), 1e4)
    for short in (1e-6, -1e-6):  # float32 knows no difference between these logits
        linear = LinearMap(weight.double(), torch.tensor([0.0, -short], dtype=torch.float64))
        assert bool(linear_fooled(linear, x, y)) == (short < 0)


def test_the_boxed_l_inf_distance_equals_the_exact_solver() -> None:
    model, x, y = linear_model(3)
    found = exact(model, x[:6], y[:6], math.inf)
    expected = linear_distance(model, x[:6], y[:6], math.inf)
    near = expected.isfinite()
    assert (found.lower <= expected + 1e-6).all()
    assert ((found.upper - expected).abs()[near] < 1e-3).all()


@pytest.mark.parametrize("boxed", [True, False])
def test_r_inf_counts_distances_beyond_eps_and_r_2_is_their_mean(boxed: bool) -> None:
    model, x, y = linear_model(3)
    distances = linear_distance(model, x, y, math.inf, boxed=boxed)
    for eps in (0.0, 0.05, 0.2):
        assert linear_r_inf(model, x, y, eps, boxed=boxed) == pytest.approx(float((distances > eps).double().mean()))
    assert linear_r_2(model, x, y, boxed=False) == pytest.approx(
        float(linear_distance(model, x, y, 2.0, boxed=False).mean())
    )


def test_two_class_fgsm_is_the_worst_case() -> None:
    model, x, y = linear_model(2)
    weight, _ = weights_of(model, (1, 3, 3))
    w = (weight[1] - weight[0]).view(1, 1, 3, 3).float()
    attacked = (x - 0.1 * (2 * y - 1).view(-1, 1, 1, 1) * w.sign()).clamp(0, 1)
    assert linear_r_inf(model, x, y, 0.1) == pytest.approx(float((model(attacked).argmax(1) == y).double().mean()))


@pytest.mark.parametrize("seed", range(5))
def test_the_theorem_holds(seed: int) -> None:
    model, x, y = linear_model(2, seed)
    for eps in (0.01, 0.1):
        found = theorem(model, x, y, eps)
        assert found.by_means == pytest.approx(found.numerator, abs=1e-9)
        assert found.r_2 == pytest.approx(found.numerator / found.l2, abs=1e-9)
        assert found.r_inf <= found.markov + 1e-12
        assert found.l1 / found.l2 <= math.sqrt(found.nonzero) + 1e-9


def test_the_balanced_form_needs_its_assumptions() -> None:
    model, x, _ = linear_model(2)
    x = torch.cat([x, x])
    y = model(x).argmax(1)
    counts = torch.bincount(y, minlength=2)
    keep = torch.cat([(y == label).nonzero().flatten()[: int(counts.min())] for label in (0, 1)])
    balanced = theorem(model, x[keep], y[keep], 0.1)  # balanced classes, accuracy 1 in each
    assert balanced.balanced == pytest.approx(balanced.numerator, abs=1e-9)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("loss", ["logistic", "svm"])
@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_paths_of_scikit_learn_become_models(classes: int, loss: str, penalty: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60 * classes, 1, 4, 4, generator=generator)
    y = torch.arange(len(x)) % classes
    x[:, 0, 0] = (x[:, 0, 0] + 0.7 * torch.nn.functional.one_hot(y, 4)).clamp(0, 1)
    models = linear_path(x, y, (0.02, 1.0), loss=loss, penalty=penalty)
    nonzero = [int((weights_of(m, (1, 4, 4))[0] != 0).sum()) for m in models]
    accuracy = [float((m(x).argmax(1) == y).double().mean()) for m in models]
    assert all(m(x).shape == (len(x), classes) for m in models)
    assert accuracy[1] > 0.7
    if penalty == "l1":
        assert nonzero[0] < nonzero[1]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("loss", ["logistic", "svm"])
def test_magnitude_pruning_keeps_the_largest_weights_and_fits_them_again(classes: int, loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60 * classes, 1, 4, 4, generator=generator)
    y = torch.arange(len(x)) % classes
    x[:, 0, 0] = (x[:, 0, 0] + 0.7 * torch.nn.functional.one_hot(y, 4)).clamp(0, 1)
    (dense,) = linear_path(x, y, (1.0,), loss=loss)
    none, half = linear_pruned(x, y, (0.0, 0.5), dense=dense, loss=loss)
    torch.testing.assert_close(none[1].weight, dense[1].weight)
    kept = half.get_parameter("1.weight") != 0
    assert (kept.sum(1) == 8).all()
    for row, mask in zip(dense.get_parameter("1.weight").abs(), kept, strict=True):
        assert row[mask].min() >= row[~mask].max()
    assert not torch.equal(half.get_parameter("1.weight"), dense.get_parameter("1.weight") * kept)
    with pytest.raises(UserError, match="fraction removed"):
        linear_pruned(x, y, (1.0,), dense=dense, loss=loss)


def test_nothing_moves_a_constant_classifier() -> None:
    model, x, _ = linear_model(2)
    with torch.no_grad():
        model.get_parameter("2.weight").zero_()
    y = model(x).argmax(1)
    for boxed in (True, False):
        assert linear_distance(model, x, y, 2.0, boxed=boxed).isinf().all()
        assert (linear_distance(model, x, 1 - y, math.inf, boxed=boxed) == 0).all()


def test_refusals() -> None:
    model, x, y = linear_model(3)
    with pytest.raises(UserError, match="two classes"):
        theorem(model, x, y, 0.1)
    with pytest.raises(Unsupported, match="ReLU"):
        linear_distance(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(9, 3)), x, y, 2.0)
    with pytest.raises(UserError, match="svm"):
        linear_path(x, y, (1.0,), loss="hinge")
