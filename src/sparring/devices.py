"""Devices and floating-point types of models: parse `--device` and `--dtype`, and refuse unavailable ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import UnknownNameError, UserError
from .outputs import opened

__all__ = ["CPU", "DEVICES", "DTYPES", "Place", "moved", "place_of", "usable_device"]

# Types of device that records may come from. Only CPUs were tried; tests simulate a GPU.
DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = {
    str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Place:
    """A device, and the floating-point type of models there; None: the model's own."""

    device: str = "cpu"
    dtype: torch.dtype | None = None

    @property
    def kind(self) -> str:
        """Its part of a record's key: the type of device, and the floating-point type if it is not float32."""
        return self.device.partition(":")[0] + (" float64" if self.dtype == torch.float64 else "")

    @property
    def numbers(self) -> str:
        """The name of the floating-point type: float32 unless another is requested."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def __str__(self) -> str:
        return f"on {self.device}" + ("" if self.dtype is None else f", {self.numbers}")

    def model(self, model: nn.Module) -> nn.Module:
        """Move a model there, in place, and return it; raise UserError if it cannot have this type."""
        own = (*model.named_parameters(), *model.named_buffers())
        wide = [name for name, value in own if value.dtype == torch.float64]
        if self.device.startswith("mps") and self.dtype is None and wide:
            raise UserError(
                f"'{wide[0]}' is in double precision, which MPS does not support; add --dtype float32 or --device cpu"
            )
        return model.to(self.device, self.dtype)

    def task(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
        """Return a model with its images and labels there; off the CPU the model is copied, not moved."""
        model = model.to(dtype=self.dtype)
        there = self.model(model if self.device == "cpu" else copy.deepcopy(model))
        return there, self.images(x), y.to(self.device)

    def images(self, x: Tensor) -> Tensor:
        """Return float images there: float64 for a model in float64, else float32."""
        return x.to(self.device, torch.float64 if self.dtype == torch.float64 else x.dtype)

    def answers(self, model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function from float images like x to logits, both on the CPU, by the model or its copy there."""
        if self == CPU:
            return opened(model, x[:2])
        model = opened(self.model(copy.deepcopy(model)), self.images(x[:2]))
        return lambda images: model(self.images(images)).to(images.device, images.dtype)

    def facts(self, model: nn.Module) -> dict[str, str]:
        """Return where a model ran, for results: the device and the floating-point type."""
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return {"device": self.device, "dtype": str(kind).removeprefix("torch.")}


CPU = Place()


def moved(x: Tensor, place: torch.device) -> Tensor:
    """Return a tensor on a device; to a GPU it is copied from pinned memory, asynchronously."""
    if place.type == "cuda" and x.device.type == "cpu" and torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(place, non_blocking=True)


def place_of(device: str = "auto", dtype: str | None = None, *, training: bool = False, here: bool = True) -> Place:
    """Parse the names of a device and a type; raise UserError if either is unavailable.

    `training`: also for a type in which small steps are rounded away. `here` is as in `usable_device`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError("type of --dtype", dtype, DTYPES)
    if training and dtype in ("float16", "bfloat16"):
        raise UserError(
            f"training in {dtype} rounds small steps away; train in float32 or float64, and attack with --dtype {dtype}"
        )
    found = usable_device(device, here=here)
    if found.startswith("mps") and dtype == "float64":
        raise UserError("MPS does not support double precision; use --dtype float32 or --device cpu")
    return Place(found, None if dtype is None else DTYPES[dtype])


def usable_device(name: str, *, here: bool = True) -> str:
    """Return the device that a name means ("auto": a CUDA GPU if there is one, else the CPU).

    Raise UserError unless it can be used; `here`: also unless it is in this machine.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
        if here:
            torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        reason = "PyTorch was built without it" if reason.startswith("Could not run") else reason
        raise UserError(f"there is no device '{name}' here ({reason}); try --device cpu") from error
    if kind not in DEVICES:
        raise UserError(f"models do not run on devices of type '{kind}'; use one of {', '.join(DEVICES)}")
    return name
