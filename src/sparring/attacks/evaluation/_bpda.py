"""Attack models whose gradients are hidden, random or partly missing.

Layers with the base class `Declared` declare what cannot be detected. If a branch is cut from the graph, autograd's
gradient is right for some pixels and misses others, without being zero or unstable: finite differences show this, and
replace it.
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
from ...outputs import precision
from .._gradients import in_parts, logits_and_pull
from ..algorithms._losses import others
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
    """Return a copy of a model with every module of activation sparsity replaced by the layer that it replaced.

    None if no module declares one. Examples of such a copy are tried on the model itself.
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
    """Give every stochastic module its own generator with this seed, and restore the old ones."""
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
    """Use the BPDA backward pass of modules that declare one, and a secant's for layers with a dead one.

    Athalye et al. 2018, section 4.1. A layer is dead if its output has the shape of its input and does not depend on
    it according to autograd, at any of the images x.
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
    """A module's call: a copy of its first input, since the module may write into it, and the other inputs."""

    entry: Tensor
    others: tuple[Any, ...]
    named: dict[str, Any]

    def again(self, forward: Callable[..., Any], entry: Tensor) -> Any:
        """Return the module's output for another first input, which is not changed."""
        return forward(entry.clone(), *self.others, **self.named)


Reply = Callable[[nn.Module, Callable[..., Any], _Call, Tensor], Tensor | None]


@contextmanager
def _listening(modules: list[nn.Module], reply: Reply) -> Iterator[None]:
    """Call `reply` with each call of a module whose output has the shape of its first input, and use its answer.

    `reply` also gets the forward pass, and is not called when it runs that. Scripted modules take no hooks and are
    left out.
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

    The secants reach half a standard deviation to both sides. A staircase therefore has the slope of its ramp, and a
    layer that only cuts the graph has slope 1.
    """
    entry = call.entry
    with torch.no_grad():
        spread = entry.std() if entry.numel() > 1 else entry.abs().sum()
        reach = 0.5 * spread + 1e-12
        slope: Tensor = (call.again(forward, entry + reach) - call.again(forward, entry - reach)) / (2 * reach)
        rest: Tensor = output.detach() - slope * entry
    return rest + slope * entry


def _dead_layers(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """Return the modules whose backward pass gives zeros although input and output have the same shape."""
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
    """A model in two: `drawing(steady(x))` are its logits, and `steady` returns the same each time."""

    steady: nn.Module
    drawing: nn.Module


def split_at_draw(model: nn.Module, x: Tensor) -> PrefixSplit | None:
    """Return a sequence of layers split before the first that declares to draw, or None for any other model.

    x: a few images, on which the first part is tried: a layer that draws without declaring it is found there. Also None
    if that part has more outputs than inputs: little would be saved, and outputs are held for all images.
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


_IMAGES = 8
# Directions over all pixels, over those without any gradient, blocks to a side, and directions of the first look.
_WHOLE, _SILENT, _GRID, _FIRST = 4, 3, 3, 2
# Half the length of a difference, in pixel units: short, but long enough that rounding does not hide it.
_STEP, _STEP_IN, _LONG = 1e-3, {torch.float16: 2e-2, torch.bfloat16: 6e-2}, 0.125
_ROOM, _SHORTER = 0.0125, (8.0, 64.0)
# So much of a derivative's square must be missing, and so many times the second difference, which kinks, curvature,
# jumps and rounding between the two ends explain. Parts are examined unless almost nothing of the whole is missing, or
# little that is so explained.
_MISSING, _BEYOND, _LITTLE, _NOTHING = 0.2, 4.0, 0.03, 0.001
# Pixels without a gradient that, moved far, have this share of the effect of all pixels are not dead: a staircase is.
_NOTABLE = 0.1
# Groups of pixels that an attack moves one after another, the limit of parameters times groups, and the distance moved.
# The limit gives a large network fewer groups (at least 16), so that an attack on it ends in minutes.
_GROUPS, _WORK, _REACH = 256, 2**27, 0.03


@torch.no_grad()
def blind_pixels(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 1024) -> Tensor | None:
    """Return the pixels of an image whose effect autograd misses, as a bool mask; None if there are none.

    x: images that are classified correctly as y; the first 8 are examined. A few passes compare how the gap between the
    label's logit and the strongest other one changes along random signs over all pixels with what the gradient
    predicts. If that misses more than kinks explain, or 3%, or if pixels have no gradient at any image, then blocks,
    channels and those pixels follow, in at most 57 passes, or three times as many if a result is unclear. Pixels
    without a gradient are also moved far, since short steps do not reveal a staircase. The model gets `batch_size`
    images at a time.
    """
    x, y = x[:_IMAGES], y[:_IMAGES]
    kind = precision(model, x)  # unless the logits are coarser still
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)

    def gap(length: float) -> _Gap:
        # A little noise, as flat images put maxima at ties and ReLUs at kinks; and room for steps to both sides.
        point = torch.lerp(x, 0.25 + 0.5 * noise, 4 * length).to(kind).to(x.dtype)
        return _Gap.at(model, point, y, kind, generator, batch_size)

    near, everything = gap(max(_ROOM, _STEP_IN.get(kind, _STEP))), torch.ones_like(x[0], dtype=torch.bool)
    if (coarse := precision(model, near.logits)) != kind:
        kind = coarse
        near = gap(max(_ROOM, _STEP_IN.get(kind, _STEP)))
    step = _STEP_IN.get(kind, _STEP)
    silent, blind = (near.gradient == 0).all(0), torch.zeros_like(everything)
    if bool(silent.any()):
        far = gap(_LONG)
        silent &= (far.gradient == 0).all(0)
        moves, all_move = (far.changes(part, _LONG, _SILENT).known for part in (silent, everything))
        if moves > _NOTABLE * all_move:
            blind |= silent
    if not bool(silent.any()) and _is_told(near.changes(everything, step, _FIRST)):
        return None
    for part, times in _parts(silent):
        pixels = part & ~blind
        seen = near.changes(pixels, step, times)
        if seen.missed <= max(_MISSING * seen.known, _BEYOND * seen.bent):
            continue
        # A rough function has a gradient nearby; a cut misses as much for any length of step.
        nearby = (near.changes(pixels, step / shorter, times) for shorter in _SHORTER)
        if all(again.missed > _MISSING * again.known for again in nearby):
            blind |= pixels
    return blind if bool(blind.any()) else None


class _Changes(NamedTuple):
    """Sums of squares: the gradient's errors, the differences, and the second differences."""

    missed: float
    known: float
    bent: float


@dataclass(frozen=True)
class _Gap:
    """The gap between the label's and the strongest other logit, as a function of images near x: value and gradient.

    grain: the distance between neighbouring numbers of the logits' size.
    """

    model: nn.Module
    x: Tensor
    logits: Tensor
    weights: Tensor
    value: Tensor
    grain: Tensor
    gradient: Tensor
    kind: torch.dtype
    generator: torch.Generator
    batch_size: int

    @classmethod
    def at(
        cls, model: nn.Module, x: Tensor, y: Tensor, kind: torch.dtype, generator: torch.Generator, batch_size: int
    ) -> _Gap:
        """Return the gap at images of the labels y, for a model that computes in this type."""

        def lack(logits: Tensor, y: Tensor, _: object) -> Tensor:
            return (logits * _against(logits, y)).sum(1)

        logits, gradient = in_parts(model, x, lack, y, batch_size)
        weights = _against(logits, y)
        grain = torch.finfo(kind).eps * logits.abs().amax(1)  # a smaller change may be none
        value = (logits * weights).sum(1)
        return cls(model, x, logits, weights, value, grain, gradient, kind, generator, batch_size)

    def changes(self, pixels: Tensor, step: float, times: int) -> _Changes:
        """Return the effect of moving these pixels to both sides, along several random directions in one pass."""
        if times == 0 or not bool(pixels.any()):
            return _Changes(0.0, 0.0, 0.0)
        drawn = torch.stack([torch.rand(self.x.shape, generator=self.generator) for _ in range(times)])
        moves = step * pixels * (drawn - 0.5).sign().to(self.x)
        ends = torch.stack([self.x + moves, self.x - moves]).to(self.kind).to(self.x.dtype)
        shown = torch.split(ends.flatten(0, 2), self.batch_size)
        logits = torch.cat([self.model(part) for part in shown]).view(2, times, len(self.x), -1)
        up, down = (logits * self.weights).sum(-1)
        promised = ((ends[0] - ends[1]) * self.gradient).flatten(2).sum(2)
        parts = torch.stack([up - down - promised, up - down, (up + down - 2 * self.value).abs() + self.grain])
        return _Changes(*parts.double().square().sum((1, 2)).tolist())


def _against(logits: Tensor, y: Tensor) -> Tensor:
    """Return the weights (N, classes) whose sum of logits is the strongest other logit minus the label's."""
    rival = others(logits, y).argmax(1, keepdim=True)
    return torch.zeros_like(logits).scatter(1, rival, 1.0).scatter(1, y.unsqueeze(1), -1.0)


def _is_told(seen: _Changes) -> bool:
    """Return whether the gradient explains so much of an image's effect that no notable part can be missing."""
    return seen.missed <= max(_NOTHING * seen.known, min(_LITTLE * seen.known, _BEYOND * seen.bent))


def _parts(silent: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield parts of an image, as masks, and the number of directions for each; the whole comes last."""
    yield silent, _SILENT
    places = torch.arange(silent.numel(), device=silent.device).view_as(silent)
    block = places * _GRID**2 // silent.numel()
    if silent.dim() == 3:
        channels, height, width = silent.shape
        if 1 < channels <= 4:
            for channel in range(channels):
                yield places // (height * width) == channel, 1
        block = (places // width % height) * _GRID // height * _GRID + places % width * _GRID // width
    for number in range(_GRID**2):
        yield block == number, 1
    yield torch.ones_like(silent), _WHOLE


def groups_of(model: nn.Module) -> int:
    """Return how many passes a gradient by finite differences takes at most."""
    parameters = sum(value.numel() for value in model.parameters())
    return min(_GROUPS, max(16, _WORK // max(1, parameters)))


class Differences(nn.Module):
    """A model whose input gradients are autograd's, except at blind pixels, where they are finite differences.

    blind: a mask of the pixels of an image. They are moved in at most 256 groups, fewer for a large network, by 0.03
    into the box and with random signs. A group's pixels share its effect, and are regrouped each time.
    passes: images sent forward for that.
    """

    def __init__(self, model: nn.Module, blind: Tensor) -> None:
        super().__init__()
        self.model, self.pixels, self.passes = model, blind.flatten().nonzero().squeeze(1), 0
        self.generator = torch.Generator().manual_seed(0)
        self.groups = groups_of(model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits."""
        logits: Tensor = self.model(x)
        return logits

    def input_gradient(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the gradients (..., N, *image) of sums of logits with these weights (..., N, classes)."""
        logits, gradient = logits_and_pull(self.model, x, lambda _: weights.view(-1, *weights.shape[-2:]))
        found = gradient.flatten(2)
        order = self.pixels[torch.randperm(len(self.pixels), generator=self.generator).to(x.device)]
        for group in order.tensor_split(min(self.groups, len(order))):
            moved = x.flatten(1).clone()
            sign = (torch.rand(len(x), len(group), generator=self.generator) - 0.5).sign().to(x)
            start = moved[:, group]
            sign = torch.where(start < _REACH, 1, torch.where(start > 1 - _REACH, -1, sign))
            moved[:, group] = start + _REACH * sign
            with torch.no_grad():
                change = (self.model(moved.view_as(x)) - logits) / _REACH
            self.passes += len(x)
            found[:, :, group] = (change * weights).sum(-1).view(-1, len(x), 1) * sign
        return found.view(*weights.shape[:-1], *x.shape[1:])
