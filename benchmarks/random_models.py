"""Random small classifiers as Python source text: what benchmarks/lowering.py lowers.

A model is a chain of steps on a tensor `h`; each step is written in one of several ways that people write it. Whoever
wants to read a model prints its source; whoever wants to run it calls `build`.
"""

from __future__ import annotations

import linecache
import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

__all__ = ["Draft", "Form", "RandomModel", "build", "draft_model"]

SHAPES = ((4,), (6,), (1, 2, 2), (2, 1, 2), (1, 2, 3), (3, 1, 2), (1, 1, 5), (6, 1, 1))  # at most 6 values in all
HEADER = """\
import math
import random
import types
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
"""
HEAD = "h = self.head(h)"
_LARGEST = 48  # values of one image inside a network


@dataclass(frozen=True)
class RandomModel:
    """The source text of one model, the shape of its images, and what it is made of."""

    index: int
    shape: tuple[int, ...]
    source: str
    steps: tuple[str, ...]


Form = str | Callable[["Draft"], str]  # the text of a step, or what writes it
Steps = Mapping[str, tuple[Form, ...]]


@dataclass
class Draft:
    """A model in the making: the lines of its __init__, of its forward and of build(), and the shape of `h`."""

    draw: random.Random
    shape: tuple[int, ...]
    image: tuple[int, ...]
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    names: int = 0

    @property
    def last(self) -> int:
        return self.shape[-1]

    @property
    def channels(self) -> int:
        return self.shape[0]

    def name(self, stem: str) -> str:
        self.names += 1
        return f"{stem}{self.names}"

    def pick(self, *choices: str) -> str:
        return self.draw.choice(choices)

    def width(self, most: int = 6) -> int:
        return self.draw.randint(2, most)

    def number(self, low: float = 0.3, high: float = 2.0) -> str:
        """Return a number that is neither 0 nor 1."""
        return repr(round(self.draw.uniform(low, high), 2) * self.draw.choice((1, 1, -1)) or 0.5)

    def positive(self, low: float = 0.3, high: float = 2.0) -> str:
        return repr(round(self.draw.uniform(low, high), 2) or 0.5)

    def layer(self, text: str) -> str:
        """Add a module and return how forward() calls it."""
        name = self.name("layer")
        self.init.append(f"self.{name} = {text}")
        return f"self.{name}"

    def linear(self, wide: int | None = None) -> str:
        bias = self.pick("", "", ", bias=False")
        return self.layer(f"nn.Linear({self.last}, {wide or self.width()}{bias})")

    def parameter(self, *shape: int) -> str:
        name = self.name("w")
        self.init.append(f"self.{name} = nn.Parameter(torch.randn{shape})")
        return f"self.{name}"

    def values(self, shape: tuple[int, ...], dtype: str = "") -> str:
        """Return the text of a tensor with these values written out."""
        count = math.prod(shape)
        match dtype:
            case "torch.int64":
                flat: list[object] = [self.draw.choice((-2, -1, 2, 3)) for _ in range(count)]
            case "torch.bool":
                flat = [self.draw.random() < 0.6 for _ in range(count)]
            case _:
                flat = [round(self.draw.uniform(-2, 2), 2) or 0.5 for _ in range(count)]
        text = f"torch.tensor({flat}" + (f", dtype={dtype})" if dtype else ")")
        return text if len(shape) == 1 else f"{text}.reshape{shape or '(())'}"

    def constant(self, shape: tuple[int, ...], dtype: str = "") -> str:
        """Return how forward() names a constant: a buffer, an attribute, or written out where it is used."""
        text, name = self.values(shape, dtype), self.name("c")
        match self.pick("buffer", "buffer", "attribute", "here", "parameter" if not dtype else "buffer"):
            case "buffer":
                self.init.append(f'self.register_buffer("{name}", {text})')
            case "attribute":
                self.init.append(f"self.{name} = {text}")
            case "parameter":
                self.init.append(f"self.{name} = nn.Parameter({text})")
            case _:
                return text
        return f"self.{name}"

    def broadcast(self) -> str:
        """Return a constant that broadcasts against `h` in one of the ways that are possible."""
        kept = [n if self.draw.random() < 0.6 else 1 for n in self.shape]
        shape = tuple(kept[self.draw.randint(0, len(kept)) :])
        if self.draw.random() < 0.2 and len(shape) == len(self.shape):
            shape = (1, *shape)
        dtype = self.pick("", "", "", "torch.float64", "torch.int64", "torch.float16")
        return self.constant(shape, dtype)

    def order(self, size: int) -> list[int]:
        return self.draw.sample(range(size), size)

    def source(self, end: str = "") -> str:
        """Return the model's text; `end` stands in for what follows the steps so far."""
        lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.init]
        lines += ["", "    def forward(self, x):", "        h = x"]
        lines += [f"        {line}" for text in (*self.body, end) for line in text.splitlines()]
        lines += [
            "",
            "def build():",
            "    model = Model()",
            *(f"    {line}" for line in self.after),
            "    return model",
        ]
        return "\n".join(["", *lines, ""])

    def add(self, label: str, form: Form) -> bool:
        """Add a step, unless the model then no longer runs; return whether it was added."""
        before = (self.shape, len(self.init), len(self.body), len(self.after))
        self.body.append(form if isinstance(form, str) else form(self))
        try:
            found = run(self.source("return h"), self.image)
            sound = found.dim() in (2, 3, 4) and len(found) == 3 and 0 < found[0].numel() <= _LARGEST
            sound = sound and bool(found.isfinite().all())
            sound = sound and (found.dtype == torch.float32 or HEAD in self.body)
        except Exception:  # whatever the text raises: it does not fit what stands before it
            sound = False
        if sound:
            self.shape = tuple(found.shape[1:])
            self.steps.append(label)
        else:
            _, init, body, after = before
            del self.init[init:], self.body[body:], self.after[after:]
        return sound


def run(source: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Ask a model for its value on three images."""
    state = torch.get_rng_state()
    try:
        model = make(source, 0).eval()
        with torch.no_grad():
            found: torch.Tensor = model(torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)))
        return found
    finally:
        torch.set_rng_state(state)


def make(source: str, seed: int, file: str = "<random model>") -> nn.Module:
    """Run the source text and return its model."""
    space: dict[str, object] = {"__name__": "random_model"}
    text = HEADER + source
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # so that lines can be named
    exec(compile(text, file, "exec"), space)
    torch.manual_seed(seed)
    random.seed(seed)
    model: nn.Module = space["build"]()  # type: ignore[operator]
    return model


def build(model: RandomModel) -> nn.Module:
    """Build a model, its head scaled so that the logits vary by about one and no class always wins."""
    net = make(model.source, model.index, f"<model {model.index}>")
    modes = [module.training for module in net.modules()]
    head = net.head
    assert isinstance(head, nn.Linear)
    try:
        with torch.no_grad():
            x = torch.rand(256, *model.shape, generator=torch.Generator().manual_seed(1))
            logits = net.eval()(x.clone())
            size = float(logits.std(0).mean())
            if logits.isfinite().all() and size > 1e-3:
                head.weight.div_(size)
                head.bias.div_(size)
                head.bias.sub_(net(x.clone()).mean(0))
    except Exception:  # it may well return no tensor of logits: that is for the benchmark to find
        pass
    for module, mode in zip(net.modules(), modes, strict=True):
        module.training = mode
    return net


def draft_model(
    seed: int,
    index: int,
    common: Steps,
    odd: Steps,
    endings: Steps,
    *,
    share: float,
    rare: Collection[str] = (),
) -> RandomModel:
    """Draw a model: `common` steps, `rare` ones less often, a head, and endings; a `share` holds an `odd` step."""
    draw = random.Random(f"{seed}-{index}")
    shape = draw.choice(SHAPES)
    draft = Draft(draw, shape, shape)
    tables = [common] * draw.randint(2, 5)
    if draw.random() < share:
        tables.insert(draw.randint(0, len(tables)), odd)
    for table in tables:
        # Convolutions and pools fit only images, and flattening ends those: even the odds.
        odds = [3 if "pool" in label or "2d" in label else 0.3 if label == "flatten" else 1 for label in table]
        odds = [each * (0.4 if label in rare else 1) for each, label in zip(odds, table, strict=True)]
        for _ in range(40):
            (label,) = draw.choices(list(table), odds)
            if draft.add(label, draw.choice(table[label])):
                break
    if len(draft.shape) > 1:
        draft.add("flatten", draw.choice(common["flatten"]))
        if len(draft.shape) > 1:
            draft.add("flatten", "h = h.flatten(1)")
    draft.init.append(f"self.head = nn.Linear({draft.last}, {draw.randint(2, 4)})")
    draft.add("linear", HEAD)
    while draw.random() < 0.25:
        label = draw.choice(list(endings))
        if draft.add(label, draw.choice(endings[label])) and len(draft.shape) > 1:
            break
    return RandomModel(index, shape, draft.source("return h"), tuple(draft.steps))
