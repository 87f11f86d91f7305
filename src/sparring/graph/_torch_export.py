"""General lowering: capture what torch computes with torch.export, and translate it operation by operation.

torch.export runs hooks and replaced forward methods, and `run_decompositions` resolves in-place writes. Values that do
not depend on the image are computed once and kept as constants. torch.export is imported at first use.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..declared import Declared
from ..errors import Unsupported
from ..outputs import logits_of
from ._moved import Images
from ._ops import Call, Constant, Flatten, Graph, Input, Node, Op, Reshape, SparseActivation, flat, title
from ._passes import needed
from ._quiet import quiet
from ._writes import resolved_

_PRIMES = (61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173)
_LARGE = (1009, 1013, 1019, 1021, 1031, 1033, 1039)
# Operations that give every image the same, for any number of images.
_SPREAD = frozenset(
    """full zeros ones empty new_full new_zeros new_ones new_empty expand broadcast_to repeat view reshape
    _unsafe_view""".split()  # noqa: SIM905
)

# The general way out for an operation without a rule.
WAY = "write it with layers of torch.nn, or avoid features that need a graph"


@dataclass(frozen=True)
class At:
    """A value that depends on the image: the index of its node, and the place of its images if not a first axis."""

    index: int
    images: Images | None = None


def read_exported(model: nn.Module, example: Tensor, dtype: torch.dtype, *, shared: bool) -> Graph:
    """Return a model in eval mode as a graph with tensors of `dtype`, see `lower`; example: at least two images.

    Raise Unsupported, naming operation, layer and line, for a model that cannot be captured and for operations without
    a rule.
    """
    program = _capture(model, example)
    if resolved_(program.graph):
        with contextlib.suppress(Unsupported):  # torch may decompose what has no rule
            return Translator(model, program, dtype, shared).run()
    return Translator(model, _decomposed(model, program), dtype, shared).run()


def _capture(model: nn.Module, example: Tensor) -> Any:
    from torch.export import Dim, export

    root, example = _Root(model).eval(), example.clone().requires_grad_()  # as in attacks: some layers check this
    try:
        with quiet(), _whole(model), _every_line():
            try:
                program = export(root, (example,), dynamic_shapes=({0: Dim("batch", min=2)},), strict=False)
            except Exception as error:
                if not re.search("specialized it to be a constant|Constraints violated", str(error)):
                    raise
                # len(x) is captured as a number: one that occurs nowhere else marks the axis as well.
                sizes = {size for p in model.parameters() for size in p.shape} | set(example.shape)
                counts = [next(n for n in primes if all(size % n for size in sizes)) for primes in (_PRIMES, _LARGE)]
                many = [example.new_empty(n, *example.shape[1:]).requires_grad_() for n in counts]
                program, other = (export(root, (images,), strict=False) for images in many)
                for node, same in zip_longest(program.graph.nodes, other.graph.nodes):
                    texts = [
                        re.sub(r"\b[1-9]\d*\b", partial(_in_images, n), str(v and v.format_node()))
                        for n, v in zip(counts, (node, same), strict=True)
                    ]
                    if texts[0] != texts[1]:
                        raise _differing(model, program, node) from error
            return program
    except Unsupported:
        raise
    except Exception as error:  # torch runs the user's forward(), which can raise anything
        raise Unsupported(_why(model, error)) from error


def _differing(model: nn.Module, program: Any, node: fx.Node | None) -> Unsupported:
    """Return the error for a model whose graphs for two numbers of images differ first at a node."""
    reason = "computes another function for another number of images"
    if node is None or node.op != "call_function":
        return Unsupported(f"{type(model).__name__} {reason}")
    translator = Translator(model, program, torch.float32, shared=True)
    translator.now = node
    return translator.refuse(str(node.target).removeprefix("aten.").split(".")[0], reason, "keep images apart")


def _decomposed(model: nn.Module, program: Any) -> Any:
    """Return a program that writes to no memory, and in which torch decomposes operations without a rule."""
    from ._rules import has_rule

    program.graph_module.recompile()
    known: Any = torch.export.default_decompositions()
    spelled = {op: said for op, said in known.items() if not has_rule(op._schema.name.split("::")[1])}
    try:
        with quiet(), _whole(model), _every_line():
            return program.run_decompositions(spelled)
    except Exception as error:  # torch runs the user's own operations again, which can raise anything
        raise Unsupported(_why(model, error)) from error


def _in_images(count: int, number: re.Match[str]) -> str:
    """Return a number in an operation's text as a multiple of the number of images, if it is one."""
    times, rest = divmod(int(number[0]), count)
    return number[0] if rest else f"{times} N"


class _Root(nn.Module):
    """A model that returns only its logits; its own paths and parameters begin with "model"."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x.clone()))  # neither a leaf nor a view of one: it may be written to


def _within(path: str) -> str:
    """Convert a path of the root to a path of the model."""
    return path.removeprefix("model").removeprefix(".")


def _why(model: nn.Module, error: Exception) -> str:
    text = str(error)
    frames = traceback.extract_tb(error.__traceback__)
    line = _line([(f.filename, f.lineno or 0, f.line or "") for f in frames])
    where = f" at {line}" if line else ""
    if type(error).__name__ == "GuardOnDataDependentSymNode":
        reason = "it branches on a value, or converts one to a Python number"
    elif "batch" in text and ("Constraints violated" in text or "onstraint" in text):
        reason, where = "its result depends on the number of images in the batch", ""
    else:
        reason = (text.splitlines() or [type(error).__name__])[0]
    return (
        f"{type(model).__name__} cannot be lowered{where}: {reason}; forward() must compute with torch alone, image by "
        "image, and without branches on values"
    )


@contextlib.contextmanager
def _every_line() -> Iterator[None]:
    """Make torch record the lines of all functions that a forward calls; it drops those not named `forward`."""
    tracer: Any = fx.proxy.TracerBase
    torchs, before = str(Path(torch.__file__).parent), tracer._filter_traceback_frames

    def kept(_: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
        names = [frame.name for frame in frames]
        inside = frames[names.index("forward") :] if "forward" in names else []
        return traceback.StackSummary.from_list([f for f in inside if not f.filename.startswith(torchs)])

    try:
        tracer._filter_traceback_frames = kept
        yield
    finally:
        tracer._filter_traceback_frames = before


@contextlib.contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Make every activation-sparsity module a single operation while the model is captured."""
    _define_whole()
    marked: list[nn.Module] = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, Declared):
                if "forward" in vars(module):
                    raise Unsupported(f"layer '{name}' ({type(module).__name__}) has a replaced forward(); subclass it")
                marked.append(module)
                module.forward = lambda x, name=name: torch.ops.sparring.whole(x, name)
        yield
    finally:
        for module in marked:
            del module.forward


@functools.cache
def _define_whole() -> Any:
    library: Any = torch.library.Library("sparring", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("whole(Tensor x, str name) -> Tensor")
    library.impl("whole", lambda x, name: torch.empty_like(x), "CompositeExplicitAutograd")
    return library  # which also removes its operation


class Arguments:
    """An operation's arguments by the names of its schema, and which of them a rule has read."""

    def __init__(self, node: fx.Node, values: Translator) -> None:
        schema: Any = node.target._schema  # type: ignore[union-attr]
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        self.defaults = {a.name: a.default_value for a in schema.arguments}
        self.given = {name: values.of(value) for name, value in given.items()}

    def take(self, name: str) -> Any:
        """Return an argument, or its default; what nobody takes must have its default."""
        return self.given.pop(name, self.defaults.get(name))

    def unread(self) -> dict[str, Any]:
        """Return the arguments that were given, differ from their defaults, and were not read."""
        return {k: v for k, v in self.given.items() if isinstance(v, At | Tensor) or v != self.defaults.get(k)}


class Translator:
    """Walk a captured program: fold constants, drop unread values, and apply the rules to the rest."""

    def __init__(self, model: nn.Module, program: Any, dtype: torch.dtype, shared: bool) -> None:
        self.model, self.program, self.dtype, self.shared = model, program, dtype, shared
        self.nodes: list[Node] = []
        self.values: dict[fx.Node, Any] = {}
        self.now: fx.Node = next(iter(program.graph.nodes))
        self.batch: Any = None
        self.kind = dtype  # of the images
        # Whether one image's shape includes the images' axis, or counts channels of all its maps, see `_moved`.
        self.keeps_axes = self.joins_channels = False
        # The origin of constants: the path of each, and each parameter in the graph's precision.
        self.paths: dict[int, str] = {}
        self.held: dict[int, Tensor] = {}

    def run(self) -> Graph:
        signature = self.program.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
        output = next(n for n in self.program.graph.nodes if n.op == "output")
        results = [
            a for a, spec in zip(output.args[0], signature.output_specs, strict=True) if spec.kind.name == "USER_OUTPUT"
        ]
        if len(results) != 1 or not isinstance(results[0], fx.Node):
            raise Unsupported("the model must return one tensor of logits")
        wanted = _ancestors(results[0])
        for node in self.program.graph.nodes:
            self.now = node
            if node.op == "placeholder":
                self._placeholder(node, specs[node.name], wanted)
            elif (
                node.op == "call_function"
                and node in wanted
                and any(isinstance(v, Tensor) for v in flat(node.meta.get("val")))
            ):
                self.values[node] = self._called(node)
        last = self.values[results[0]]
        if not isinstance(last, At):
            raise Unsupported("the logits do not depend on the images; compute them from forward()'s argument")
        return Graph(needed(self.nodes, last.index))

    def _placeholder(self, node: fx.Node, spec: Any, wanted: set[fx.Node]) -> None:
        if spec.kind.name == "USER_INPUT":
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                if self.nodes:
                    raise Unsupported("the model takes more than one input; give it one image batch")
                self.batch, self.kind = value.shape[0], value.dtype
                self.values[node] = self.emit(Input())
        elif spec.kind.name in ("PARAMETER", "BUFFER"):
            if node in wanted and spec.target in self.program.graph_signature.buffers_to_mutate.values():
                name = _within(spec.target)
                raise Unsupported(
                    f"buffer '{name}' changes in every call, and the logits with it; change it only in training"
                )
            original = operator.attrgetter(_within(spec.target))(self.model)
            value = self.held.setdefault(id(original), self.cast(original))
            self.paths.setdefault(id(value), _within(spec.target))
            self.values[node] = value
        elif spec.target in self.program.constants:
            self.values[node] = self.cast(self.program.constants[spec.target])

    def cast(self, value: Any) -> Any:
        """Return a constant in the graph's precision; parameters that already have it are not copied."""
        if isinstance(value, tuple | list):
            return type(value)(self.cast(v) for v in value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value if self.shared and value.dtype == self.dtype else value.detach().to(self.dtype)

    def _called(self, node: fx.Node) -> Any:
        from ._rules import translate

        if node.target is operator.getitem:
            return self.of(node.args[0])[node.args[1]]
        if not isinstance(node.target, torch._ops.OpOverload):
            raise self.refuse(str(getattr(node.target, "__name__", node.target)), "has no rule")
        name = node.target._schema.name.split("::")[1]
        arguments = Arguments(node, self)
        if torch.Tag.nondeterministic_seeded in node.target.tags and not _is_idle(arguments):
            raise self.refuse(name, "is random also in eval mode", "run it only if self.training, or remove it")
        if not any(isinstance(v, At) for v in flat(arguments.given)):
            if name not in _SPREAD and any(self.counts_images(a) for a in (*node.args, *node.kwargs.values())):
                raise self.refuse(name, "creates a constant that depends on the number of images")
            with torch.no_grad():
                value = node.target(*self.of(node.args), **self.of(dict(node.kwargs)))
            # Uninitialised memory has arbitrary content.
            return self.cast(
                torch.full_like(value, torch.nan) if name.startswith("empty") and value.is_floating_point() else value
            )
        if name == "whole":
            path = arguments.take("name")
            module = cast(Declared, self.model.get_submodule(path))
            return self.emit(SparseActivation(path, module), arguments.take("x"))
        try:
            result = translate(self, name, node.target, arguments)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise self.refuse(name, "has no rule for such arguments") from error
        if unread := arguments.unread():
            told = ", ".join(f"{key}={value}" for key, value in unread.items())
            raise self.refuse(name, f"has no rule for {told}")
        return result

    def of(self, value: Any) -> Any:
        """Return the value of an argument: At if it depends on the image, otherwise a tensor or a number."""
        if isinstance(value, fx.Node):
            if value in self.values:
                return self.values[value]
            size = value.meta.get("val")
            return self.size(size) if isinstance(size, torch.SymInt) else size
        if isinstance(value, list | tuple):
            return [self.size(v) if isinstance(v, int) else self.of(v) for v in value]
        if isinstance(value, dict):
            return {k: self.of(v) for k, v in value.items()}
        return value

    def size(self, value: Any) -> int:
        """Return a size for a batch of one image: constants are the same for all images, and broadcast."""
        if isinstance(value, torch.SymInt):
            return int(value.node.expr.subs({self.batch.node.expr: 1}))
        return self.images_in(value) or int(value)

    def images_in(self, size: Any) -> int:
        """Return how many times the number of images a size is; 0 if it does not count images."""
        if not isinstance(self.batch, torch.SymInt):
            return size // self.batch if type(size) is int and size % self.batch == 0 else 0
        times = size.node.expr / self.batch.node.expr if isinstance(size, torch.SymInt) else None
        return int(times) if times is not None and times.is_Integer else 0

    def counts_images(self, argument: Any) -> bool:
        """Return whether an argument is a size that depends on how many images there are."""
        sizes = [getattr(part, "meta", {"val": part}).get("val") for part in flat(argument)]
        return any(self.images_in(s) or (isinstance(s, torch.SymInt) and not s.node.expr.is_number) for s in sizes)

    def emit(self, op: Op, *inputs: At | Tensor, shape: tuple[int, ...] | None = None) -> At:
        """Append a node, whose default shape is that of the current operation; constants become nodes too."""
        if shape is None:
            shape = self.image_shape(self.now.meta["val"])
        given = tuple(i.index if isinstance(i, At) else self.constant(i, len(shape)).index for i in inputs)
        self.nodes.append(Node(op, given, shape, self.path, self.line))
        return At(len(self.nodes) - 1)

    def constant(self, value: Tensor, rank: int) -> At:
        """Append a constant of one image's rank at least; it must not differ from image to image."""
        value = value.reshape(*[1] * (rank + 1 - value.dim()), *value.shape)
        if value.shape[0] != 1:
            raise self.refuse(self.name, f"with a constant of shape {tuple(value.shape)} has no rule")
        return self.emit(Constant(value[0].detach()), shape=tuple(value.shape[1:]))

    def image_shape(self, value: Any) -> tuple[int, ...]:
        """Return one image's shape; refuse values that are not batches of images along their first axis."""
        if isinstance(value, tuple | list):
            value = value[0]
        if self.keeps_axes:
            return tuple(self.images_in(s) or int(s) for s in value.shape)
        if self.joins_channels:
            return (self.images_in(value.shape[0]) * int(value.shape[1]), *(int(s) for s in value.shape[2:]))
        if not value.dim() or self.images_in(value.shape[0]) != 1:
            raise self.refuse(self.name, "mixes or moves the batch axis", "keep images along the first axis")
        if not all(isinstance(s, int) or s.node.expr.is_number for s in value.shape[1:]):
            raise self.refuse(self.name, "creates a shape that depends on the number of images")
        return tuple(int(s) for s in value.shape[1:])

    def view(self, x: At, shape: tuple[int, ...], images: Images | None = None) -> At:
        """Return a value in another shape, with its images in a given place; views of views are merged."""
        index = x.index
        while isinstance(self.nodes[index].op, Flatten | Reshape):
            index = self.nodes[index].inputs[0]
        if self.shape(x) == shape:
            index = x.index
        elif self.nodes[index].shape != shape:
            index = self.emit(Reshape(shape) if len(shape) != 1 else Flatten(), At(index), shape=shape).index
        return At(index, images)

    def turned(self, x: At, order: list[int]) -> At:
        """Return a value with one image's axes in another order."""
        shape, dims = self.shape(x), [0, *(axis + 1 for axis in order)]
        op = Call("permute", torch.ops.aten.permute.default, ("self",), {"dims": dims})
        return self.emit(op, x, shape=tuple(shape[axis] for axis in order))

    def shape(self, value: At) -> tuple[int, ...]:
        """Return one image's shape of a value."""
        return self.nodes[value.index].shape

    @property
    def name(self) -> str:
        """Return torch's name of the current operation."""
        schema = getattr(self.now.target, "_schema", None)
        return str(self.now.target) if schema is None else schema.name.split("::")[1]

    @property
    def path(self) -> str:
        """Return the path of the module that computes the current operation."""
        stack = list((self._told("nn_module_stack") or {}).values())
        return _within(stack[-1][0].split("@")[0]) if stack and not stack[-1][0].startswith("_empty") else ""

    def _told(self, what: str) -> Any:
        """Return torch's metadata of the current operation or, for one that torch added, of its reader."""
        node: fx.Node | None = self.now
        while node is not None and not node.meta.get(what):
            node = next(iter(node.users), None)
        return None if node is None else node.meta[what]

    @property
    def line(self) -> str:
        """Return the line of the user's code that calls the current operation."""
        text = (self._told("stack_trace") or "").splitlines()
        frames = []
        for place, entry in enumerate(text):
            if entry.strip().startswith('File "'):
                file, number = entry.strip().removeprefix('File "').split('", line ')
                code = text[place + 1].strip() if place + 1 < len(text) else ""
                frames.append((file, int(number.split(",")[0]), code))
        return _line(frames) or _home(type(self.model))

    def refuse_computed(self, *values: Any, what: str = "weights") -> None:
        """Raise Unsupported if one of the values depends on the image."""
        if any(isinstance(v, At) for v in flat(values)):
            raise self.refuse(self.name, f"has no rule for {what} that depend on the image")

    def refuse(self, name: str, reason: str, way: str = WAY) -> Unsupported:
        """Return the error that names the current operation, its layer and its line, the reason and the way out."""
        return Unsupported(f"{title(name, self.path, self.line)} {reason}; {way}")


def _home(model: type[nn.Module]) -> str:
    """Return the first line of forward(), for operations without metadata (autocast's); "" if it is torch's."""
    if model.__module__.startswith("torch."):
        return ""
    try:
        lines, number = inspect.getsourcelines(model.forward)
        return _line([(inspect.getfile(model.forward), number, lines[0].strip())])
    except (OSError, TypeError):  # not from a file
        return ""


def _line(frames: list[tuple[str, int, str]]) -> str:
    """Return the innermost line that is neither torch's nor this package's graph, as file:line: code."""
    here = str(Path(__file__).parent)
    own = [f for f in frames if f"{Path(torch.__file__).parent}" not in f[0] and not f[0].startswith((here, "torch/"))]
    own = [f for f in own if not f[0].startswith("<") and "/python3" not in f[0]]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}: {own[-1][2].strip()}" if own else ""


def _is_idle(arguments: Arguments) -> bool:
    """Return whether an operation that can draw is switched off by its arguments."""
    names = ("p", "dropout_p", "train", "training")
    chances = [arguments.given.get(name, arguments.defaults.get(name)) for name in names]
    return any(chance is not None and not chance for chance in chances)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found
