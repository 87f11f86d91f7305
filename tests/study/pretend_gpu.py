"""A GPU to test with where there is none: its tensors compute on the CPU but refuse, as a GPU's do, others' company."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["PretendGPU"]

GPU = torch.device("cuda:0")
# Where torch itself lets both kinds meet: copies, moves, and reading what a tensor is.
MEET = {"copy_", "as_subclass", "__get__", "__set__", "_has_compatible_shallow_copy_type"}


class OnGPU(Tensor):
    """A tensor that is said to be on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone().as_subclass(OnGPU).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = copied
        return copied


class PretendGPU(TorchFunctionMode):
    """Inside this context "cuda:0" exists; raise RuntimeError where work on a GPU would fail for a misplaced tensor."""

    moved = 0

    def __enter__(self) -> Any:
        self.told, torch.cuda.mem_get_info = torch.cuda.mem_get_info, lambda *_: (2**34, 2**34)
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        torch.cuda.mem_get_info = self.told
        super().__exit__(*reason)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if isinstance(args[0], OnGPU) else func(*args)
        if name in ("to", "cpu"):
            return self._move(name, args[0], args[1:], kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        here = any(isinstance(value, OnGPU) for value in tensors)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs.pop("device")
            here = True
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"{name}: a generator on the CPU cannot draw for a GPU")
        checked = tensors
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], OnGPU):
            checked = [args[0], *tree_leaves(args[2:])]  # an index may come from anywhere
        if here and name not in MEET and name != "numpy":
            for value in checked:
                if isinstance(value, Tensor) and not isinstance(value, OnGPU) and value.dim():
                    raise RuntimeError(f"{name}: tensors on the GPU and on the CPU")
        if here and name == "numpy":
            raise TypeError("numpy: this tensor is on the GPU")
        return tree_map(_onto, func(*args, **kwargs)) if here else func(*args, **kwargs)

    def _move(self, name: str, value: Tensor, rest: Any, kwargs: dict[str, Any]) -> Tensor:
        place = "cpu" if name == "cpu" else kwargs.pop("device", None)
        for argument in rest:
            if isinstance(argument, str | torch.device):
                place = argument
            elif isinstance(argument, torch.dtype):
                kwargs["dtype"] = argument
            elif isinstance(argument, Tensor):
                place, kwargs["dtype"] = (GPU if isinstance(argument, OnGPU) else "cpu"), argument.dtype
        kind: Any = type(value) if place is None else OnGPU if torch.device(place).type == "cuda" else Tensor
        result = value.to(**kwargs) if kwargs else value
        if isinstance(value, OnGPU) == (kind is OnGPU):
            return _onto(result) if kind is OnGPU else result
        self.moved += 1
        return result.clone().as_subclass(kind)


def _onto(value: Any) -> Any:
    return value.as_subclass(OnGPU) if type(value) is Tensor else value
