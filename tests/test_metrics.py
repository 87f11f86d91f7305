from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparring.metrics import accuracy, distances, macs, pixel_distances, robust_accuracy, size


def test_both_conventions_of_distance() -> None:
    distance = torch.tensor([1.0, 3.0, 0.0, math.inf])
    right = torch.tensor([True, True, False, True])
    found = distances(distance, right)
    assert found.mean == pytest.approx(4 / 3)  # the misclassified image counts 0, the failed one not at all
    assert found.mean_correct == pytest.approx(2.0)
    assert found.median_correct in (1.0, 3.0)
    assert found.failed == pytest.approx(1 / 3)


def test_a_pixel_counts_once_whatever_its_channels() -> None:
    x = torch.zeros(2, 3, 2, 2)
    x_adv = x.clone()
    x_adv[:, 0, 0, 0], x_adv[:, 2, 0, 0], x_adv[:, 1, 1, 1] = 0.1, 1.0, 0.5
    assert pixel_distances(x_adv, x, torch.tensor([3.0, math.inf])).tolist() == [2, math.inf]


def test_distances_of_nothing_are_nan() -> None:
    found = distances(torch.tensor([0.0]), torch.tensor([False]))
    assert found.mean == 0 and math.isnan(found.mean_correct) and found.failed == 0


def test_accuracies() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([0, 1, 1, 0])
    assert accuracy(logits, y) == 0.75
    right = logits.argmax(1) == y
    assert robust_accuracy(right, torch.tensor([True, False, False, False])) == 0.5


def test_size_counts_weights_and_everything() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
        model.get_parameter("0.weight")[0, 0, 0, 0] = 1
        model.get_parameter("0.bias").fill_(1)
        model.get_parameter("3.weight").fill_(1)
        model.get_parameter("3.bias").fill_(1)
        model.get_parameter("1.weight").fill_(1)
        model.get_parameter("1.bias").zero_()
    found = size(model)
    assert (found.weights, found.nonzero_weights) == (18 + 24, 1 + 24)
    assert (found.parameters, found.nonzero) == (42 + 2 + 4 + 3, 25 + 2 + 2 + 3)
    assert found.sparsity == pytest.approx(17 / 42)
    assert found.bytes_sparse == 6 + 4 * (25 + 9)


def test_macs_of_a_known_network_and_mode_restored() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)).train()
    with torch.no_grad():
        model.get_parameter("3.weight")[:, :16] = 0
        model.get_parameter("3.weight")[:, 16:] = 1
        model.get_parameter("0.weight").fill_(1)
    assert macs(model, (1, 8, 8)) == (18 * 16 + 160, 18 * 16 + 80)
    assert model.training
