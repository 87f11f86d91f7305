"""Where models run and in which numbers: `--device` and `--dtype` are read here, and refused where there is no such."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import UnknownNameError, UserError

__all__ = ["DEVICES", "DTYPES", "Place", "place_of", "usable_device"]

# Types of device that records may come from. CPUs alone were tried; tests pretend a GPU.
DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = {
    str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Place:
    """A device, and the type of a model's numbers there; None: those that it has."""

    device: str = "cpu"
    dtype: torch.dtype | None = None

    def model(self, model: nn.Module) -> nn.Module:
        """Move a model there, in place, and return it; raise UserError if its numbers cannot be had there."""
        wide = [name for name, value in model.state_dict().items() if value.dtype == torch.float64]
        if self.device.startswith("mps") and self.dtype is None and wide:
            raise UserError(
                f"'{wide[0]}' is in double precision, which MPS does not support; add --dtype float32 or --device cpu"
            )
        return model.to(self.device, self.dtype)

    def task(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
        """Return a model with its images and labels there; off the CPU the model that is given stays where it is."""
        model = model.to(dtype=self.dtype)
        there = self.model(model if self.device == "cpu" else copy.deepcopy(model))
        return there, self.images(x), y.to(self.device)

    def images(self, x: Tensor) -> Tensor:
        """Return float images there: in double precision for a model in double precision, else in single."""
        return x.to(self.device, torch.float64 if self.dtype == torch.float64 else x.dtype)

    def facts(self, model: nn.Module) -> dict[str, str]:
        """Return what results say of where a model ran: the device, and the type of its numbers."""
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return {"device": self.device, "dtype": str(kind).removeprefix("torch.")}


def place_of(device: str = "auto", dtype: str | None = None) -> Place:
    """Read a device's name and a type's; raise UserError where either is not to be had."""
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError("type of --dtype", dtype, DTYPES)
    found = usable_device(device)
    if found.startswith("mps") and dtype == "float64":
        raise UserError("MPS does not support double precision; use --dtype float32 or --device cpu")
    return Place(found, None if dtype is None else DTYPES[dtype])


def usable_device(name: str, *, here: bool = True) -> str:
    """Return the device that a name means ("auto": a CUDA GPU if there is one, else the CPU).

    Raise UserError unless it is one that can be used; `here`: unless it is in this machine, too.
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
