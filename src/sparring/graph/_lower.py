"""Lower a model to a graph, and compare the graph with the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor, nn

from ..declared import Declared
from ..errors import Unsupported, UserError, short_of_memory, told
from ..modes import eval_mode
from ..outputs import check_module, logits_of
from ..waiting import courteous
from ._ops import Graph, SparseActivation, flat
from ._plain_stacks import read_plain


@courteous()
def lower(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    images: Tensor | None = None,
    dtype: torch.dtype | None = None,
    plain: bool = False,
) -> Graph:
    """Lower a classifier for images of `shape` (channels, height, width) to a Graph that computes the same logits.

    The graph is what torch computes in eval mode, with hooks, replaced forward methods and in-place writes. It is
    compared with the model on random images in [0, 1], on images at the corners of that range and on up to eight of
    `images` (N, *shape): each alone, all together, in another order, among many others, with and without gradients, and
    twice (see `check`).

    dtype: the type of the graph's tensors. With None the graph shares the model's parameters and does not copy them.
    plain: read only plain stacks of torch's layers, which takes milliseconds, and refuse all other models. The model,
    its modes, buffers and hooks and the random state are restored afterwards.

    Raise Unsupported, naming the operation, layer and line, for an operation without a rule, for one that draws random
    numbers or depends on other images, and for a graph that differs from the model. Raise UserError if the model does
    not accept such images.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise Unsupported("a script module cannot be lowered; use the module that it was made from")
    with observed(model, shape, images) as seen:
        graph = read_plain(model, shape, dtype or seen.dtype, seen.x.device, shared=dtype is None)
        if graph is None and plain:
            raise Unsupported(f"{type(model).__name__} is not a plain stack of layers")
        if graph is None:
            from ._torch_export import read_exported

            graph = read_exported(model, seen.x[:2], dtype or seen.dtype, shared=dtype is None)
        try:
            return check(graph, model, seen)
        except Apart as refusal:
            return _rounded(graph, model, seen, refusal)


class Apart(Unsupported):
    """Logits differ unexpectedly, possibly by rounding: float64 decides."""


# Relative to the largest logit: how far sums in another order may differ. TF32 rounds float32 products on a GPU more
# coarsely.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
_TF32 = 0.01
_IMAGES, _INSIDE, _CORNERS = 8, 4, 4
# Further images in one large batch: at least and at most so many, depending on their pixels.
_FEW, _MANY, _PIXELS = 9, 167, 2**17
# Usual rounding of a logit in float32, relative to the largest: more is recorded in `Graph.rounding`.
_ROUNDING = 2.5e-6
# By rounding, a discontinuous activation may be on the other side of its jump, for one image in so many.
_JUMPED = 8


@dataclass(frozen=True)
class Observed:
    """A model in eval mode, its inputs x (N, ...), and its logits (N, classes).

    tolerance: by the coarsest type in which it computes.
    """

    x: Tensor
    logits: Tensor
    dtype: torch.dtype
    tolerance: float


@contextmanager
def observed(model: nn.Module, shape: tuple[int, ...], images: Tensor | None) -> Iterator[Observed]:
    """Hold a model in eval mode and frozen, as attacks do, and compute logits; restore all on leaving.

    Logits are of `images` and of random ones. Raise UserError for a model that does not accept such images, or does
    not return one tensor of logits.
    """
    check_module(model)
    first = next((p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()), torch.zeros(()))
    scripted = torch.jit.ScriptModule
    buffers = [(module, dict(module._buffers)) for module in model.modules() if not isinstance(module, scripted)]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    state = torch.get_rng_state()
    wanted = [p for p in model.parameters() if p.requires_grad]
    with eval_mode(model):
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            x = _asked(shape, images).to(first)
            try:
                logits = _ask(model, x)
            except UserError:
                raise
            except Exception as error:  # the user's own operations, which can raise anything
                if short_of_memory(error):
                    raise UserError(told(error)) from error
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"the model does not accept images of shape {tuple(shape)}: {reason}") from error
            if logits.dim() != 2 or len(logits) != len(x):
                raise Unsupported(f"the model must return one tensor of logits (N, classes), not {tuple(logits.shape)}")
            if bool(torch.isnan(logits).any()):
                raise Unsupported("the model's logits are NaN for some images in [0, 1]")
            yield Observed(x, logits, first.dtype, _tolerance(model, x, logits))
        finally:
            torch.set_rng_state(state)
            for parameter in wanted:
                parameter.requires_grad_(True)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
            for module, held in buffers:
                module._buffers.update(held)  # some forward methods replace them


def _asked(shape: tuple[int, ...], images: Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(_INSIDE, *shape, generator=generator)
    corners = torch.randint(0, 2, (_CORNERS, *shape), generator=generator).float()
    given = [] if images is None else [images[:_IMAGES].detach().cpu().float()]
    return torch.cat([*given, inside, corners])


@contextmanager
def _seeded(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Make declared stochastic layers draw the same each time."""
    drawing = [m for m in model.modules() if isinstance(m, Declared) and m.stochastic]
    generators = [m.generator for m in drawing]
    try:
        for module in drawing:
            module.generator = torch.Generator(device).manual_seed(0)
        yield
    finally:
        for module, generator in zip(drawing, generators, strict=True):
            module.generator = generator


def _ask(model: nn.Module, x: Tensor) -> Tensor:
    """Return a model's logits for a copy of the images."""
    with _seeded(model, x.device), torch.no_grad():
        return logits_of(model(x.clone()))


def _ask_one(model: nn.Module, x: Tensor) -> Tensor:
    try:
        return _ask(model, x)
    except Exception as error:  # the user's own operations, which can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the model fails on one image alone: {reason}; squeeze only the intended axes") from error


def _crowd(x: Tensor) -> Tensor:
    """Return images x after many others: corners and points inside the box, from dark to bright."""
    count, generator = min(_MANY, max(_FEW, _PIXELS // x[0].numel())), torch.Generator().manual_seed(1)
    points = torch.rand(count, *x.shape[1:], generator=generator)
    level = torch.rand(count, *[1] * (x.dim() - 1), generator=generator)
    points[::2] = points[::2] * level[::2]
    points[1::2] = (points[1::2] < level[1::2]).float()
    return torch.cat([points.to(x), x])


def check(graph: Graph, model: nn.Module, seen: Observed) -> Graph:
    """Return a graph that gives a model's logits, within `TOLERANCE` of the largest of them, with its `rounding`.

    The model must return the same when called twice, for each image alone, in another order and among many others, and
    with gradients and frozen parameters, as in attacks. Raise Unsupported otherwise: the message says what the logits
    depend on, or the first layer at which they differ.
    """
    x, logits = seen.x, seen.logits
    name = type(model).__name__
    if not _same(_ask(model, x), logits, seen.tolerance):
        raise Unsupported(
            f"{name} returns different logits in a second pass: it is random or counts its calls; do so only if "
            "self.training is set, or declare it (`stochastic = True`, with `Declared` as its base class)"
        )
    many = _ask(model, crowd := _crowd(x))
    if not any(isinstance(module, Declared) and module.stochastic for module in model.modules()):
        order = torch.arange(len(x) - 1, -1, -1, device=x.device)
        alone = torch.cat([_ask_one(model, x[i : i + 1]) for i in range(len(x))])
        same = partial(_same, expected=logits, tolerance=seen.tolerance, allowed=_jumped(graph, x))
        if not same(alone) or not same(_ask(model, x[order])[order]) or not same(many[-len(x) :]):
            raise Apart(
                f"{name} returns different logits for an image in another batch, so they depend on other images and no "
                "image can be certified alone; process each image independently in eval mode"
            )
    if not _same(_with_gradients(model, x), logits, seen.tolerance):
        raise Apart(f"{name} returns different logits when gradients are enabled; forward() must not depend on that")
    try:
        with _seeded(model, x.device), torch.no_grad():
            found = graph(crowd.to(_dtype(graph, x)))
    except Exception as error:  # a wrong rule, which must also end in a message
        raise Unsupported(f"{name} cannot be lowered: its graph cannot be evaluated ({error})") from error
    seen = replace(seen, tolerance=max(seen.tolerance, TOLERANCE.get(found.dtype, 0.0)))  # a graph may round more
    finite = found.isfinite() & many.isfinite()
    apart = float((found - many).abs().where(finite, 0).max())
    largest = float(many.abs().where(finite, 0).max())
    if not _same(found, many, seen.tolerance, _jumped(graph, crowd)):
        raise Apart(
            f"{name} cannot be lowered: the logits of its graph differ by {apart / max(largest, 1e-30):.2g} of "
            f"the largest, {_first_difference(graph, model, replace(seen, x=crowd))}"
        )
    return replace(graph, rounding=apart) if apart > _ROUNDING * largest and not _jumped(graph, crowd) else graph


def _rounded(graph: Graph, model: nn.Module, seen: Observed, refusal: Apart) -> Graph:
    """Return a graph that differs from a model in float32 only by rounding, which can be large for unusual images.

    The model in float64 has to pass all checks, at the tolerance of float64, with a graph of the same operations and
    numbers. Raise the refusal otherwise.
    """
    held = (value for value in (*model.parameters(), *model.buffers()) if value.is_floating_point())
    if next((value.dtype for value in held), None) != torch.float32:  # without parameters there is no other precision
        raise refusal
    x = _crowd(seen.x)
    try:
        exact = lower(copy.deepcopy(model).double(), tuple(x.shape[1:]), images=seen.x)
        expected = exact(x.double())
    except Exception:  # it cannot be copied, or always computes in float32
        raise refusal from None
    if not _alike(graph, exact):
        raise refusal
    alone = torch.cat([_ask(model, x[i : i + 1]) for i in range(len(x) - len(seen.x), len(x))])
    own = torch.cat([_ask(model, x), alone]).double() - torch.cat([expected, expected[-len(seen.x) :]])
    return replace(graph, rounding=float(own.abs().max()))


def _alike(graph: Graph, other: Graph) -> bool:
    """Return whether two graphs have the same operations and, except for rounding, numbers."""
    pairs = list(zip_longest(graph.nodes, other.nodes))
    return all(
        one is not None
        and two is not None
        and (type(one.op), one.inputs, one.shape) == (type(two.op), two.inputs, two.shape)
        and all(_equal(a, b) for a, b in zip_longest(flat(vars(one.op)), flat(vars(two.op))))
        for one, two in pairs
    )


def _equal(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        close = _same(one.reshape(1, -1), two.reshape(1, -1), TOLERANCE[torch.float32])
        return one.shape == two.shape and close
    return isinstance(one, nn.Module | torch.dtype) or one == two


def _jumped(graph: Graph, x: Tensor) -> int:
    jumps = any(isinstance(n.op, SparseActivation) and n.op.module.masks_gradients for n in graph.nodes)
    return len(x) // _JUMPED if jumps else 0


def _tolerance(model: nn.Module, x: Tensor, logits: Tensor) -> float:
    kinds = {value.dtype for value in (*model.parameters(), *model.buffers(), x, logits)}
    tolerance = max(TOLERANCE.get(kind, 0.0) for kind in kinds)
    return max(tolerance, _TF32) if x.is_cuda and torch.float32 in kinds else tolerance


def _same(found: Tensor, expected: Tensor, tolerance: float, allowed: int = 0) -> bool:
    """Return whether values agree on all images but at most `allowed`; equal infinities and NaN do."""
    if found.shape != expected.shape:
        return False
    one, two = found.double(), expected.double()
    finite = two[torch.isfinite(two)].abs()
    scale = float(finite.max()) if len(finite) else 0.0
    close = torch.isclose(one, two, rtol=0.0, atol=tolerance * scale, equal_nan=True)
    return int((~close.flatten(1).all(1)).sum()) <= allowed


def _with_gradients(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits as an attack gets them: with gradients of the images only."""
    try:
        with _seeded(model, x.device), torch.enable_grad():
            point = x.clone().requires_grad_().clone()  # not a leaf, so that it may be written to in place
            return logits_of(model(point)).detach()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise Unsupported(f"{type(model).__name__} fails when gradients are enabled: {reason}") from error


def _first_difference(graph: Graph, model: nn.Module, seen: Observed) -> str:
    """Name the first layer whose output a graph gets wrong, among those that ran once."""
    x, outputs = seen.x, dict[str, list[Tensor]]()

    def listen(path: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.setdefault(path, []).append(_copy(output))

    last = {node.path: index for index, node in enumerate(graph.nodes) if node.path}
    handles = [m.register_forward_hook(listen(path)) for path, m in model.named_modules() if path in last]
    try:
        _ask(model, x)
    finally:
        for handle in handles:
            handle.remove()
    with _seeded(model, x.device), torch.no_grad():
        values = graph.values(x.to(_dtype(graph, x)))
    for path, index in sorted(last.items(), key=lambda item: item[1]):
        heard = outputs.get(path, [])
        if len(heard) != 1 or heard[0].shape != values[index].shape:
            continue
        if not _same(values[index], heard[0], seen.tolerance):
            return f"first in {graph.nodes[index].title}"
    return "although no single layer's output differs"


def _copy(output: object) -> Tensor:
    return output.detach().clone() if isinstance(output, Tensor) else torch.empty(0)


def _dtype(graph: Graph, x: Tensor) -> torch.dtype:
    """Return the precision of a graph's tensors."""
    for node in graph.nodes:
        for value in vars(node.op).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.dtype
    return x.dtype
