"""Replace writes in place by operations with results, where nothing else sees the memory that is written.

torch's own way, `run_decompositions`, captures the program again, which takes twice as long as the first time.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ._ops import ELEMENTWISE, WITHIN

# What never returns memory of its inputs.
_FRESH = (ELEMENTWISE | WITHIN) - {"channel_shuffle"} | set(
    """add sub mul div matmul linear conv2d batch_norm relu clone cat stack mean sum softmax max_pool2d avg_pool2d
    adaptive_avg_pool2d""".split()  # noqa: SIM905
)


def resolved_(graph: fx.Graph) -> bool:
    """Replace operations that write to memory by those that return the result; return whether none is left.

    What wrote the memory before, and all that has read it, must have made new memory, so that nothing is a view of it.
    Dropout that is off goes first: it returns its input itself, which torch's functionalisation does not see.
    """
    seen = set[fx.Node]()
    for node in graph.nodes:
        if str(node.target) == "aten.dropout.default" and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
        elif isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable and not _replaced_(node, seen):
                return False
        elif node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator):
            return False  # a program of its own
        seen.add(node)
    return True


def _replaced_(node: fx.Node, seen: set[fx.Node]) -> bool:
    """Replace an operation such as relu_.default, which writes to its first argument, if that can be done."""
    written, (name, _, overload) = node.args[0], str(node.target).removeprefix("aten.").partition(".")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    if packet is None or overload not in packet.overloads() or not isinstance(written, fx.Node):
        return False
    values = [one.meta.get("val") for one in (node, *node.all_input_nodes)]
    kinds = {value.dtype for value in values if isinstance(value, Tensor)}
    if name != "detach_":  # which writes no values
        alone = all(_is_fresh(one) for one in (written, *written.users) if one in seen)
        if not alone or len(kinds) > 1:  # the result would have another type
            return False
    node.target = getattr(packet, overload)
    for user in [one for one in written.users if one not in seen and one is not node]:
        user.replace_input_with(written, node)
    return True


def _is_fresh(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.removeprefix("aten::") in _FRESH
