"""Layers that hide or randomise gradients: how an attack sees through them without knowing their classes.

The contract is structural (docs/design.md, "Contracts between strangers"): such a module carries `masks_gradients`,
`stochastic`, `straight_through` and `generator`, and says in `dense()` what it took the place of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["dense_copy", "has_masked_gradients", "is_stochastic", "seeded", "straight_through"]


def has_masked_gradients(model: nn.Module) -> bool:
    """Return whether some module declares that its true backward pass misleads an attack."""
    return any(getattr(module, "masks_gradients", False) for module in model.modules())


def is_stochastic(model: nn.Module) -> bool:
    """Return whether some module declares that it draws random numbers in eval mode."""
    return any(getattr(module, "stochastic", False) for module in model.modules())


def dense_copy(model: nn.Module) -> nn.Module | None:
    """Return a copy of a model with every module of activation sparsity replaced by what it took the place of.

    None where no module says so. Examples of such a copy are tried on the model itself.
    """
    # A user's own layer may well be called `dense`: only modules of this contract are asked.
    paths = [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if hasattr(module, "masks_gradients") and hasattr(module, "dense")
    ]
    if not paths:
        return None
    model = copy.deepcopy(model)
    for path in paths:
        dense: nn.Module = model.get_submodule(path).dense()  # type: ignore[operator]
        if path == "":
            return dense
        model.set_submodule(path, dense)
    return model


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Let every stochastic module draw from a generator of its own with this seed, and restore the old ones."""
    modules = [module for module in model.modules() if getattr(module, "stochastic", False)]
    before = [getattr(module, "generator", None) for module in modules]
    try:
        for place, module in enumerate(modules):
            module.generator = torch.Generator().manual_seed(seed + place)  # type: ignore[assignment]
        yield
    finally:
        for module, generator in zip(modules, before, strict=True):
            module.generator = generator  # type: ignore[assignment]


@contextmanager
def straight_through(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Give declared modules their own BPDA backward pass, and layers with a dead one a secant's.

    Athalye et al. 2018, section 4.1. A layer is dead if its output has the shape of its input and does not depend on
    it as far as autograd can tell, at any of the images x.
    """
    declared = [module for module in model.modules() if getattr(module, "masks_gradients", False)]
    before = [module.straight_through for module in declared]
    with ExitStack() as stack:
        try:
            for module in declared:
                module.straight_through = True  # type: ignore[assignment]
            for module in _dead_layers(model, x):
                stack.callback(module.register_forward_hook(_with_secant_slope).remove)
            yield
        finally:
            for module, value in zip(declared, before, strict=True):
                module.straight_through = value


def _with_secant_slope(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return the output with the backward pass of an elementwise function of secant slopes.

    The secants reach half a standard deviation to both sides, so that a staircase has the slope of its ramp, and a
    layer that only cuts the graph that of the identity.
    """
    entry = inputs[0]
    with torch.no_grad():
        reach = 0.5 * entry.std() + 1e-12
        slope: Tensor = (module.forward(entry + reach) - module.forward(entry - reach)) / (2 * reach)
        rest: Tensor = output.detach() - slope * entry
    return rest + slope * entry


def _dead_layers(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """Return the modules whose own backward pass gives nothing although input and output have one shape."""
    dead: list[nn.Module] = []

    def examine(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        entry = inputs[0] if inputs else None
        if not (isinstance(entry, Tensor) and isinstance(output, Tensor) and entry.shape == output.shape):
            return
        if not entry.is_floating_point():
            return
        point = entry.detach().requires_grad_()
        with torch.enable_grad():
            again = forwards[module](point)
            summed = again.sum()
        gradient = None
        if summed.requires_grad:
            (gradient,) = torch.autograd.grad(summed, point, allow_unused=True)
        if gradient is None or not bool(gradient.any()):
            dead.append(module)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {module: module.forward for module in leaves}
    handles = [module.register_forward_hook(examine) for module in leaves]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return dead
