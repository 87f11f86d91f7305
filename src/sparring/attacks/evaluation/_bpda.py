"""Layers that hide or randomise gradients: how an attack sees through them without knowing their classes.

What nobody can find out by looking, a layer of the base class `Declared` says of itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...declared import Declared
from ._sanity_checks import is_random


def _declared(model: nn.Module) -> list[Declared]:
    return [module for module in model.modules() if isinstance(module, Declared)]


def has_masked_gradients(model: nn.Module) -> bool:
    """Return whether some module declares that its true backward pass misleads an attack."""
    return any(module.masks_gradients for module in _declared(model))


def is_stochastic(model: nn.Module) -> bool:
    """Return whether some module declares that it draws random numbers in eval mode."""
    return any(module.stochastic for module in _declared(model))


def dense_copy(model: nn.Module) -> nn.Module | None:
    """Return a copy of a model with every module of activation sparsity replaced by what it took the place of.

    None where no module says so. Examples of such a copy are tried on the model itself.
    """
    parts = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, Declared)]
    replaced = {path: dense for path, part in parts if (dense := part.dense()) is not None}
    if not replaced:
        return None
    model = copy.deepcopy(model)
    for path, dense in replaced.items():
        if path == "":
            return dense
        model.set_submodule(path, dense)
    return model


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Let every stochastic module draw from a generator of its own with this seed, and restore the old ones."""
    modules = [module for module in _declared(model) if module.stochastic]
    before = [module.generator for module in modules]
    try:
        for place, module in enumerate(modules):
            module.generator = torch.Generator().manual_seed(seed + place)
        yield
    finally:
        for module, generator in zip(modules, before, strict=True):
            module.generator = generator


@contextmanager
def straight_through(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Give declared modules their own BPDA backward pass, and layers with a dead one a secant's.

    Athalye et al. 2018, section 4.1. A layer is dead if its output has the shape of its input and does not depend on
    it as far as autograd can tell, at any of the images x.
    """
    declared = [module for module in _declared(model) if module.masks_gradients]
    before = [module.straight_through for module in declared]
    with ExitStack() as stack:
        try:
            for module in declared:
                module.straight_through = True
            for layer in _dead_layers(model, x):
                stack.enter_context(_listening([layer], _with_secant_slope))
            yield
        finally:
            for module, value in zip(declared, before, strict=True):
                module.straight_through = value


@dataclass(frozen=True)
class _Call:
    """A module's call: its first input as it was before the module ran, which may write into it, and the others."""

    entry: Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]

    def again(self, forward: Callable[..., Any], entry: Tensor) -> Any:
        """Return what the module makes of another first input, which stays as it is."""
        return forward(entry.clone(), *self.others, **self.named)


Reply = Callable[[nn.Module, Callable[..., Any], _Call, Tensor], Tensor | None]


@contextmanager
def _listening(modules: list[nn.Module], reply: Reply) -> Iterator[None]:
    """Call `reply` with each call of a module whose output has the shape of its first input, and take its answer.

    It is given the forward pass too, which it may run again without being called for that. Scripted modules take no
    hooks, and are left out.
    """
    calls: list[_Call | None] = []
    forwards: dict[nn.Module, Callable[..., Any]] = {}

    def enter(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = inputs[0] if inputs else None
        floating = isinstance(first, Tensor) and first.is_floating_point()
        calls.append(_Call(cast(Tensor, first).clone(), inputs[1:], named) if floating else None)

    def leave(module: nn.Module, _: tuple[Any, ...], __: dict[str, Any], output: Any) -> Tensor | None:
        call = calls.pop()
        if call is None or not isinstance(output, Tensor) or output.shape != call.entry.shape:
            return None
        return reply(module, forwards[module], call, output)

    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            forwards[module] = module.forward
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield


def _with_secant_slope(_: nn.Module, forward: Callable[..., Any], call: _Call, output: Tensor) -> Tensor:
    """Return the output with the backward pass of an elementwise function of secant slopes.

    The secants reach half a standard deviation to both sides, so that a staircase has the slope of its ramp, and a
    layer that only cuts the graph that of the identity.
    """
    entry = call.entry
    with torch.no_grad():
        spread = entry.std() if entry.numel() > 1 else entry.abs().sum()
        reach = 0.5 * spread + 1e-12
        slope: Tensor = (call.again(forward, entry + reach) - call.again(forward, entry - reach)) / (2 * reach)
        rest: Tensor = output.detach() - slope * entry
    return rest + slope * entry


def _dead_layers(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """Return the modules whose own backward pass gives nothing although input and output have one shape."""
    dead: list[nn.Module] = []

    def examine(module: nn.Module, forward: Callable[..., Any], call: _Call, _: Tensor) -> None:
        point = call.entry.detach().requires_grad_()
        with torch.enable_grad():
            summed = call.again(forward, point).sum()
        gradient = None
        if summed.requires_grad:
            (gradient,) = torch.autograd.grad(summed, point, allow_unused=True)
        if gradient is None or not bool(gradient.any()):
            dead.append(module)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    with _listening(leaves, examine), torch.no_grad():
        model(x)
    return list(dict.fromkeys(dead))


class PrefixSplit(NamedTuple):
    """A model in two: `drawing(steady(x))` are its logits, and `steady` answers the same each time."""

    steady: nn.Module
    drawing: nn.Module


def split_at_draw(model: nn.Module, x: Tensor) -> PrefixSplit | None:
    """Return a sequence of layers split before the first that declares to draw, or None for any other model.

    x: a few images, on which the first part is tried: a layer that draws without saying so does not get past. None also
    where that part has more outputs than inputs: little would be saved then, and outputs are held for all images.
    """
    hooked = model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks
    if type(model) is not nn.Sequential or hooked or "forward" in vars(model):
        return None
    place = next((place for place, layer in enumerate(model) if is_stochastic(layer)), 0)
    steady = model[:place]
    if place == 0 or is_random(steady, x):
        return None
    with torch.no_grad():
        value = steady(x[:1])
    return PrefixSplit(steady, model[place:]) if value.numel() <= x[:1].numel() else None
