"""On a device that is not the CPU an attack must hardly ever wait for it: each look at a value empties its queue."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparring.attacks import apgd, nearest, pgd
from sparring.attacks._gradients import Probe, frozen
from sparring.threat import L1, L2, LINF

from ..study.pretend_gpu import PretendGPU

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "item"}


class Waits(TorchDispatchMode):
    """Count the operations for which a program would wait until a GPU has finished."""

    count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        masks = name in ("index", "index_put_", "index_put") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        self.count += masks or name in WAITS
        return func(*args, **(kwargs or {}))


def _waits(attack: Any, norm: float, eps: float | None, steps: int) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    x, generator = torch.rand(12, 1, 8, 8), torch.Generator().manual_seed(0)
    with PretendGPU():
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        probe, x = Probe(model.to("cuda:0")), x.to("cuda:0")
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        y = model(x).argmax(1)
        with frozen(probe), Waits() as waits:
            attack(probe, x, y, norm=norm, eps=eps, generator=generator, steps=steps)
    return waits.count


@pytest.mark.parametrize(
    ("attack", "norm", "eps", "allowed"),
    [
        *((partial(pgd), norm, eps, 0.0) for norm, eps in ((LINF, 0.02), (L2, 0.1), (L1, 0.5))),
        (partial(pgd, stop_early=False), LINF, 0.02, 0.0),
        *((partial(apgd, again=False), norm, eps, 1.0) for norm, eps in ((LINF, 0.02), (L2, 0.1), (L1, 0.5))),
        *((partial(nearest, starts=0, polish=0), norm, eps, 1.0) for norm in (LINF, L2) for eps in (0.02, None)),
    ],
)
def test_steps_do_not_wait(attack: Any, norm: float, eps: float | None, allowed: float) -> None:
    few, many = (_waits(attack, norm, eps, steps) for steps in (8, 24))
    assert (many - few) / 16 <= allowed
    assert few < 40
