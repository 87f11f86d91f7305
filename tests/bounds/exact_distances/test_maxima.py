"""Networks whose maxima are written as ReLUs against the networks themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparring.bounds._network import prepare
from sparring.bounds.certify._relaxations import Interval
from sparring.bounds.exact_distances._maxima import without_maxima
from sparring.graph import Conv2d, MaxPool, ReLU

POOLS = {
    "tiles": nn.MaxPool2d(2),
    "rows": nn.MaxPool2d((1, 3), 1),
    "overlap": nn.MaxPool2d(3, 2),
    "dilated": nn.MaxPool2d(2, dilation=(1, 2)),
    "padded": nn.MaxPool2d(3, 2, padding=1),
    "beyond the end": nn.MaxPool2d(3, 2, ceil_mode=True),
    "single entries": nn.MaxPool2d(1, 2),
}


@pytest.mark.parametrize("name", POOLS)
def test_the_network_stays_the_same_in_the_box_and_takes_no_maxima(name: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 2, padding=1), nn.ReLU(), POOLS[name], nn.Conv2d(2, 2, 1), POOLS[name], nn.Flatten()]
    graph = prepare(nn.Sequential(*layers).eval(), (1, 9, 10))
    low = torch.rand(1, 1, 9, 10, dtype=torch.float64) - 0.5
    found = without_maxima(graph, Interval(low, low + 2))
    x = low + 2 * torch.rand(200, 1, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(found(x), graph(x), rtol=0, atol=1e-12)
    assert [node.shape for node in found.nodes][-1] == graph.nodes[-1].shape
    assert not any(isinstance(node.op, MaxPool) for node in found.nodes)


def test_maxima_of_relus_are_taken_before_them() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    box = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    graph = without_maxima(prepare(model, (1, 4, 4)), Interval(box, box + 1))
    assert [node.shape for node in graph.nodes if isinstance(node.op, ReLU)] == [(4, 2, 2), (2, 2, 2), (1, 2, 2)]
    assert isinstance(graph.nodes[1].op, Conv2d)
