"""What a network multiplies with, seen while it computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.metrics import size
from sparring.sparsity import apply_, magnitude, select
from sparring.tally import counts, made_dense

X = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """Two layers, of which a function says how the first one's weight is used."""

    def __init__(self, use: Callable[[Own, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.use = nn.Linear(16, 8, bias=False), nn.Linear(8, 3), use
        self.a, self.b = nn.Parameter(torch.rand(2, 16)), nn.Parameter(torch.zeros(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.use(self, x.flatten(1))))


DENSE: dict[str, tuple[Callable[[Own, Tensor], Tensor], str]] = {
    "softmax": (lambda m, x: F.linear(x, m.layer.weight.softmax(-1)), "softmax"),
    "exp of a view": (lambda m, x: x @ m.layer.weight.t().exp(), "exp"),
    "function of torch": (lambda m, x: x @ torch.sigmoid(m.layer.weight).T, "sigmoid"),
    "sum with a product": (lambda m, x: F.linear(x, m.layer.weight + m.b @ m.a), "add"),
    "centred": (lambda m, x: F.linear(x, m.layer.weight - m.layer.weight.mean(1, keepdim=True)), "sub"),
}
SPARSE: dict[str, Callable[[Own, Tensor], Tensor]] = {
    "layer": lambda m, x: m.layer(x),
    "function": lambda m, x: F.linear(x, m.layer.weight),
    "operator": lambda m, x: x @ m.layer.weight.T,
    "einsum": lambda m, x: torch.einsum("ni,oi->no", x, m.layer.weight),
    "scaled": lambda m, x: F.linear(x, 2 * m.layer.weight / m.layer.weight.norm()),
    "normalised": lambda m, x: F.linear(x, F.normalize(m.layer.weight, dim=1)),
    "cut": lambda m, x: torch.cat([F.linear(x, part) for part in m.layer.weight.chunk(2)], 1),
    "two products": lambda m, x: m.layer(x) + x @ m.a.t() @ m.b.t(),
}


def pruned(use: Callable[[Own, Tensor], Tensor]) -> Own:
    torch.manual_seed(0)
    model = Own(use)
    apply_(model, select({name: s for name, s in magnitude(model).items() if "layer" in name}, 0.75))
    return model


@pytest.mark.parametrize("name", DENSE)
def test_a_weight_that_loses_its_zeros_counts_as_dense(name: str) -> None:
    use, operation = DENSE[name]
    model = pruned(use).train()
    assert made_dense(model, X) == {
        "layer.weight": f"forward() uses it through '{operation}', which does not keep zeros"
    }
    assert model.training and model.layer.training
    found, blind = counts(model, X), counts(model)
    assert found.matrices_nonzero - blind.matrices_nonzero == 96 and "layer.weight" in found.left_out
    assert size(model, X).sparsity_matrices == found.matrix_sparsity < 0.1 < blind.matrix_sparsity


@pytest.mark.parametrize("name", SPARSE)
def test_a_weight_that_keeps_its_zeros_counts_as_sparse(name: str) -> None:
    model = pruned(SPARSE[name])
    assert made_dense(model, X) == {} and counts(model, X) == counts(model)


def test_what_a_parametrisation_computes_is_followed_too() -> None:
    model = pruned(DENSE["softmax"][0])
    nn.utils.parametrizations.weight_norm(model.layer)
    assert list(made_dense(model, X)) == ["layer.parametrizations.weight.original1"]
    model.use = SPARSE["layer"]
    assert made_dense(model, X) == {}
