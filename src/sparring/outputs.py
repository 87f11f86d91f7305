"""Adapt models to one interface: float images in, logits (N, classes) out.

Models may return dictionaries, tuples or objects that hold the logits, work in half or double precision, write into
their input, or mask classes with −inf or a number far below all others. Code that runs a user's model opens it
first and then need not handle these cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import UserError, told

__all__ = ["Door", "Opened", "check_module", "logits_of", "opened", "precision"]

_NARROW = (torch.bfloat16, torch.float16)


def logits_of(output: object) -> Tensor:
    """Return the logits in a model's return value.

    They are the value itself if it is a tensor, its item or attribute `logits`, or the first item of a tuple or list.
    Raise UserError for anything else.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif not isinstance(output, Tensor):
        first = output[0] if isinstance(output, tuple | list) and output else None
        found = getattr(output, "logits", first)
    if isinstance(found, Tensor) and found.is_floating_point() and found.layout == torch.strided:
        return found
    what = f"a {type(output).__name__}"
    if found is not output and found is not None and not isinstance(found, Tensor):
        what += f" that has a {type(found).__name__} where logits should be"
    elif isinstance(output, Tensor):
        what = f"a tensor of {output.dtype}" + ("" if output.layout == torch.strided else f" and {output.layout}")
    elif isinstance(output, Mapping):
        what += f" with the keys {', '.join(map(str, output))}"
    raise UserError(f"the model returned {what}; return logits, a float tensor of shape (N, classes), from forward()")


def check_module(model: object) -> None:
    """Raise UserError unless the model is an nn.Module with initialised parameters."""
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is a {type(model).__name__}; wrap it in an nn.Module whose forward() calls it")
    if "eval" in vars(model):  # torch.export installs one that raises
        raise UserError("the model cannot be put in eval mode; use the module that it was exported from")
    lazy = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if is_lazy(value)]
    if lazy:
        raise UserError(f"'{lazy[0]}' has no shape yet (a lazy layer): call the model once on a batch of images first")


class Opened(nn.Module):
    """A network from float images to logits (N, classes) that needs no `Door`."""


class Door(Opened):
    """A wrapped model that takes images of any floating type and returns logits of the same type.

    kind: the type to which images are cast for the model; None keeps their own. copies: the model writes into its input
    and gets a copy. A class whose logit is at most `floor` is masked. Its logit is replaced by a number just below
    all others, so that losses stay finite and depend on the remaining classes.
    """

    def __init__(
        self, model: nn.Module, *, kind: torch.dtype | None = None, copies: bool = False, floor: float = -torch.inf
    ) -> None:
        super().__init__()
        self.model, self.kind, self.copies, self.floor = model, kind, copies, floor

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of x (N, ...)."""
        entry = x.clone() if self.copies else x.view_as(x)
        logits = logits_of(self.model(entry.to(self.kind or x.dtype))).to(x.dtype)
        if self.kind == torch.float16 and entry.requires_grad and logits.requires_grad:
            _balance(entry, logits)
        return _unmasked(logits, self.floor)


def opened(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a model in eval mode as one of float images to logits (N, classes): itself or a `Door` around it.

    The model is called on the first two of the float images x (N, ...) together and on the first alone. If it does not
    take their type, they are cast to that of its parameters. Raise UserError, from the model's own error, if it fails
    or returns anything but at least two logits per image.
    """
    check_module(model)
    if isinstance(model, Opened):
        return model
    kinds = dict.fromkeys([x.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trial = _tried(model, x[:2], kinds)
        if len(x) > 1:
            _tried(model, x[:1], kinds)
    if not trial.needs_door(x.dtype):
        return model
    return Door(model, kind=trial.kind, copies=trial.written, floor=_floor(logits_of(trial.output)) or -torch.inf)


def precision(model: nn.Module, logits: Tensor) -> torch.dtype:
    """Return the coarsest type that a model computes in: a parameter's type, or one that holds its logits exactly.

    The second case detects models that cast in forward() or run under autocast.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    kinds |= {kind for kind in _NARROW if torch.equal(logits.to(kind).to(logits.dtype), logits)}
    return max(kinds | {logits.dtype}, key=lambda kind: torch.finfo(kind).eps)


class _Trial(NamedTuple):
    """Result of a trial pass: the type that the model took, whether it wrote into its input, and its return value."""

    kind: torch.dtype
    written: bool
    output: object

    def needs_door(self, wanted: torch.dtype) -> bool:
        logits = self.output
        plain = isinstance(logits, Tensor) and logits.dtype == self.kind == wanted and not self.written
        return not plain or _floor(logits_of(logits)) is not None


def _tried(model: nn.Module, x: Tensor, kinds: Iterable[torch.dtype]) -> _Trial:
    """Return the result of a pass of images, in the first of these types that the model accepts."""
    failure: Exception = UserError("it accepts no floating-point type")
    for kind in kinds:
        given = x.to(kind, copy=True)
        try:
            output = model(given)
        except UserError:
            raise
        except Exception as error:  # a user's own code can raise anything
            failure = error
            continue
        if (logits := logits_of(output)).is_inference():
            raise UserError(
                "the model works in torch.inference_mode(), so it has no gradients; take that out of forward()"
            )
        _check_shape(logits, len(x))
        return _Trial(kind, given._version > 0 or not torch.equal(given, x.to(kind)), output)
    raise UserError(f"the model fails on {_count(x)}: {told(failure)}") from failure


def _check_shape(logits: Tensor, count: int) -> None:
    """Raise UserError unless these are at least two logits for each image."""
    shape = tuple(logits.shape)
    if logits.dim() == 2 and len(logits) == count and shape[1] >= 2:
        return
    if shape in ((count,), (count, 1)) and count > 1:
        raise UserError(
            "the model returns one number per image; return two logits instead (the larger one decides): "
            "torch.cat([-z, z], 1) for z of shape (N, 1)"
        )
    what = "one image" if count == 1 else f"{count} images"
    way = "squeeze only the intended axes, or " if logits.dim() == 1 else ""
    raise UserError(f"for {what} the model returns shape {shape}; {way}return logits (N, classes) with classes >= 2")


def _floor(logits: Tensor) -> float | None:
    """Return the logit below which classes are masked, or None if there are none.

    Masked are logits of −inf, and groups of logits at most −500 and ten times as low as any other is large: -1e9, -1e4
    and the lowest number of a type are used, instead of a logit or added to it. At least two classes are left.
    """
    values = logits.double()
    if torch.isneginf(values).any():
        return -torch.inf
    low = float(values.min())
    masked = values <= 0.98 * low
    if not math.isfinite(low) or bool((masked.sum(1) > values.shape[1] - 2).any()):
        return None
    others = float(values.masked_fill(masked, 0.0).abs().max())
    return low / 2 if low <= -10 * max(others, 50.0) else None


def _unmasked(logits: Tensor, floor: float) -> Tensor:
    """Return logits with masked ones replaced by a value below the image's others, by their span plus one."""
    masked = logits <= floor
    if logits.device.type == "cpu" and not bool(masked.any()):  # on other devices asking means waiting
        return logits
    masked &= ~masked.all(1, keepdim=True) | torch.isneginf(logits)
    with torch.no_grad():
        high, low = logits.amax(1, keepdim=True), torch.where(masked, torch.inf, logits).amin(1, keepdim=True)
    return torch.where(masked, 2 * low - high - 1, logits)


def _balance(entry: Tensor, logits: Tensor) -> None:
    """Scale gradients to unit size in the backward pass and restore them at the input: half precision ends at 6e-8."""
    sizes: list[Tensor] = []

    def down(gradient: Tensor) -> Tensor:
        sizes[:] = [gradient.abs().amax(1).clamp_min(1e-30)]
        return gradient / sizes[0].unsqueeze(1)

    def up(gradient: Tensor) -> Tensor:
        return gradient * sizes[0].view(-1, *[1] * (gradient.dim() - 1))

    logits.register_hook(down)  # type: ignore[no-untyped-call]
    entry.register_hook(up)  # type: ignore[no-untyped-call]


def _count(x: Tensor) -> str:
    """Describe the number of images and their shape."""
    return f"{len(x)} image{'s' if len(x) > 1 else ''} of shape {tuple(x.shape[1:])}"
