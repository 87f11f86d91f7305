"""What becomes of each of torch's operations: one entry a rule, or a name in one of the lists below.

A rule takes its arguments by the names of the operation's schema. What it does not take must have its default, or the
operation is refused: no keyword is ever skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _layer_rules as layers
from . import _shape_rules as shapes
from ._image_wise import WITHIN, call
from ._ops import Call
from ._torch_export import Arguments, Translator

Rule = Callable[[Translator, Arguments], Any]
# Functions that are constant but for jumps, of which staircase activations are made.
_STEPS = frozenset(
    """floor ceil round trunc sign sgn heaviside floor_divide fmod remainder argmax argmin bucketize frac
    one_hot""".split()  # noqa: SIM905
)
# What gives its input in eval mode.
_COPIES = frozenset(
    """clone alias detach contiguous lift_fresh_copy lift_fresh dropout feature_dropout alpha_dropout
    feature_alpha_dropout native_dropout positive""".split()  # noqa: SIM905
)
_LIKE = frozenset(
    "zero zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty".split()  # noqa: SIM905
)
# Each value by itself, of one input or of several that broadcast.
_ELEMENTWISE = frozenset(
    """abs acos asin asinh atan celu clamp clamp_max clamp_min cos cosh elu erf exp expm1 gelu hardshrink hardsigmoid
    hardswish hardtanh leaky_relu rrelu log log10 log1p log2 log_sigmoid logit mish pow prelu _prelu_kernel
    reciprocal relu6 rsqrt selu sigmoid silu sin sinh softplus softshrink sqrt square tan tanh threshold xlogy atan2
    hypot maximum minimum fmax fmin lerp addcmul addcdiv where masked_fill logaddexp gt lt ge le eq ne logical_and
    logical_or logical_not bitwise_and bitwise_or bitwise_not isnan isinf nan_to_num copysign""".split()  # noqa: SIM905
)
# Along axes given by dim or dims, which must not be the images'.
_ALONG = frozenset(
    """softmax log_softmax _softmax _log_softmax logsumexp mean sum amax amin prod cumsum cumprod var std norm
    linalg_vector_norm glu permute transpose select slice narrow flip index_select movedim select_scatter slice_scatter
    sort topk max min median kthvalue any all cat stack roll""".split()  # noqa: SIM905
)


def translate(t: Translator, name: str, target: Any, a: Arguments) -> Any:
    """Apply the rule for an operation: return where its value is, or a constant, or a list of such.

    Raise Unsupported where there is no rule.
    """
    if rule := _RULES.get(name):
        return rule(t, a)
    if name in _COPIES:
        return _copy(t, a)
    if name in _LIKE:
        return _constant_like(t, target, a)
    if name in _ELEMENTWISE or name in _ALONG or name in WITHIN:
        return call(t, name, target, a)
    if name.rstrip("_") in _STEPS:
        raise t.refuse(name, "has no rule: it jumps, so it has no finite Lipschitz constant")
    raise t.refuse(name, "has no rule")


def _copy(t: Translator, a: Arguments) -> Any:
    source = a.take("self") if "self" in a.defaults else a.take("input")
    a.take("p")
    a.take("memory_format")
    result = source
    return [result, None] if t.name == "native_dropout" else result


def _cast(t: Translator, a: Arguments) -> Any:
    for name in ("memory_format", "copy", "non_blocking", "dtype", "layout", "device", "pin_memory", "other"):
        a.take(name)
    value = t.now.meta["val"]
    source = a.take("self")
    before: Any = t.now.args[0]
    if value.is_floating_point() and not before.meta["val"].is_floating_point():
        return t.emit(Call("to", torch.ops.aten._to_copy.default, ("self",), {"dtype": t.dtype}), source)
    if value.is_floating_point() and torch.finfo(value.dtype).eps > torch.finfo(t.kind).eps:
        raise t.refuse(t.name, f"to {value.dtype} has no rule: it rounds, and so jumps")
    if not value.is_floating_point():
        raise t.refuse(t.name, f"to {value.dtype} has no rule: it jumps, so it has no finite Lipschitz constant")
    return source


def _constant_like(t: Translator, target: Any, a: Arguments) -> Tensor:
    """Return a constant that takes only its shape from the image."""
    value = t.now.meta["val"]
    sizes = [t.size(s) for s in value.shape]
    kind = t.name.split("_")["new" in t.name]
    fill = {"ones": 1.0, "zeros": 0.0, "zero": 0.0, "empty": torch.nan}.get(kind, a.take("fill_value"))
    a.given.clear()
    result: Tensor = t.cast(torch.full(sizes, fill, dtype=value.dtype, device=value.device))
    return result


_RULES: dict[str, Rule] = {
    "add": layers.add,
    **dict.fromkeys(("sub", "subtract"), layers.subtract),
    "rsub": layers.reverse_subtract,
    **dict.fromkeys(("mul", "multiply"), layers.multiply),
    **dict.fromkeys(("div", "divide", "true_divide"), layers.divide),
    **dict.fromkeys(("neg", "negative"), layers.negate),
    "linear": layers.linear,
    "matmul": layers.matmul,
    "mm": layers.matmul,
    "bmm": layers.matmul,
    "addmm": layers.addmm,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), layers.recurrent),
    "conv2d": layers.conv2d,
    "_native_batch_norm_legit_no_training": layers.norm_of_batch,
    "batch_norm": layers.norm_of_batch,
    "native_batch_norm": layers.norm_of_batch,
    "_native_batch_norm_legit": layers.by_the_batch,
    "_native_batch_norm_legit_functional": layers.by_the_batch,
    "relu": layers.relu,
    "clamp": layers.clamp,
    "clamp_min": layers.clamp,
    "max_pool2d": shapes.max_pool,
    "max_pool2d_with_indices": shapes.max_pool,
    "avg_pool2d": shapes.avg_pool,
    "adaptive_avg_pool2d": shapes.adaptive_pool,
    "_adaptive_avg_pool2d": shapes.adaptive_pool,
    "mean": shapes.mean,
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "unflatten"), shapes.reshape
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), shapes.expand),
    "repeat": shapes.repeat,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unbind"), shapes.split),
    "index": shapes.index,
    **dict.fromkeys(("copy", "fill"), shapes.filled),
    **dict.fromkeys(("_to_copy", "to", "type_as"), _cast),
}
