from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparring import attacks, bounds, models
from sparring.errors import UserError
from sparring.threat import L2, LINF, Threat

SHAPE = (1, 4, 4)


def network(seed=0):
    return models.build("mlp", shape=SHAPE, classes=3, mean=(0.5,), std=(0.3,), widths=(8,), seed=seed).eval()


@pytest.mark.parametrize("norm", [LINF, L2])
def test_proofs_and_attacks_on_the_same_images(norm):
    model, x = network(), torch.rand(12, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % 3  # three images that the model gets wrong
    attacked = attacks.run(model, x, y, attacks.nearest, Threat(norm))
    found = bounds.summary(model, x, y, norm, attacked, eps=(0, 0.01, 0.05, 9), method="crown")
    assert found.accuracy == 0.75 == found.certified_accuracy[0] and found.certified_accuracy[9] == 0
    assert torch.equal(found.radius, bounds.radius(model, x, y, norm))
    assert all(found.certified_accuracy[eps] <= found.attacked_accuracy[eps] for eps in (0, 0.01, 0.05, 9))
    assert 0 < found.radius_median <= found.distance_median and found.distance_over_radius_median >= 1
    assert "accuracy: 75.0%; eps 0: certified 75.0%" in repr(found) and "tensor" not in repr(found)
    assert "<tr><th>accuracy</th><td>75.0%</td></tr>" in found._repr_html_()
    wrong = attacks.run(model, x[:3], y[:3], attacks.nearest, Threat(norm))
    none = bounds.summary(model, x[:3], y[:3], norm, wrong, eps=())
    assert none.accuracy == 0 and none.radius_median is None is none.distance_over_radius_median


def test_an_example_within_a_certified_radius_ends_it():
    model, x = network(), torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    attacked = attacks.run(model, x, y, attacks.nearest, Threat(LINF))
    attacked = replace(attacked, distance=attacked.distance / 100)
    with pytest.raises(UserError, match="is certified up to linf"):
        bounds.summary(model, x, y, LINF, attacked, eps=(0.01,))
