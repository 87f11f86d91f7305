"""Operations that linear layers and ReLU can say are said by them: the same logits, without a Call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparring.bounds._network import prepare
from sparring.bounds.certify._certificates import radius_over
from sparring.deploy import pack
from sparring.graph import Call, lower, spelled_out
from sparring.threat import LINF

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.75),
    "clamp": lambda x: x.clamp(-0.2, 0.4),
    "clamp to a maximum": lambda x: x.clamp(max=0.3),
    "clamp to a minimum": lambda x: x.clamp(min=-0.3),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "abs": torch.abs,
    "hardsigmoid": F.hardsigmoid,
    "maximum": lambda x: torch.maximum(x, 0.5 * x.flip(2) if x.dim() < 0 else -0.5 * x),
    "minimum": lambda x: torch.minimum(x, 0.3 - x),
    "cat": lambda x: torch.cat([x, F.relu(x), -x], 1),
    "cat of one": lambda x: torch.cat([x], 1),
    "chunk": lambda x: x.chunk(2, 1)[1] + x.chunk(2, 1)[0],
    "split unevenly": lambda x: torch.cat(list(x.split([1, 3, 2], 1))[::-1], 1),
    "slice": lambda x: x[:, 1:5],
    "slice with steps": lambda x: x[:, ::2],
    "index": lambda x: x[:, [5, 0, 0]],
    "channel shuffle": lambda x: F.channel_shuffle(x, 3) if x.dim() == 4 else x,
}
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "shuffle as in ShuffleNet": lambda x: x.view(-1, 2, 3, 4, 4).transpose(1, 2).contiguous().view(-1, 6, 4, 4),
    "shuffle by permute": lambda x: x.view(-1, 3, 2, 4, 4).permute(0, 2, 1, 3, 4).reshape(-1, 6, 4, 4),
    "padded means": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "padded means of part": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, divisor_override=4),
    "pad": lambda x: F.pad(x, (1, 1, 2, 2)),
    "pad one side": lambda x: F.pad(x, (0, 2, 1, 0)),
    "uneven adaptive means": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive means of one": lambda x: F.adaptive_avg_pool2d(F.max_pool2d(x, 4), 2),
    "adaptive means of fewer": lambda x: F.adaptive_avg_pool2d(x, (7, 5)),
}


class Net(nn.Module):
    """A layer, an operation, and a layer whose size follows."""

    def __init__(self, way: Callable[[Tensor], Tensor], *, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.flat = way, flat
        self.first = nn.Linear(16, 6) if flat else nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6) if flat else nn.BatchNorm2d(6)
        values = way(torch.zeros(2, 6) if flat else torch.zeros(2, 6, 4, 4)).flatten(1).shape[1]
        self.last = nn.Linear(values, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self.norm(self.first(x.flatten(1) if self.flat else x))).flatten(1))


CASES = [(way, flat) for way in WAYS for flat in (False, True) if not (flat and way == "channel shuffle")]
CASES += [(way, False) for way in MAPS]


@pytest.mark.parametrize(("name", "flat"), CASES)
def test_the_same_logits_without_a_call(name: str, flat: bool) -> None:
    model = Net({**WAYS, **MAPS}[name], flat=flat).eval()
    with torch.no_grad():
        model.get_buffer("norm.running_mean").uniform_(-0.2, 0.2)
    x = torch.rand(5, 1, 4, 4)
    graph = prepare(model, (1, 4, 4), sparse=False)
    assert not [node.title for node in graph.nodes if isinstance(node.op, Call)]
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(graph(x.double()).float(), wanted)
    assert bool((radius_over(graph, x.double(), wanted.argmax(1), LINF, "crown") > 0).any())
    if not flat:  # where images have no sides, kernels compute the same
        torch.testing.assert_close(pack(model, shape=(1, 4, 4))(x), wanted, rtol=1e-4, atol=1e-5)


def test_what_nobody_can_say_stays() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3] * x.flatten(1)[:, 3:6].sigmoid()

    kept = spelled_out(lower(Gate(), (1, 4, 4)), torch.float32)
    assert [node.op.name for node in kept.nodes if isinstance(node.op, Call)] == ["sigmoid", "mul"]
