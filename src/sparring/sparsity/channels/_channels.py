"""Remove whole channels: which can be removed together, under which conditions, and the smaller network.

`coupling` returns the channels that form one unit. A trial verifies that the model's own forward() works without them
and returns the same logits; other channels stay, and the reason is given. A removed unit may leave a constant (an
activation that is not zero at zero, normalisation without parameters). If the constant is the same everywhere, the bias
of the next layer replaces it. Otherwise, as at the border of a padded convolution, the unit stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...errors import Unsupported, UserError
from ...graph import lower
from ...modes import eval_mode
from ...outputs import logits_of
from .._masks import Masks, apply_, prunable
from .._select import Channels
from ._dependencies import Coupling, coupling, joined

_SAME = 1e-5  # of the largest logit, in double precision; between float32 and float32 ten times as much


def tied_channels(model: nn.Module, shape: tuple[int, ...]) -> tuple[Channels, tuple[str, ...]]:
    """Return the structure of whole channels of a model, and the names of weights that cannot lose any.

    `shape` is that of one image. Channels that are added, multiplied, or convolved depthwise or in groups are removed
    together, also through concatenation, normalisation and flattening. The last layer keeps its outputs, the classes.
    So do layers that share a weight with another, are recurrent or under weight_norm and similar parametrisations,
    values that are mixed without weights (attention, LayerNorm over channels), and channels that forward() needs.
    Raises Unsupported for models that cannot be traced, and UserError, with the reasons, if no layer can lose channels.
    """
    known = _known(model, shape)
    coupled = {_named(path, "weight"): rows for path, rows in known.coupling.writers.items() if bool(rows.any())}
    if not coupled:
        raise UserError(f"no layer can lose whole channels: {_what_holds(model, known)}; prune unstructured")
    return Channels(coupled), tuple(name for name in prunable(model) if name not in coupled)


def silent(model: nn.Module, masks: Masks, shape: tuple[int, ...]) -> Masks:
    """Return the masks with biases and normalisation of removed channels masked as well.

    A channel without weights would still output its bias; if that is masked too, it outputs nothing and
    `remove_channels` can remove it. A channel that other layers add to is unchanged as long as one of them writes it.
    """
    table, masks = _known(model, shape).coupling, dict(masks)
    alive = torch.zeros(_count(table), dtype=torch.bool)
    alive[0] = True
    for path, units in table.writers.items():
        mask = masks.get(_named(path, "weight"))
        alive[units if mask is None else units[mask.flatten(1).any(1).cpu()]] = True
    for path, units in table.rows.items():
        for name in ("weight", "bias") if path in table.norms else ("bias",):
            full, parameter = _named(path, name), model.get_submodule(path)._parameters[name]
            if parameter is not None and bool(units.any()):
                kept = alive[units].to(parameter.device)
                masks[full] = kept & masks.get(full, torch.ones_like(kept))
    return masks


def remove_channels(model: nn.Module, masks: Masks, shape: tuple[int, ...]) -> nn.Module:
    """Return a smaller copy of a model without its dead channels; it has the logits of the masked model.

    The masks are first made `silent`. Channels whose weights are all zero, and those that nobody reads, are removed
    too. At least one channel of a layer stays. Raises Unsupported, with the reason, if the model cannot be traced, or
    if the masks remove a channel that its forward() needs.
    """
    known = _known(model, shape)
    for path, reason in known.reasons.items():
        mask = masks.get(_named(path, "weight"))
        if mask is not None and not bool(mask.flatten(1).any(1).all()):
            raise Unsupported(f"channels of '{path}' cannot be removed: {reason}")
    table = known.coupling
    masked = copy.deepcopy(model)
    apply_(masked, silent(model, masks, shape))
    smaller, x = copy.deepcopy(masked), _images(shape)
    with _trial(smaller):
        _cut_(smaller, table, _dead_(smaller, table), x)
    if problem := _difference(masked, smaller, x):
        raise Unsupported(f"channels cannot be removed: {problem}")
    return smaller


def _named(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _count(table: Coupling) -> int:
    return 1 + max((int(units.max()) for units in table.rows.values() if len(units)), default=0)


@dataclass(frozen=True, eq=False)
class _Known:
    """The cached result for a model of this structure, and why layers stay whole."""

    look: object
    coupling: Coupling
    reasons: dict[str, str]


# A pruner needs this at every change of masks, and it does not depend on weights.
_MODELS: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], _Known]] = WeakKeyDictionary()


def _known(model: nn.Module, shape: tuple[int, ...]) -> _Known:
    look = [(path, type(module), [None if p is None else (id(p), p.shape) for p in module._parameters.values()])
            for path, module in model.named_modules()]  # fmt: skip
    held = _MODELS.setdefault(model, {})
    if shape not in held or held[shape].look != look:
        with eval_mode(model):
            twin = copy.deepcopy(model).cpu()
        table = coupling(twin, lower(twin, shape), prunable(twin))
        held[shape] = _Known(look, *_tried(_as_after_training(twin), table, shape))
    return held[shape]


@torch.no_grad()
def _as_after_training(model: nn.Module) -> nn.Module:
    """Return a model with random numbers in its vectors, whose initial zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 and parameter.is_floating_point():
            like = 0.5 + torch.rand(parameter.shape, generator=generator)
            parameter.copy_(like if name.endswith("weight") else like - 0.75)
    return model


def _tried(model: nn.Module, table: Coupling, shape: tuple[int, ...]) -> tuple[Coupling, dict[str, str]]:
    """Return a coupling whose channels can be removed from the model, and the reasons for layers that stay whole."""
    spaces = {tuple(names): _units(table, names) for names in joined(table.writers)}
    for names, units in list(spaces.items()):
        if len(units) < 2:  # at least one channel stays
            table = table.without(units)
            del spaces[names]
    if not spaces or not _problem(model, table, list(spaces.values()), shape):
        return table, {}
    reasons: dict[str, str] = {}
    for names, units in list(spaces.items()):
        if problem := _problem(model, table, [units], shape):
            reasons |= dict.fromkeys(names, problem)
            table = table.without(units)
            del spaces[names]
    if spaces and (problem := _problem(model, table, list(spaces.values()), shape)):
        raise Unsupported(f"channels cannot be removed: {problem}")
    return table, reasons


def _units(table: Coupling, paths: list[str]) -> Tensor:
    units = torch.unique(torch.cat([table.rows[path] for path in paths]))
    found: Tensor = units[units > 0]
    return found


def _problem(model: nn.Module, table: Coupling, spaces: list[Tensor], shape: tuple[int, ...]) -> str | None:
    """Remove one and then half of the units of some layers from copies of a model; return what then fails."""
    generator = torch.Generator().manual_seed(0)
    problem = None
    for share in (0.0, 0.5):
        dead = torch.zeros(_count(table), dtype=torch.bool)
        for units in spaces:
            chosen = torch.randperm(len(units), generator=generator)[: max(1, int(share * len(units)))]
            dead[units[chosen]] = True
        problem = problem or _problem_without(dead, model, table, _images(shape))
    return problem


def _problem_without(dead: Tensor, model: nn.Module, table: Coupling, x: Tensor) -> str | None:
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for path, units in table.rows.items():
            for parameter in masked.get_submodule(path)._parameters.values():
                if parameter is not None:
                    parameter[dead[units]] = 0
    smaller = copy.deepcopy(masked)
    try:
        _cut_(smaller, table, dead, x)
    except Exception as error:  # the user's forward(), which can raise anything
        return _sentence(error)
    return _difference(masked, smaller, x)


def _sentence(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _images(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))


def _what_holds(model: nn.Module, known: _Known) -> str:
    """Explain why no layer of a model can lose channels."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in (p for p in module._parameters.values() if p is not None):
            owners.setdefault(id(parameter), []).append(f"'{path}'")
    tied = dict.fromkeys(" and ".join(paths) for paths in owners.values() if len(set(paths)) > 1)
    reasons = [f"{paths} share a weight" for paths in tied]
    reasons += [f"'{path}': {reason}" for path, reason in known.reasons.items()]
    last = "the last layer's outputs are the classes"
    if not reasons and len(prunable(model)) > 1:
        last += ", and forward() needs all outputs of the others, or mixes them without weights"
    return ", ".join([*reasons, last])


@contextmanager
def _trial(model: nn.Module) -> Iterator[None]:
    with eval_mode(model), torch.no_grad():
        yield


def _dead_(model: nn.Module, table: Coupling) -> Tensor:
    """Return which units are never written or never read, (units,), and set their rows of a model to zero, in place."""
    dead = torch.zeros(_count(table), dtype=torch.bool)
    while True:
        written, read = torch.zeros_like(dead), torch.zeros_like(dead)
        for path, units in table.writers.items():
            weight = model.get_submodule(path).get_parameter("weight")
            written[units[(weight != 0).flatten(1).any(1).cpu()]] = True
            if path in table.columns:
                read[table.columns[path][(weight != 0).transpose(0, 1).flatten(1).any(1).cpu()]] = True
        found = ~(written & read)
        found[0] = False
        if bool((found == dead).all()):
            return dead
        dead = found
        for path, units in table.writers.items():
            model.get_submodule(path).get_parameter("weight")[dead[units]] = 0


def _cut_(model: nn.Module, table: Coupling, dead: Tensor, x: Tensor) -> None:
    """Remove units from a model, in place; x: some images, float (N, ...).

    Raise Unsupported if one leaves a constant that no bias can replace.
    """
    dead = dead.clone()
    for units in (*table.rows.values(), *table.columns.values()):
        if len(units) and bool(dead[units].all()):
            dead[units[0]] = False
    left = _constants(model, {path: dead[units] for path, units in table.columns.items()}, x)
    for path, units in table.rows.items():
        _cut_outputs_(model.get_submodule(path), ~dead[units])
    for path, units in table.columns.items():
        _cut_inputs_(model.get_submodule(path), ~dead[units])
    for path, value in left.items():
        module, kept = model.get_submodule(path), ~dead[table.rows[path]]
        bias, value = module._parameters["bias"], value[kept.to(value.device)]
        module.bias = _parameter(value if bias is None else bias + value, module.get_parameter("weight"))


def _constants(model: nn.Module, gone: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Return the contribution of removed inputs to each output of a layer, (outputs,), where it is not zero."""
    found: dict[str, Tensor] = {}

    def listen(path: str, mask: Tensor) -> Callable[..., None]:
        def heard(module: Any, inputs: tuple[Tensor, ...]) -> None:
            axis = 1 if isinstance(module, nn.Conv2d) else -1
            part = inputs[0].movedim(axis, -1) * mask.to(inputs[0])
            if not bool(part.any()):
                return
            part = part.movedim(-1, axis)
            given = (module.forward(part) - module.forward(torch.zeros_like(part))).movedim(axis, -1).flatten(0, -2)
            spread = float((found.setdefault(path, given[0]) - given).abs().max())
            if not spread <= 1e-6 * float(given.abs().max()):
                raise Unsupported(
                    f"a channel without weights leaves a constant that '{path}' cannot absorb, because its zero "
                    "padding cuts it off at the border"
                )

        return heard

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(listen(path, mask))
        for path, mask in gone.items()
        if bool(mask.any())
    ]
    try:
        with _trial(model):
            model(_to(x, model))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _to(x: Tensor, model: nn.Module) -> Tensor:
    return x.to(next((p for p in model.parameters() if p.is_floating_point()), x))


def _difference(masked: nn.Module, smaller: nn.Module, x: Tensor) -> str | None:
    """Return how two networks' logits of images differ, in double precision if possible."""
    pair, tolerance = [copy.deepcopy(m).double() for m in (masked, smaller)], _SAME
    try:
        with _trial(pair[0]):
            expected = logits_of(pair[0](_to(x, pair[0])))
    except Exception:  # the user's forward(), which may support only one type
        pair, tolerance = [masked, smaller], 10 * _SAME
        with _trial(masked):
            expected = logits_of(masked(_to(x, masked)))
    try:
        with _trial(pair[1]):
            found = logits_of(pair[1](_to(x, pair[1])))
    except Exception as error:  # the user's forward(), which can raise anything
        return f"{_sentence(error)}; write no sizes into forward()"
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return None if apart <= tolerance else f"without them logits differ by {apart:.1e} of the largest"


def _parameter(values: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=like.requires_grad)


def _cut_outputs_(module: Any, kept: Tensor) -> None:
    if bool(kept.all()):
        return
    for name, value in module._parameters.items():
        if value is not None:
            setattr(module, name, _parameter(value[kept.to(value.device)], value))
    for name in ("running_mean", "running_var"):
        if name in module._buffers and module._buffers[name] is not None:
            module._buffers[name] = module._buffers[name][kept.to(module._buffers[name].device)].clone()
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        module.in_channels = module.in_channels * int(kept.sum()) // len(kept)
        module.groups = module.groups * int(kept.sum()) // len(kept)
    size = {nn.Linear: "out_features", nn.Conv2d: "out_channels"}
    attribute = next((size[kind] for kind in size if isinstance(module, kind)), "num_features")
    setattr(module, attribute, int(kept.sum()))


def _cut_inputs_(module: Any, kept: Tensor) -> None:
    if bool(kept.all()):
        return
    module.weight = _parameter(module.weight[:, kept.to(module.weight.device)], module.weight)
    setattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels", int(kept.sum()))
