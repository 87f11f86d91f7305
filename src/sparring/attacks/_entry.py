"""Common entry of all attacks: check the norm against the attack's facts, and open the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from ..errors import Unsupported
from ..facts import ATTACKS, OWN_ATTACK
from ..modes import eval_mode
from ..outputs import check_module, opened
from ..threat import norm_name

_Attacks = TypeVar("_Attacks", bound=Callable[..., Tensor])


def opening(attack: _Attacks) -> _Attacks:
    """Decorate an attack so that it takes any model that `opened` takes, in any mode.

    The attack raises Unsupported for norms that its facts do not name.
    """
    title = attack.__name__.replace("_", "-")

    @functools.wraps(attack)
    def entered(model: nn.Module, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if "norm" in options:
            refuse_norm(title, options["norm"])
        check_module(model)
        with eval_mode(model):
            answer = opened(model, x)
        return attack(answer, x, *rest, **options)

    return cast(_Attacks, entered)


def refuse_norm(name: str, norm: float) -> None:
    """Raise Unsupported for a norm that the facts of an attack do not name."""
    norms, asked = ATTACKS.get(name, OWN_ATTACK).norms, norm_name(norm)
    if asked not in norms:
        able = ", ".join(other for other, facts in ATTACKS.items() if asked in facts.norms)
        raise Unsupported(f"'{name}' supports only {', '.join(norms)}, not {asked}; for {asked} use: {able}")
