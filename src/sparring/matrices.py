"""Weight matrices: every tensor that a model multiplies with, and the parameter through which it can be pruned.

Sparsity refers to the weights of the forward pass. A layer under weight_norm, spectral_norm or torch.nn.utils.prune
computes its weight from other tensors; it can be pruned through these only if their zeros become zeros of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .declared import Declared
from .errors import UserError
from .modes import eval_mode

__all__ = ["Matrix", "is_transposed", "matrices", "refuse_unmasked"]

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
_LAYERS = (nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class Matrix:
    """One weight matrix: its owner's path and attribute, and the name of the parameter to prune.

    `name` is the parameter of the matrix's shape whose zeros are zeros of the matrix; with an `excuse` there is none,
    and the matrix is not pruned. `gain` is the parameter that scales whole rows of it (weight_norm).
    """

    name: str
    path: str
    module: nn.Module
    attribute: str
    gain: str | None = None
    excuse: str | None = None

    @property
    def divides(self) -> bool:
        """Whether spectral_norm computes the matrix, which divides by its largest singular value."""
        steps: list[object] = list(self.module._forward_pre_hooks.values())
        if parametrize.is_parametrized(self.module, self.attribute):
            steps += cast(nn.ModuleList, cast(nn.ModuleDict, self.module.parametrizations)[self.attribute])
        return any(isinstance(step, SpectralNorm | parametrizations._SpectralNorm) for step in steps)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the matrix as the forward pass uses it in eval mode."""
        direct = self.module._parameters.get(self.attribute)
        if direct is not None:
            return direct.detach()
        with eval_mode(self.module):
            for hook in self.module._forward_pre_hooks.values():
                if isinstance(hook, _HOOKS):
                    hook(self.module, ())
            value = getattr(self.module, self.attribute)
        return cast(Tensor, value().dequantize() if callable(value) else value).detach()


def matrices(model: nn.Module) -> list[Matrix]:
    """Return a model's weight matrices, shared ones once, in the order of its parameters.

    They are those of linear, bilinear, (transposed) convolutional, recurrent and attention layers, and every other
    parameter or buffer with two axes longer than 1 that belongs to no normalisation. The use of the latter is unknown,
    so they are counted but not pruned. Buffers with at most two distinct values are masks.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stale = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found: dict[str, Matrix] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute in _attributes(module):
            matrix = _matrix(names, path, module, attribute, called=id(module) not in stale)
            if matrix is not None:
                found.setdefault(matrix.name, matrix)
        if parametrize.is_parametrized(module):
            seen |= {id(p) for p in cast(nn.Module, module.parametrizations).parameters()}
        if module._forward_pre_hooks or isinstance(module, _NORMS):
            own = module._parameters.items()
            seen |= {id(p) for n, p in own if isinstance(module, _NORMS) or _is_hooked(module, n)}
    owners = dict(model.named_modules(remove_duplicate=False))  # scripted modules have no get_submodule()
    for name, parameter in model.named_parameters():
        if name not in found and id(parameter) not in seen and sum(size > 1 for size in parameter.shape) > 1:
            path, _, attribute = name.rpartition(".")
            owner = owners[path]
            table = isinstance(owner, nn.Embedding | nn.EmbeddingBag)
            excuse = "an embedding table" if table else f"a parameter of {type(owner).__name__} with unknown use"
            found[name] = Matrix(name, path, owner, attribute, excuse=excuse)
    for matrix in _held(model):
        if (matrix.path, matrix.attribute) not in {(m.path, m.attribute) for m in found.values()}:
            found[matrix.name] = matrix
    order = {name: place for place, name in enumerate(names.values())}
    return sorted(found.values(), key=lambda matrix: order.get(matrix.name, len(order)))


def _held(model: nn.Module) -> Iterator[Matrix]:
    """Yield the matrices that are not parameters, each once: buffers, quantised ones, and what hooks compute."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, (Declared, *_NORMS)) or "parametrizations" in path:
            continue
        if type(module).__module__.startswith("torch.ao.nn.") and callable(getattr(module, "weight", None)):
            yield Matrix(f"{path}.weight", path, module, "weight", excuse="quantised")
        computed = {name: vars(module).get(name) for name in _hooked(module)}
        for attribute, value in (computed | dict(module.named_buffers(recurse=False))).items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or id(value) in seen:
                continue
            many = sum(size > 1 for size in value.shape) > 1
            if many and bool(((value != value.min()) & (value != value.max())).any()):
                seen.add(id(value))
                name = f"{path}.{attribute}" if path else attribute
                yield Matrix(name, path, module, attribute, excuse=f"no parameter of {type(module).__name__}")


def refuse_unmasked(model: nn.Module, masks: Mapping[str, Tensor], reason: str) -> None:
    """Raise UserError, with the likely cause, unless every weight that a mask (True = kept) removed is zero."""
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    values |= {matrix.name: matrix.value() for matrix in matrices(model)}
    for name, mask in masks.items():
        value = values.get(name)
        if value is None or mask.dtype != torch.bool or mask.shape != value.shape:
            raise UserError(f"the mask '{name}' belongs to no weight of the model: {reason}")
        if bool((value[~mask] != 0).any()):
            raise UserError(f"masked weights of '{name}' are not zero: {reason}")


def is_transposed(matrix: Matrix) -> bool:
    """Return whether a matrix's first axis counts inputs, not outputs."""
    return isinstance(matrix.module, _ConvTransposeNd)


def _attributes(module: nn.Module) -> Iterator[str]:
    known: list[str] = []
    if isinstance(module, nn.Linear | nn.Bilinear | _ConvNd):
        known = ["weight"]
    elif isinstance(module, nn.RNNBase):
        known = [name for name in module._flat_weights_names if name.startswith("weight")]
    elif isinstance(module, nn.RNNCellBase):
        known = ["weight_ih", "weight_hh"]
    elif isinstance(module, nn.MultiheadAttention):
        known = list(_ATTENTION)
    yield from known
    if parametrize.is_parametrized(module) and not isinstance(module, _NORMS):
        yield from (name for name in cast(nn.ModuleDict, module.parametrizations) if name not in known)


def _matrix(names: dict[int, str], path: str, module: nn.Module, attribute: str, *, called: bool) -> Matrix | None:
    prefix = f"{path}." if path else ""
    own = f"{prefix}{attribute}"
    direct = module._parameters.get(attribute)
    if direct is not None:
        return Matrix(names[id(direct)], path, module, attribute, excuse=_doubt(module, attribute))
    if parametrize.is_parametrized(module, attribute):
        return _parametrised(names, path, module, attribute)
    for suffix, gain in (("_v", "_g"), ("_orig", None)):
        behind = module._parameters.get(attribute + suffix)
        if behind is not None and _is_hooked(module, attribute + suffix):
            excuse = None if called else "computed by a hook that attention does not run"
            scale = None if gain is None else names[id(module._parameters[attribute + gain])]
            return Matrix(names[id(behind)], path, module, attribute, scale, excuse)
    if isinstance(getattr(module, attribute, None), Tensor):
        return Matrix(own, path, module, attribute, excuse="no parameter")
    return None


def _hooked(module: nn.Module) -> set[str]:
    """Return the attributes of a module that old-style hooks compute."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _HOOKS)]
    return {cast(str, getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)) for hook in hooks}


def _is_hooked(module: nn.Module, name: str) -> bool:
    """Return whether an old-style hook computes an attribute of a module from the parameter `name`."""
    return name.rpartition("_")[0] in _hooked(module)


@torch.no_grad()
def _parametrised(names: dict[int, str], path: str, module: nn.Module, attribute: str) -> Matrix | None:
    chain = cast(nn.ModuleList, cast(nn.ModuleDict, module.parametrizations)[attribute])
    originals = list(chain.parameters(recurse=False))
    own = f"{path}.{attribute}" if path else attribute
    with eval_mode(module):
        shape = cast(Tensor, getattr(module, attribute)).shape
        if len(shape) < 2:
            return None
        place = next((i for i, original in enumerate(originals) if original.shape == shape), None)
        weighted = isinstance(chain[0], parametrizations._WeightNorm)
        place = 1 if weighted else place
        kept = place is not None and ((weighted and len(chain) == 1) or _carries_zeros(chain, originals, place))
        if place is None or not kept or not isinstance(module, _LAYERS):
            kinds = " and ".join(type(step).__name__.lstrip("_") for step in chain)
            return Matrix(own, path, module, attribute, excuse=f"computed by {kinds}, which does not keep zeros")
    gain = names[id(originals[0])] if weighted else None
    return Matrix(names[id(originals[place])], path, module, attribute, gain, _doubt(module, attribute))


def _carries_zeros(chain: nn.ModuleList, originals: list[nn.Parameter], place: int) -> bool:
    """Return whether zeros of one original tensor are zeros of a parametrisation's result."""
    values = [original.detach() for original in originals]
    values[place], kept = _with_zeros(values[place])
    try:
        value = chain[0](*values)
        for step in list(chain)[1:]:
            value = step(value)
    except (RuntimeError, ValueError, TypeError):
        return False
    return value.shape == kept.shape and not bool(value[~kept].any())


def _with_zeros(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return random values, a third of them zero, and a mask of the nonzero ones."""
    draw = torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    kept = draw > 1 / 3
    return (draw + 0.5) * kept, kept


def _doubt(module: nn.Module, attribute: str) -> str | None:
    """Return why zeros of a layer's weight may not be zeros of its forward pass: its forward() rescales the weight."""
    base = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    methods = ("forward", "_conv_forward")
    replaced = "forward" in vars(module) or any(getattr(type(module), m, 0) is not getattr(base, m, 0) for m in methods)
    if not replaced or _ignores_dead_inputs(module, attribute):
        return None
    return f"used by {type(module).__name__}.forward() in a way that does not keep zeros"


@torch.no_grad()
def _ignores_dead_inputs(module: nn.Module, attribute: str) -> bool:
    """Return whether inputs with zero weights have no effect; for one input a group, whether the output is linear."""
    if not isinstance(module, nn.Linear | _ConvNd) or isinstance(module, _ConvTransposeNd):
        return False
    weight = cast(Tensor, getattr(module, attribute)).detach()
    generator = torch.Generator().manual_seed(0)
    draw = [torch.rand(weight.shape, generator=generator).to(weight) for _ in range(2)]
    inputs, reach = weight.shape[1], list[int]()
    if isinstance(module, _ConvNd):
        spread = zip(module.kernel_size, module.dilation, strict=True)
        inputs, reach = module.in_channels, [1 + d * (k - 1) for k, d in spread]
    x = torch.rand(2, inputs, *reach, generator=generator).to(weight)

    # For any values of its other matrices in training, such as LoRA's, which begin with zeros.
    name = attribute if attribute in module._parameters else f"parametrizations.{attribute}.original"
    behind = (name, f"parametrizations.{attribute}")
    own = {n: p for n, p in module.named_parameters() if p.dim() > 1 and not n.startswith(behind)}
    others = {n: torch.rand(p.shape, generator=generator).to(p) for n, p in own.items()}

    def run(value: Tensor, x: Tensor) -> Tensor:
        return cast(Tensor, functional_call(module, others | {name: value}, (x,)))

    try:
        with eval_mode(module):
            if weight.shape[1] == 1:
                none = torch.zeros_like(weight)
                left, right = run(draw[0] + draw[1], x) + run(none, x), run(draw[0], x) + run(draw[1], x)
                return bool(torch.allclose(left, right, rtol=1e-3, atol=1e-3))
            draw[0][:, 0] = 0
            other = x.clone()
            other[:, :: weight.shape[1]] += 1
            return bool(torch.allclose(run(draw[0], x), run(draw[0], other), rtol=1e-4, atol=1e-4))
    except Exception:  # the user's own forward(), which can raise anything
        return False
